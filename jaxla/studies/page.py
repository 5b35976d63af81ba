"""The report of a study: tables and figures as files, and one HTML page with all of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jaxla.config import Experiment, InputError, lookup
from jaxla.data.cases import Case, Dataset
from jaxla.data.dataset import find_dataset
from jaxla.data.labels import Labels
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.volumes import read_image, read_mask
from jaxla.evaluation import statistics
from jaxla.evaluation.metrics import COLUMNS
from jaxla.evaluation.summary import worst_median_best
from jaxla.experiments import EXPERIMENTS, METHODS, PUBLISHED
from jaxla.reporting.overlays import Panel
from jaxla.reporting.page import data_uri, link, write_page
from jaxla.reporting.run_pages import select_unchanged
from jaxla.runs.folder import PREDICTIONS, REPORT
from jaxla.runs.record import differences, format_value
from jaxla.studies import RUNS
from jaxla.studies.figures import draw_figures
from jaxla.studies.results import Results, StudyRun, read_study
from jaxla.studies.tables import (
    PublishedRows,
    comparison_table,
    cost_table,
    dice_iou_pairs,
    results_table,
    write_tables,
)

PAGE = "report.html"
PUBLISHED_LAYOUT = "LAScarQS"  # layout of the data set that the published results belong to
# Names and suffixes of the files that a report may write
FILE_NAMES = {"comparisons", "cost", "figure2", "figure3", "agreement"} | {f"table1_{name}" for name in EXPERIMENTS}
SUFFIXES = {".csv", ".md", ".tex", ".pdf", ".png"}


def report_study(folder: Path, cache_dir: Path, data_root: str = "", case_ids: Sequence[str] = ()) -> Path:
    """Write the report of a study whose runs are complete, and return the path of its page.

    Removes tables and figures of an earlier report that are not part of this one.

    Args:
        data_root: folder of the scans, if they have moved.
        case_ids: cases to show in Figure 3; by default the worst, the median and the best.

    Raises:
        InputError: the study is incomplete, its scans are missing, or the report cannot be written.
    """
    results = read_study(folder)
    runs = [results.select(results.largest_protocol, method)[0] for method in results.methods]
    changed = {run.method: options for run in runs if (options := changed_options(run.record.experiment))}
    case_note = "" if case_ids else "Worst, median and best: by Dice averaged over methods and seeds."
    titles = {case_id: case_id for case_id in case_ids} or rank_cases(results)
    protocol = runs[0].record.experiment.data
    dataset = find_dataset(protocol, cache_dir, data_root)
    cases = read_cases(titles, runs, results.test_cases, dataset)
    has_published_data = dataset.layout == PUBLISHED_LAYOUT and protocol.root != "phantom"
    try:
        return _write_report(folder, results, cases, case_note, changed, PUBLISHED if has_published_data else {})
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise InputError(error.filename or folder, problem, "Fix this and write the report again.") from error


def _write_report(
    folder: Path,
    results: Results,
    cases: Mapping[str, Sequence[Panel]],
    case_note: str,
    changed: Mapping[str, str],
    published: PublishedRows,
) -> Path:
    result_tables = [results_table(results, protocol, published) for protocol in results.protocols]
    comparisons = [comparison_table(results)] if len(results.methods) > 1 else []
    costs = cost_table(results)
    tables = [*result_tables, *comparisons, costs]
    _prepare_folder(folder / "tables", {table.name for table in tables})
    write_tables(tables, folder / "tables")

    figures = {figure.name: figure for figure in draw_figures(results, cases, case_note, list(METHODS))}
    _prepare_folder(folder / "figures", figures)
    for name, (_, figure, *_) in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=200)
        figure.savefig(folder / "figures" / f"{name}.pdf", metadata={"CreationDate": None})  # same study, same bytes

    first = results.runs[0]
    definitions = {COLUMNS[name].title: text for name, text in first.summary["definitions"].items()}
    write_page(
        folder / PAGE,
        "study_page.html.jinja",
        results=results,
        first=first,
        changed_options=changed,
        weights={m: results.select(results.protocols[0], m)[0].record.weights for m in results.methods},
        pairs=dice_iou_pairs(result_tables),
        result_tables=result_tables,
        comparisons=comparisons,
        costs=costs,
        runs=[(link_run(r.folder), len(r.split["train"]), len(r.history), r.record.split_sha256) for r in results.runs],
        figures={name: {**drawn._asdict(), "uri": data_uri(drawn.figure)} for name, drawn in figures.items()},
        least_p=statistics.least_p(len(results.test_cases)),
        definitions=definitions | {"Empty masks": first.summary["empty_rule"]} | statistics.DEFINITIONS,
    )
    return folder / PAGE


def link_run(folder: Path) -> str:
    """Return a link from the study's page to the report of one of its runs."""
    return link(folder.name, f"{RUNS}/{folder.name}/{REPORT}")


def _prepare_folder(folder: Path, names: Collection[str]) -> None:
    """Create a folder, or remove the files of a report from it whose names are not in `names`."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.stem in FILE_NAMES.difference(names) and path.suffix in SUFFIXES:
            path.unlink()


def changed_options(experiment: Experiment) -> str:
    """Return the options in which a run's method differs from the table of methods, as on a command line."""
    preset = replace(experiment, method=lookup("--method", experiment.method.name, METHODS))
    return " ".join(f"--{option}={format_value(value)}" for option, value, _ in differences(experiment, preset))


def rank_cases(results: Results) -> dict[str, str]:
    """Return case id -> title for the worst, median and best case by Dice summed over methods."""
    by_method = [results.case_means(results.largest_protocol, method, "dice") for method in results.methods]
    ranks = worst_median_best({case: sum(dice[case] for dice in by_method) for case in results.test_cases})
    return {case: f"{rank}\n{case}" for case, rank in ranks.items()}


def read_cases(
    titles: Mapping[str, str], runs: Sequence[StudyRun], test_cases: Sequence[str], dataset: Dataset
) -> dict[str, list[Panel]]:
    """Return title -> a panel for each run, for test cases (case id -> title); refuse changed scans and masks."""
    for case_id in titles:
        if case_id not in test_cases:
            fix = f"Choose from {', '.join(test_cases)}."
            raise InputError(f"--cases={case_id}", "not a test case of this study", fix)
    labels = runs[0].record.labels
    cases = select_unchanged(dataset, titles, labels, runs[0].case_hashes)
    return {title: read_panels(runs, cases[case_id], labels) for case_id, title in titles.items()}


def read_panels(runs: Sequence[StudyRun], case: Case, labels: Labels) -> list[Panel]:
    """Return a panel with each run's segmentation of a case. All panels share the same image and reference."""
    image, mask = read_image(case.image), read_mask(case.mask)
    geometry = slice_geometry(image.affine)
    slices, reference = (to_slices(a, geometry) for a in (image.array, labels.to_classes(mask.array, case.mask)))
    panels = []
    for run in runs:
        path = run.folder / PREDICTIONS / f"{case.id}.nii.gz"
        prediction = to_slices(labels.to_classes(read_mask(path).array, path), geometry)
        if prediction.shape != reference.shape:
            problem = f"shape {prediction.shape} differs from the scan's {reference.shape}"
            raise InputError(path, problem, f"Move the folder {run.folder} away and rerun the study.")
        title = f"Dice {run.case_values('dice')[case.id]:.3f}"
        panels.append(Panel(title, slices, prediction, reference, geometry.spacing))
    return panels
