"""The results of a study, read from its runs' folders: values of every unit, averaged over seeds."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxla.config import InputError
from jaxla.evaluation.statistics import mean_interval, require_same_cases
from jaxla.evaluation.summary import case_means
from jaxla.runs.cost import Cost
from jaxla.runs.folder import (
    CASES,
    COST,
    METRICS,
    PREDICTIONS,
    RUNS,
    SPLIT,
    STUDY,
    SUMMARY,
    TEST_CASES,
    TEST_SLICES,
    is_finished,
    read_metrics,
)
from jaxla.runs.record import Record, differences, method_label, read_record, shown

log = logging.getLogger(__name__)

METRICS_SHOWN = ("dice", "iou", "hd95_mm", "assd_mm")
WORDS = ("case", "slice", "class")  # columns of a run's tables that are no numbers
OF_VOLUMES = ("case", "class", *METRICS_SHOWN, "atlas_dice", "atlas_iou", "volume_ml", "reference_volume_ml")
OF_SLICES = (*WORDS, *METRICS_SHOWN)
# in what runs of one method may differ: the protocol, and what a seed decides
OF_PROTOCOL = {"exp", "data.train_patients", "data.train_percent"}
OF_SEED = {"seed", "data.subset_seed"}

Unit = Literal["volume", "slice"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """One complete run.

    Attributes:
        record: what was run.
        split, summary: the content of these JSON files.
        cases: id of each case, and a hash of its scan and mask.
        history: the lines of `metrics.jsonl`.
        rows: of `test/cases.csv`: one for each test case and class, in order of their ids.
        slices: metric -> its value in every slice of every test case, [slices, classes], in order of the cases' ids.
    """

    folder: Path
    record: Record
    split: dict[str, list[str]]
    cases: dict[str, str]
    summary: dict[str, Any]
    cost: Cost
    history: list[dict[str, float]]
    rows: list[Row]
    slices: dict[str, np.ndarray]

    @property
    def protocol(self) -> str:
        """Name of the experiment whose protocol it ran."""
        return self.record.experiment.name

    @property
    def method(self) -> str:
        """Its name, and beside it an architecture that is not its own."""
        return method_label(self.record.experiment)

    @property
    def seed(self) -> int:
        return self.record.experiment.seed

    def volumes(self, metric: str, of_class: str = "") -> dict[str, float]:
        """Case -> its value, of one class or averaged over all; with a metric `atlas_…` that of the atlas."""
        return case_means((row for row in self.rows if of_class in ("", row["class"])), metric)

    def values(self, metric: str, unit: Unit, of_class: str = "") -> np.ndarray:
        """The values of all units, in the same order in all runs."""
        if unit == "volume":
            return np.array(list(self.volumes(metric, of_class).values()))
        classes = list(self.summary["classes"])
        of_classes = self.slices[metric]
        return of_classes[:, classes.index(of_class)] if of_class else of_classes.mean(axis=1)

    @property
    def prediction_folder(self) -> Path:
        return self.folder / PREDICTIONS


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

    def volumes(self, protocol: str, method: str, metric: str, of_class: str = "") -> dict[str, float]:
        """Case -> its value, averaged over seeds; of one class or averaged over all."""
        of_seeds = [run.volumes(metric, of_class) for run in self.of(protocol, method)]
        return {case: float(np.mean([values[case] for values in of_seeds])) for case in of_seeds[0]}

    def mean(self, protocol: str, method: str, metric: str, unit: Unit = "volume", of_class: str = "") -> Mean:
        """Of one class, or of the mean over classes within each unit."""
        of_seeds = np.array([run.values(metric, unit, of_class) for run in self.of(protocol, method)])
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
        InputError: not a study's folder; a run is missing, incomplete, damaged, not the one that was planned or made by
            another version of this package; or the runs cannot be compared.
    """
    try:
        content = json.loads((folder / STUDY).read_text())
        planned = [
            (folder / RUNS / run["folder"], run["protocol"], run["method"], int(run["seed"])) for run in content["runs"]
        ]
        name, summary, command = (content[key] for key in ("name", "summary", "command"))
        protocols, methods, seeds = (set(of) for of in list(zip(*planned, strict=True))[1:])
        if sorted(run[1:] for run in planned) != sorted(product(protocols, methods, seeds)):
            raise ValueError("expected a run for each protocol, method and seed")
    except OSError as error:
        raise InputError(
            f"--study={folder}: not a study's folder (no {STUDY}); give the --output of python -m jaxla.study"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STUDY}: damaged ({error!r}); start the study again, complete runs stay") from error
    runs = []
    for run_dir, protocol, method, seed in planned:
        if not run_dir.exists():
            raise InputError(f"{run_dir}: this run of the study has not begun; go on with: {command}")
        record = read_record(run_dir)
        if not is_finished(run_dir):
            raise InputError(f"{run_dir}: this run of the study is incomplete; go on with: {command}")
        _require_planned(run_dir, record, protocol, method, seed)
        runs.append(_read_run(run_dir, record))
    _require_comparable(runs)
    others = {path.name for path in (folder / RUNS).iterdir() if path.is_dir()} - {run[0].name for run in planned}
    if others:
        log.warning("not in the report, for the plan does not name them: %s", ", ".join(sorted(others)))
    return Results(name, summary, command, tuple(runs))


