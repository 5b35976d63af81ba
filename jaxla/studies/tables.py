"""The tables of a study, results, comparisons and cost: as CSV with all digits, as Markdown and LaTeX to print."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from jaxla.cli.terminal import plural
from jaxla.config import Published
from jaxla.evaluation.metrics import COLUMNS
from jaxla.evaluation.statistics import Comparison, compare
from jaxla.reporting.page import Pair
from jaxla.runs.machine import describe_device
from jaxla.runs.record import FEATURES_KEPT
from jaxla.studies.results import METRICS_SHOWN, Mean, Results

ATLAS = "atlas"
MEAN = "mean"  # of several classes
FEWEST_FOR_INTERVALS = 10  # below, the bootstrap draws again and again what few cases there are
UNITS = ("volume", "slice")
LATEX_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "_%&#$"})
LATEX_SIGNS = str.maketrans({"±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$"})


class Table(NamedTuple):
    """A table to print.

    Attributes:
        name: of its files, without ending.
        caption: with units, n and protocol.
        head: of the columns.
        rows: of cells, the first one the row's name.
        records: the same with all digits, a mapping per line of the CSV file.
    """

    name: str
    caption: str
    head: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]


def all_tables(results: Results, published: Mapping[tuple[str, str], Published]) -> list[Table]:
    tables = [results_table(results, protocol, published) for protocol in results.protocols]
    if len(results.methods) > 1:
        tables.append(comparison_table(results))
    return [*tables, cost_table(results)]


def averages_of(results: Results) -> dict[str, str]:
    """What is averaged in tables: what it is called -> the class, or nothing for the mean over several classes."""
    of_classes = {name: name for name in results.classes}
    return of_classes if len(of_classes) == 1 else {MEAN: ""} | of_classes


def results_table(results: Results, protocol: str, published: Mapping[tuple[str, str], Published]) -> Table:
    """Table 1 under one protocol: Dice, IoU, HD95 and ASSD of every method, and the atlas's Dice and IoU."""
    rows, records = [], []
    averages = averages_of(results)
    one_class, several_seeds = len(averages) == 1, len(results.seeds) > 1
    printed = {m: published[m, protocol] for m in results.methods if one_class and (m, protocol) in published}
    for unit in UNITS:
        for name, of_class in averages.items():
            for method in [*results.methods, ATLAS] if unit == "volume" else results.methods:
                means = {
                    metric: _mean_of(results, protocol, method, metric, unit, of_class) for metric in METRICS_SHOWN
                }
                of_paper = printed.get(method) if unit == "volume" else None
                cells = [method, *([] if one_class else [name]), unit]
                cells += [mean_sd(mean, metric) for metric, mean in means.items()]
                if several_seeds:
                    over_seeds = means["dice"].sd_over_seeds
                    cells.append("–" if over_seeds is None else f"{over_seeds:.3f}")
                above = method != ATLAS and unit == "volume"
                cells.append(above_atlas(results, protocol, method, of_class) if above else "–")
                rows.append(cells + (_published_cells(of_paper) if printed else []))
                records += [
                    _record(protocol, method, name, metric, mean, of_paper) for metric, mean in means.items() if mean
                ]
    head = ["method", *([] if one_class else ["class"]), "per", *(COLUMNS[metric].title for metric in METRICS_SHOWN)]
    head += [*(["sd over seeds"] if several_seeds else []), "above atlas"]
    if printed:
        head += ["published Dice", "published IoU"]
    n, slices = (results.mean(protocol, results.methods[0], "dice", unit).n for unit in UNITS)
    patients = len(results.of(protocol, results.methods[0])[0].split["train"])
    caption = (
        f"Protocol {protocol} ({plural(patients, 'training patient')}): mean ± sd over "
        f"{plural(n, 'test volume')} and over their {slices} slices, each first averaged over {_seeds(results)}"
        + ("" if one_class else f"; {MEAN}: of the classes of a unit")
        + ". HD95 is the larger of the two directed 95th percentiles (not that of the pooled distances). Both masks of "
        "a unit empty counts as perfect, one of them as worst. "
        + (f"Sd over seeds: of the {len(results.seeds)} seeds' mean Dice. " if several_seeds else "")
        + "The atlas never looks at the image; above atlas: test cases of a higher Dice."
    )
    if printed:
        sources, caveats = (
            "; ".join(dict.fromkeys(getattr(row, of) for row in printed.values())) for of in ("source", "caveat")
        )
        caption += f" Published: {sources}, with its own recipe, whatever data and options were taken here; {caveats}."
    return Table(f"table1_{protocol}", caption, head, rows, records)


def above_atlas(results: Results, protocol: str, method: str, of_class: str) -> str:
    """How many test cases have a higher Dice than the atlas gives them, both averaged over seeds: `5 of 6`."""
    ours, atlas = (results.volumes(protocol, method, metric, of_class) for metric in ("dice", "atlas_dice"))
    return f"{sum(ours[case] > atlas[case] for case in ours)} of {len(ours)}"


