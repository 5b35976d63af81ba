"""The results of a study, read from its runs' folders: values of every unit, averaged over seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        rows: of `test/cases.csv`.
        slices: metric -> its value in every slice of every test case, averaged over classes.
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
    rows: list[Row]
    slices: dict[str, np.ndarray]

    def volumes(self, metric: str) -> dict[str, float]:
        """Case -> its value, averaged over classes; with a metric `atlas_…` that of the atlas."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            values.setdefault(row["case"], []).append(row[metric])
        return {case: float(np.mean(of_classes)) for case, of_classes in sorted(values.items())}

    def values(self, metric: str, unit: Unit) -> np.ndarray:
        """The values of all units, in the same order in all runs."""
        return np.array(list(self.volumes(metric).values())) if unit == "volume" else self.slices[metric]

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

    def volumes(self, protocol: str, method: str, metric: str) -> dict[str, float]:
        """Case -> its value, averaged over classes and seeds."""
        of_seeds = [run.volumes(metric) for run in self.of(protocol, method)]
        return {case: float(np.mean([values[case] for values in of_seeds])) for case in of_seeds[0]}

    def mean(self, protocol: str, method: str, metric: str, unit: Unit = "volume") -> Mean:
        of_seeds = np.array([run.values(metric, unit) for run in self.of(protocol, method)])
        values, seeds = of_seeds.mean(axis=0), of_seeds.mean(axis=1)
        return Mean(
            mean=float(values.mean()),
            sd=float(values.std(ddof=1)) if len(values) > 1 else None,
            n=len(values),
            unit=unit,
            interval=mean_interval(values) if unit == "volume" else None,
            sd_over_seeds=float(seeds.std(ddof=1)) if len(seeds) > 1 else None,
        )


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
            rows=list(_rows(folder / "test" / "cases.csv")),
            slices=_slices(folder / "test" / "slices.csv"),
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
    require_same_cases({str(run.folder): run.volumes("dice") for run in runs})
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


def _rows(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {key: value if key in WORDS else float(value) for key, value in row.items()}


def _slices(path: Path) -> dict[str, np.ndarray]:
    """Only what is shown of every slice, for a study has many."""
    values: dict[tuple[str, int], list[list[float]]] = {}
    for row in _rows(path):
        values.setdefault((row["case"], int(row["slice"])), []).append([row[metric] for metric in METRICS_SHOWN])
    of_slices = np.array([np.mean(values[place], axis=0) for place in sorted(values)])
    return dict(zip(METRICS_SHOWN, of_slices.T, strict=True))
