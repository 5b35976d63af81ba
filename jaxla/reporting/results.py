"""The results of a study, read from its runs' folders: values of every unit, averaged over seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxla.config import InputError
from jaxla.evaluation.statistics import mean_interval, require_same_cases
from jaxla.training.run_folder import CASES, COST, METRICS, RECORD, SPLIT, is_finished, read_record

STUDY = "study.json"
RUNS = "runs"  # folder of the runs' folders
METRICS_SHOWN = ("dice", "iou", "hd95_mm", "assd_mm")
WORDS = ("case", "slice", "class")  # columns of a run's tables that are no numbers

Unit = Literal["volume", "slice"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """One complete run.

    Attributes:
        protocol: name of the experiment whose protocol it ran.
        method: as the run calls it; beside the method's name an architecture that is not its own.
        record, split, summary, cost: the content of its JSON files.
        history: the lines of `metrics.jsonl`.
    """

    folder: Path
    protocol: str
    method: str
    seed: int
    record: dict[str, Any]
    split: dict[str, list[str]]
    summary: dict[str, Any]
    cost: dict[str, Any]
    history: list[dict[str, float]]

    def rows_of(self, unit: Unit) -> list[Row]:
        """Of `test/cases.csv` or `test/slices.csv`."""
        return self.rows if unit == "volume" else self.slice_rows

    @cached_property
    def rows(self) -> list[Row]:
        return _read_rows(self.folder / "test" / "cases.csv")

    @cached_property
    def slice_rows(self) -> list[Row]:
        return _read_rows(self.folder / "test" / "slices.csv")

    @property
    def prediction_folder(self) -> Path:
        return self.folder / "test" / "predictions"


@dataclass(frozen=True)
class Mean:
    """Over units, each averaged over seeds before.

    Attributes:
        sd: sample standard deviation over units; None for a single one.
        interval: 95 % bootstrap interval of the mean over cases; None for a single one, and for slices, which are not
            independent of each other.
        sd_over_seeds: of the means of each seed; None for a single seed.
    """

    mean: float
    sd: float | None
    n: int
    unit: Unit
    interval: tuple[float, float] | None
    sd_over_seeds: float | None


@dataclass(frozen=True)
class Results:
    """All runs of a study, complete and comparable: of the same scans, tested on the same cases."""

    name: str
    summary: str
    command: str
    runs: tuple[StudyRun, ...]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(run.protocol for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def classes(self) -> list[str]:
        return list(self.runs[0].summary["classes"])

    def of(self, protocol: str, method: str) -> list[StudyRun]:
        """A run for each seed."""
        return [run for run in self.runs if (run.protocol, run.method) == (protocol, method)]

    def values(self, protocol: str, method: str, metric: str, unit: Unit = "volume") -> dict[str, float]:
        """Unit -> its value, averaged over classes and seeds; with a metric `atlas_…` those of the atlas."""
        of_seeds = [unit_values(run.rows_of(unit), metric) for run in self.of(protocol, method)]
        return {name: float(np.mean([values[name] for values in of_seeds])) for name in of_seeds[0]}

    def mean(self, protocol: str, method: str, metric: str, unit: Unit = "volume") -> Mean:
        values = list(self.values(protocol, method, metric, unit).values())
        of_seeds = [
            float(np.mean(list(unit_values(run.rows_of(unit), metric).values()))) for run in self.of(protocol, method)
        ]
        return Mean(
            mean=float(np.mean(values)),
            sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            n=len(values),
            unit=unit,
            interval=mean_interval(values) if unit == "volume" else None,
            sd_over_seeds=float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else None,
        )


def unit_values(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """Unit -> its value, averaged over classes."""
    values: dict[str, list[float]] = {}
    for row in rows:
        name = f"{row['case']}, slice {row['slice']}" if "slice" in row else row["case"]
        values.setdefault(name, []).append(row[metric])
    return {name: float(np.mean(of_classes)) for name, of_classes in values.items()}


def read_study(folder: Path) -> Results:
    """The results of a study whose runs are all complete.

    Raises:
        InputError: not a study's folder; a run is missing, incomplete, damaged or made by another version of this
            package; or the runs are not of the same scans and test cases.
    """
    try:
        content = json.loads((folder / STUDY).read_text())
        planned = [(folder / RUNS / run["folder"], run["protocol"], run["seed"]) for run in content["runs"]]
        name, summary, command = (content[key] for key in ("name", "summary", "command"))
    except OSError as error:
        raise InputError(
            f"--study={folder}: not a study's folder (no {STUDY}); give the --output of python -m jaxla.study"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STUDY}: damaged ({error!r}); start the study again, complete runs stay") from error
    runs = []
    for run_dir, protocol, seed in planned:
        if not run_dir.exists():
            raise InputError(f"{run_dir}: this run of the study has not begun; go on with: {command}")
        read_record(run_dir)  # says what is wrong with it
        if not is_finished(run_dir):
            raise InputError(f"{run_dir}: this run of the study is incomplete; go on with: {command}")
        runs.append(_read_run(run_dir, protocol, seed))
    _require_comparable(runs)
    return Results(name, summary, command, tuple(runs))


def _read_run(folder: Path, protocol: str, seed: int) -> StudyRun:
    try:
        record = json.loads((folder / RECORD).read_text())
        return StudyRun(
            folder=folder,
            protocol=protocol,
            method=record["experiment"]["method"],
            seed=seed,
            record=record,
            split=json.loads((folder / SPLIT).read_text()),
            summary=json.loads((folder / "test" / "summary.json").read_text()),
            cost=json.loads((folder / COST).read_text()),
            history=[json.loads(line) for line in (folder / METRICS).read_text().splitlines()],
        )
    except OSError as error:
        raise InputError(
            f"{error.filename}: missing or unreadable ({error.strerror}), and the report needs it; move {folder} away "
            "and run the study again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: damaged ({error!r}); move it away and run the study again") from error


def _require_comparable(runs: Sequence[StudyRun]) -> None:
    first = runs[0]
    require_same_cases({str(run.folder): unit_values(run.rows, "dice") for run in runs})
    for run in runs[1:]:
        for what, of_run, of_first in (
            ("versions of jaxla", *(r.record["environment"]["versions"]["jaxla"] for r in (run, first))),
            ("scans and masks", *((r.folder / CASES).read_text() for r in (run, first))),
            ("validation patients", *(r.split["val"] for r in (run, first))),
        ):
            if of_run != of_first:
                raise InputError(
                    f"{run.folder} and {first.folder} cannot be compared, for their {what} differ; move one of them "
                    "away and run the study again"
                )


def _read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: value if key in WORDS else float(value) if value else None for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