def comparison_table(results: Results) -> Table:
    """Every pair of methods under every protocol: Dice per volume to print; all metrics and classes in the file."""
    rows, records = [], []
    for protocol in results.protocols:
        for place, (name, of_class) in enumerate(averages_of(results).items()):
            for metric in METRICS_SHOWN:
                values = {m: results.volumes(protocol, m, metric, of_class) for m in results.methods}
                for found in compare(values):
                    records.append({"protocol": protocol, "class": name, "metric": metric, **_flat(found)})
                    if metric == "dice" and not place:
                        rows.append([protocol, found.first, found.second, *_comparison_cells(found)])
    n = results.mean(results.protocols[0], results.methods[0], "dice").n
    caption = (
        f"Dice per volume{', mean over classes' if len(results.classes) > 1 else ''}, first − second: mean over {n} "
        f"test volumes, each first averaged over {_seeds(results)}; 95 % bootstrap interval; Wilcoxon signed-rank "
        "test, Holm's correction within a protocol; rank-biserial effect."
    )
    if n < FEWEST_FOR_INTERVALS:
        caption += f" Of fewer than {FEWEST_FOR_INTERVALS} cases an interval is little more than their own range."
    head = ["protocol", "first", "second", "difference", "95 % interval", "p", "p (Holm)", "effect"]
    return Table("comparisons", caption, head, rows, records)


def cost_table(results: Results) -> Table:
    """What each method costs, under the protocol of most training patients."""
    protocol = largest_protocol(results)
    rows, records = [], []
    for method in results.methods:
        cost = cost_of(results, protocol, method)
        records.append({"protocol": protocol, "method": method, **cost})
        peak = cost["peak_bytes"]
        rows.append(
            [
                method,
                _three_digits(cost["parameters"] / 1e6),
                _three_digits(cost["trained_parameters"] / 1e6),
                _three_digits(cost["multiply_adds"] / 1e9),
                _three_digits(cost["epoch_seconds"]),
                _three_digits(cost["epochs"]),
                _three_digits(cost["inference_seconds"]),
                _three_digits(cost["step_bytes"] / 1e9),
                "–" if peak is None else _three_digits(peak / 1e9),
                f"{cost['dice']:.3f}",
            ]
        )
    costs = [run.cost for method in results.methods for run in results.of(protocol, method)]
    timed = sorted({len(cost.inference_slices) for cost in costs})
    slices = sorted({count for cost in costs for count in cost.inference_slices})
    slices = f"{slices[0]} to {slices[-1]}" if len(slices) > 1 else str(slices[0])
    volumes = plural(timed[-1], "test volume") if len(timed) == 1 else f"{timed[0]} to {timed[-1]} test volumes"
    caption = (
        f"Cost under protocol {protocol} on {devices_of(results, protocol)}. Multiply-adds of one slice through the "
        f"whole network; time of an epoch with its validation, and epochs, mean over {_seeds(results)}; time of a "
        f"volume from the scan in memory to its mask, mean over {volumes} of {slices} slices in each run; memory "
        "of a training step by XLA's account, and the highest of the process in any run; Dice per volume"
        f"{', mean over classes' if len(results.classes) > 1 else ''}."
    )
    features = {method: results.of(protocol, method)[0].record.features for method in results.methods}
    if cached := [method for method, how in features.items() if how.startswith(FEATURES_KEPT)]:
        caption += (
            f" Epochs of {', '.join(cached)} read features that the frozen backbone had made of each slice before, "
            "once for all runs; the time of that is not in them, and is about that of inference for every slice."
        )
    head = [
        "method", "parameters, M", "trained, M", "multiply-adds, G", "s an epoch", "epochs", "s a volume",
        "step, GB", "peak, GB", "Dice",
    ]  # fmt: skip
    return Table("cost", caption, head, rows, records)


def cost_of(results: Results, protocol: str, method: str) -> dict[str, Any]:
    """Over the runs of all seeds: times and Dice are means, the peak is the highest; the rest is the same in all."""
    runs = results.of(protocol, method)
    first, peaks = runs[0].cost, [run.cost.peak_device_bytes or run.cost.peak_host_bytes for run in runs]
    return {
        "parameters": first.parameters,
        "trained_parameters": first.trained_parameters,
        "multiply_adds": first.multiply_adds,
        "step_bytes": first.step_bytes,
        "epoch_seconds": float(np.mean([line["seconds"] for run in runs for line in run.history])),
        "epochs": float(np.mean([len(run.history) for run in runs])),
        "inference_seconds": float(np.mean([seconds for run in runs for seconds in run.cost.inference_seconds])),
        "peak_bytes": None if None in peaks else max(peaks),
        "dice": results.mean(protocol, method, "dice").mean,
    }


def devices_of(results: Results, protocol: str) -> str:
    """What a protocol's runs were made on; says so where that was not the same for all."""
    found: dict[str, list[str]] = {}
    for method in results.methods:
        for run in results.of(protocol, method):
            for environment in (run.record.environment, *(again["environment"] for again in run.record.resumed)):
                names = found.setdefault(describe_device(environment), [])
                names += [method] * (method not in names)
    if len(found) == 1:
        return next(iter(found))
    each = "; ".join(f"{', '.join(methods)}: {device}" for device, methods in found.items())
    return f"different devices, so that times and memory cannot be compared ({each})"


