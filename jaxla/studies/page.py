"""The report on a study: tables and figures as files of their own, and all of them on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from jaxla.cli.files import write_atomically
from jaxla.config import Published
from jaxla.evaluation import statistics
from jaxla.evaluation.metrics import COLUMNS
from jaxla.reporting.overlays import Panel
from jaxla.reporting.page import data_uri, templates
from jaxla.studies.figures import (
    Styles,
    describe_agreement,
    draw_agreement,
    draw_cost,
    draw_figure2,
    draw_figure3,
    series_of,
    styles_of,
)
from jaxla.studies.results import Results
from jaxla.studies.tables import all_tables, devices_of, dice_iou_pairs, largest_protocol, write_tables

PAGE = "report.html"
OTHERS = {"comparisons", "cost", "figure2", "figure3", "agreement"}  # names of a report's files, but for Table 1
ENDINGS = (".csv", ".md", ".tex", ".pdf", ".png")


class Drawn(NamedTuple):
    """A figure, and what is to be said of it."""

    name: str
    figure: Figure
    caption: str
    alt: str


def write_study_report(
    folder: Path,
    results: Results,
    published: Mapping[tuple[str, str], Published],
    cases: Mapping[str, Sequence[Panel]],
    known_methods: Sequence[str],
    known_protocols: Sequence[str],
    changed: Mapping[str, str],
) -> Path:
    """Write `tables/`, `figures/` and the page, which takes its name only when it is whole; -> its path.

    Tables and figures of an earlier report that this one does not have are removed.

    Args:
        published: by method and protocol.
        cases: for Figure 3: for each case a panel of each method, under the protocol of most training patients.
        known_methods: all there are, by which those of the study are given their colours.
        known_protocols: all of which there may be a table.
        changed: by method, which options are not its own; only of those that have some.

    Raises:
        OSError: a file cannot be written.
    """
    tables = all_tables(results, published)
    drawn = _draw(
        results, cases, styles_of({run.method: run.record.experiment.method for run in results.runs}, known_methods)
    )
    of_a_report = OTHERS | {f"table1_{protocol}" for protocol in known_protocols}
    for name, written in (("tables", {table.name for table in tables}), ("figures", {one.name for one in drawn})):
        (folder / name).mkdir(exist_ok=True)
        for path in (folder / name).iterdir():
            if path.stem in of_a_report - written and path.suffix in ENDINGS:
                path.unlink()
    write_tables(tables, folder / "tables")
    for figure in drawn:
        for ending in ("pdf", "png"):
            metadata = {"CreationDate": None} if ending == "pdf" else {}  # the same study, the same bytes
            figure.figure.savefig(folder / "figures" / f"{figure.name}.{ending}", dpi=200, metadata=metadata)

    first = results.runs[0]
    definitions = {COLUMNS[name].title: text for name, text in first.summary["definitions"].items()}
    page = (
        templates()
        .get_template("study_page.html.jinja")
        .render(
            results=results,
            changed=changed,
            first=first,
            weights={m: results.of(results.protocols[0], m)[0].record.weights for m in results.methods},
            pairs=dice_iou_pairs(results, published),
            tables=tables,
            figures=[
                {**one._asdict(), "uri": data_uri(one.figure), "inches": one.figure.get_figwidth()} for one in drawn
            ],
            least_p=statistics.least_p(len(first.split["test"])),
            definitions=definitions | {"Empty masks": first.summary["empty_rule"]} | statistics.DEFINITIONS,
        )
    )
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def _draw(results: Results, cases: Mapping[str, Sequence[Panel]], styles: Styles) -> list[Drawn]:
    largest = largest_protocol(results)
    n = results.mean(largest, results.methods[0], "dice").n
    several = len(results.seeds) > 1
    of_classes = " and classes" if len(results.classes) > 1 else ""
    drawn = []
    if panels := series_of(results):
        caption = (
            f"Test Dice, mean over {n} volumes{of_classes}, over the training patients"
            + (f"; bars: sd of the mean over {len(results.seeds)} seeds" if several else "; one seed")
            + ". The atlas, the mean training mask, never looks at the image."
        )
        drawn.append(
            Drawn("figure2", draw_figure2(results, styles, panels), caption, "Dice over training patients by method")
        )
    ranked = any(": " in name for name in cases)
    caption = (
        f"Protocol {largest}, seed {results.seeds[0]}: the slice (counted from 1) with the largest reference, at the "
        "scan's own resolution, cut to the structure's surroundings; prediction green, reference red. Dice is that of "
        f"the volume{', mean over classes' if of_classes else ''}."
        f"{' Worst, median and best by the mean over methods and seeds.' if ranked else ''}"
    )
    drawn.append(Drawn("figure3", draw_figure3(cases, results.methods), caption, "Outlines over the scan by method"))
    caption = (
        f"Protocol {largest}: test Dice, mean over {n} volumes{of_classes}"
        f"{' with its 95 % bootstrap interval' if n > 1 else ''}, over what it costs; "
        f"on {devices_of(results, largest)}."
    )
    drawn.append(Drawn("cost", draw_cost(results, styles), caption, "Dice over cost by method"))
    drawn.append(
        Drawn("agreement", draw_agreement(results, styles), describe_agreement(results), "Bland-Altman plots by method")
    )
    return drawn