def _read_run(folder: Path, record: Record) -> StudyRun:
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        classes, of_slices = list(summary["classes"]), summary["slice"]["dice"]["n"]
        for key in ("definitions", "empty_rule"):
            summary[key]
        split = json.loads((folder / SPLIT).read_text())
        split = {part: list(map(str, split[part])) for part in ("train", "val", "test")}
        cases = dict(json.loads((folder / CASES).read_text()))
        if missing := set(split["test"]) - set(cases):
            raise KeyError(f"{CASES}: {min(missing)}")
        history = read_metrics(folder)
        if not history or any(float(line["seconds"]) < 0 for line in history):
            raise ValueError(f"{METRICS}: no epoch, or one of less than no time")
        return StudyRun(
            folder=folder,
            record=record,
            split=split,
            cases=cases,
            summary=summary,
            cost=Cost(**json.loads((folder / COST).read_text())),
            history=history,
            rows=_volumes(folder / TEST_CASES, split["test"], classes),
            slices=_slices(folder / TEST_SLICES, split["test"], classes, of_slices),
        )
    except OSError as error:
        raise InputError(
            f"{error.filename}: missing or unreadable ({error.strerror}), and the report needs it; move {folder} away "
            "and run the study again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: damaged ({error!r}); move it away and run the study again") from error


def _require_planned(folder: Path, record: Record, protocol: str, method: str, seed: int) -> None:
    """Raise an InputError where another run lies in the folder of a planned one."""
    found = record.experiment
    for option, planned, of_run in (
        ("exp", protocol, found.name),
        ("method", method, found.method),
        ("seed", seed, found.seed),
        ("data.subset_seed", seed, found.data.subset_seed),
    ):
        if of_run != planned:
            raise InputError(
                f"{folder}: holds another run than planned, with --{option}={of_run} and not {planned}; move it away "
                "and run the study again"
            )


def _require_comparable(runs: Sequence[StudyRun]) -> None:
    """Raise an InputError, which names two runs, unless they differ in method, protocol and seed alone."""
    require_same_cases({str(run.folder): run.volumes("dice") for run in runs})
    for run in runs[1:]:
        for what, of_run, of_first in (
            ("versions of jaxla", *(r.record.environment["versions"]["jaxla"] for r in (run, runs[0]))),
            ("scans and masks", *(r.cases for r in (run, runs[0]))),
            ("classes", *(list(r.summary["classes"]) for r in (run, runs[0]))),
            ("validation patients", *(r.split["val"] for r in (run, runs[0]))),
            ("numbers of slices", *(len(r.slices["dice"]) for r in (run, runs[0]))),
        ):
            if of_run != of_first:
                raise _incomparable(run, runs[0], what)
    of_methods, of_protocols, of_subsets = {}, {}, {}
    for run in runs:
        first = of_methods.setdefault(run.method, run)
        for option, here, there in differences(run.record.experiment, first.record.experiment):
            if option not in OF_PROTOCOL | OF_SEED:
                raise _incomparable(run, first, f"--{option} ({shown(here)} and {shown(there)})")
        # random ones follow the seed
        weights = {"random" if r.record.weights == "random" else r.record.weights_sha256 for r in (run, first)}
        if len(weights) > 1:
            raise _incomparable(run, first, "weights")
        first = of_protocols.setdefault(run.protocol, run)
        for option, here, there in differences(run.record.experiment.data, first.record.experiment.data, "data."):
            if option not in OF_SEED:
                raise _incomparable(run, first, f"--{option} ({shown(here)} and {shown(there)})")
        first = of_subsets.setdefault((run.protocol, run.seed), run)
        if run.split["train"] != first.split["train"]:
            raise _incomparable(run, first, "training patients")


def _incomparable(run: StudyRun, other: StudyRun, what: str) -> InputError:
    return InputError(
        f"{run.folder} and {other.folder} cannot be compared, for their {what} differ; move one of them away and run "
        "the study again"
    )


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {key: row[key] if key in WORDS else float(row[key]) for key in columns}
            if bad := [key for key, value in values.items() if key not in WORDS and not np.isfinite(value)]:
                raise ValueError(f"{path.name}: {bad[0]} of {row['case']} is {row[bad[0]]}")
            yield values


def _volumes(path: Path, cases: Sequence[str], classes: Sequence[str]) -> list[Row]:
    """A row for each case and class, in order of the cases' ids and of the classes."""
    rows = list(_rows(path, OF_VOLUMES))
    found = {(row["case"], row["class"]): row for row in rows}
    expected = list(product(sorted(cases), classes))
    if len(found) != len(rows) or set(found) != set(expected):
        raise ValueError(f"{path.name}: expected a row for each of {len(cases)} test cases and {len(classes)} classes")
    return [found[key] for key in expected]


def _slices(path: Path, cases: Sequence[str], classes: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """Only what is shown of every slice, for a study has many."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in _rows(path, OF_SLICES):
        place = row["case"], int(row["slice"])
        found.setdefault(place, {})[row["class"]] = [row[metric] for metric in METRICS_SHOWN]
    whole = all(set(of_slice) == set(classes) for of_slice in found.values())
    if len(found) != count or not whole or {case for case, _ in found} != set(cases):
        raise ValueError(f"{path.name}: expected a row for each of {count} slices and {len(classes)} classes")
    of_slices = np.array([[found[place][name] for name in classes] for place in sorted(found)])
    return dict(zip(METRICS_SHOWN, np.moveaxis(of_slices, 2, 0), strict=True))