def largest_protocol(results: Results) -> str:
    """That of most training patients; of several, one that asks for all of them."""

    def size(protocol: str) -> tuple[int, bool]:
        run = results.of(protocol, results.methods[0])[0]
        data = run.record.experiment.data
        return len(run.split["train"]), not data.train_patients and data.train_percent == 100

    return max(results.protocols, key=size)


def dice_iou_pairs(results: Results, published: Mapping[tuple[str, str], Published]) -> list[Pair]:
    """Every mean Dice and mean IoU that stand side by side in the tables."""
    pairs, averages = [], averages_of(results)
    for protocol in results.protocols:
        for method in [*results.methods, ATLAS]:
            for unit, (name, of_class) in product(UNITS, averages.items()):
                dice, iou = (_mean_of(results, protocol, method, metric, unit, of_class) for metric in ("dice", "iou"))
                if dice and iou:
                    what = f"{name}, " if len(averages) > 1 else ""
                    pairs.append(Pair(f"{protocol}, {method}, {what}per {unit}", dice.mean, iou.mean))
            found = published.get((method, protocol)) if len(averages) == 1 else None
            if found and found.iou is not None:
                pairs.append(Pair(f"{protocol}, {method}, published", found.dice / 100, found.iou / 100))
    return pairs


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Each as `<name>.csv`, `.md` and `.tex`."""
    for table in tables:
        with (folder / f"{table.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table.records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table.records)
        aligned = ["left"] + ["right"] * (len(table.head) - 1)
        plain = tabulate(table.rows, table.head, "pipe", colalign=aligned, disable_numparse=True)
        (folder / f"{table.name}.md").write_text(f"{plain}\n\n{table.caption}\n", encoding="utf-8")
        latex = tabulate(table.rows, table.head, "latex_booktabs", colalign=aligned, disable_numparse=True)
        caption = table.caption.translate(LATEX_ESCAPES)
        text = f"\\begin{{table}}\n\\caption{{{caption}}}\n{latex}\n\\end{{table}}\n"
        (folder / f"{table.name}.tex").write_text(text.translate(LATEX_SIGNS), encoding="utf-8")


def mean_sd(mean: Mean | None, metric: str) -> str:
    """`0.855 ± 0.046`; a dash where there is no value."""
    if mean is None:
        return "–"
    sd = "" if mean.sd is None else f" ± {mean.sd:.{COLUMNS[metric].digits}f}"
    return f"{mean.mean:.{COLUMNS[metric].digits}f}{sd}"


def _mean_of(results: Results, protocol: str, method: str, metric: str, unit: str, of_class: str) -> Mean | None:
    if method != ATLAS:
        return results.mean(protocol, method, metric, unit, of_class)
    if unit == "slice" or metric not in ("dice", "iou"):
        return None
    return results.mean(protocol, results.methods[0], f"atlas_{metric}", unit, of_class)


def _record(
    protocol: str, method: str, name: str, metric: str, mean: Mean, published: Published | None
) -> dict[str, Any]:
    low, high = mean.interval or (None, None)
    of_paper = {"dice": ("dice", "dice_sd"), "iou": ("iou", "iou_sd")}.get(metric)
    printed = [None if not published or not of_paper else getattr(published, name) for name in of_paper or ("", "")]
    return {
        "protocol": protocol,
        "method": method,
        "class": name,
        "metric": metric,
        "unit": mean.unit,
        "mean": mean.mean,
        "sd": mean.sd,
        "n": mean.n,
        "ci95_low": low,
        "ci95_high": high,
        "sd_over_seeds": mean.sd_over_seeds,
        "published_mean": None if printed[0] is None else printed[0] / 100,
        "published_sd": None if printed[1] is None else printed[1] / 100,
    }


def _published_cells(published: Published | None) -> list[str]:
    if published is None:
        return ["–", "–"]
    cells = []
    for mean, sd in ((published.dice, published.dice_sd), (published.iou, published.iou_sd)):
        if mean is None:
            cells.append("–")
        else:
            cells.append(f"{mean / 100:.3f}" + ("" if sd is None else f" ± {sd / 100:.3f}"))
    return cells


def _comparison_cells(found: Comparison) -> list[str]:
    interval = "–" if found.interval is None else " to ".join(_signed(end) for end in found.interval)
    return [_signed(found.difference), interval, f"{found.p:.2g}", f"{found.p_holm:.2g}", _signed(found.effect, 2)]


def _flat(found: Comparison) -> dict[str, Any]:
    values = dict(vars(found))
    low, high = values.pop("interval") or (None, None)
    return values | {"ci95_low": low, "ci95_high": high}


def _signed(value: float, places: int = 3) -> str:
    return f"{value:+.{places}f}".replace("-", "−")


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _seeds(results: Results) -> str:
    return plural(len(results.seeds), "seed")
