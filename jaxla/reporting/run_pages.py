"""The page and the overlays of a run, written from its folder: after its test, or again later."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxla.cli.csv_files import read_csv
from jaxla.cli.json_files import describe_damage, read_json
from jaxla.config import InputError, unread_options
from jaxla.data.cache import mark_cache_in_use
from jaxla.data.cases import Case, Dataset
from jaxla.data.dataset import find_dataset
from jaxla.data.labels import Labels
from jaxla.data.prepared import PreparedVolume, content_key, prepare_cases
from jaxla.data.split import ALL_FOLDS, PARTS
from jaxla.evaluation.summary import Row, case_means, worst_median_best
from jaxla.reporting.overlays import draw_overlays
from jaxla.reporting.run_report import select_panels, write_report
from jaxla.runs import folder as files
from jaxla.runs.cost import Cost
from jaxla.runs.record import read_record, read_record_json
from jaxla.runs.trained import largest_groups

TEXT_COLUMNS = ("case", "class")  # columns of cases.csv with text; all others hold numbers


def write_reports(
    folder: Path,
    volumes: Mapping[str, PreparedVolume],
    rows: list[Row],
    summary: Mapping[str, Any],
    cost: Mapping[str, Any],
) -> None:
    """Write overlays.png and report.html, which marks the run as finished.

    Args:
        volumes: by case id; at least those of the worst, the median and the best test case.
        rows, summary, cost: the content of `test/cases.csv`, `test/summary.json` and `cost.json`.
    """
    record = read_record(folder)
    experiment = record.experiment
    names = record.labels.names
    is_single = experiment.fold != ALL_FOLDS
    panels = select_panels(volumes, rows, folder / files.PREDICTIONS)
    if panels:
        draw_overlays(panels, folder / files.OVERLAYS)
    largest = None
    if experiment.method.postprocessing.largest != "never":
        largest = [[names[k - 1] for k in group] for group in largest_groups(folder, record)]
    split = files.read_split_file(folder)
    write_report(
        folder / files.REPORT,
        record=read_record_json(folder),
        split={part: list(map(str, split.get(part, ()))) for part in PARTS},
        history=files.read_metrics(folder) if is_single else [],
        rows=rows,
        summary=summary,
        cost=cost,
        panels=panels,
        unread=unread_options(experiment),
        folds=() if is_single else [files.summarise_fold(fold) for fold in files.fold_folders(folder)],
        largest=largest,
    )


def rebuild_reports(folder: Path, cache_dir: Path, data_root: str = "") -> Path:
    """Rewrite the report of a tested run, and return the path of its page.

    Args:
        data_root: folder of the scans, if they have moved.

    Raises:
        InputError: the run was not tested or is still running, one of its files is damaged, or its scans have changed.
    """
    record = read_record(folder)
    if files.is_running(folder):
        raise InputError(folder, "another process is training in this folder", "Wait until it has finished.")
    if not (folder / files.COST).exists():  # the last file before the report
        command = files.resume_command(record.command, folder)
        raise InputError(folder, "this run has not been tested", f"Finish it: {command}")
    try:
        rows = _read_rows(folder / files.TEST_CASES) if (folder / files.TEST_CASES).exists() else []
        summary = files.read_summary(folder)
        cost = asdict(read_json(folder / files.COST, Cost))
        hashes = read_json(folder / files.CASES, dict[str, str])
        shown = list(worst_median_best(case_means(rows, "dice"))) if rows else []
        with mark_cache_in_use(cache_dir):
            volumes = []
            if shown:  # a run without test cases shows no scans
                dataset = find_dataset(record.experiment.data, cache_dir, data_root)
                cases = select_unchanged(dataset, shown, record.labels, hashes)
                volumes = prepare_cases(replace(dataset, cases=tuple(cases.values()), labels=record.labels), cache_dir)
            write_reports(folder, {volume.id: volume for volume in volumes}, rows, summary, cost)
    except OSError as error:
        raise InputError(error.filename, f"cannot be read ({error.strerror})", "Restore it from a backup.") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        problem = f"damaged: {describe_damage(error)}"
        raise InputError(folder, problem, "Restore its files from a backup.") from error
    return folder / files.REPORT


def select_unchanged(
    dataset: Dataset, ids: Iterable[str], labels: Labels, hashes: Mapping[str, str]
) -> dict[str, Case]:
    """Return case id -> case; raise an InputError if one is missing or differs from its hash at training."""
    cases = {case.id: case for case in dataset.cases}
    selected = {}
    for case_id in ids:
        if case_id not in cases:
            raise InputError(dataset.root, f"case {case_id} is missing", "Pass the folder of the scans as --data.root.")
        if content_key(cases[case_id], labels) != hashes[case_id]:
            problem = f"the scan or mask of case {case_id} has changed since training"
            raise InputError(dataset.root, problem, "Pass the folder of the original files as --data.root.")
        selected[case_id] = cases[case_id]
    return selected


def _read_rows(path: Path) -> list[Row]:
    """Read `cases.csv`; an empty cell becomes None."""
    return [{name: _read_cell(name, text) for name, text in row.items()} for row in read_csv(path)]


def _read_cell(column: str, text: str) -> str | float | None:
    return text if column in TEXT_COLUMNS else float(text) if text else None
