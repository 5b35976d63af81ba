"""The results of a study, read from the folders of its runs: the values of every test volume and slice."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from jaxla.cli.csv_files import read_csv
from jaxla.cli.json_files import describe_damage, read_json
from jaxla.config import InputError, option_values
from jaxla.data.split import SplitFile
from jaxla.evaluation.metrics import COLUMNS
from jaxla.evaluation.statistics import mean_interval, require_same_cases
from jaxla.runs import folder as run_files
from jaxla.runs.cost import Cost
from jaxla.runs.record import Record, comparable_options, read_record
from jaxla.studies import RUNS, STUDY

log = logging.getLogger(__name__)

REPORTED_METRICS = ("dice", "iou", "hd95_mm", "assd_mm")
VOLUME_METRICS = (*REPORTED_METRICS, "atlas_dice", "atlas_iou", "volume_ml", "reference_volume_ml")
# Runs of one method may differ in the options of the protocol, and in those that a seed sets.
PROTOCOL_OPTIONS = {"--exp", "--data.train_patients", "--data.train_percent"}
SEED_OPTIONS = {"--seed", "--data.subset_seed"}
SUMMARY_TOLERANCE = 1e-9  # largest difference between means in a table and in its summary, from rounding

Unit = Literal["volume", "slice"]


@dataclass(frozen=True)
class StudyRun:
    """One complete run. Units of `values` are sorted by case id, then by slice."""

    folder: Path
    protocol: str  # name of the experiment whose protocol was run
    method: str  # name of the method, with its architecture if that is not the method's own
    seed: int
    classes: list[str]
    record: Record
    split: dict[str, list[str]]
    case_hashes: dict[str, str]  # case id -> hash of its scan and mask
    summary: run_files.TestSummary
    cost: Cost
    history: list[run_files.Metrics]  # the lines of `metrics.jsonl`
    values: Mapping[Unit, Mapping[str, np.ndarray]]  # unit -> metric -> [units, classes]

    def unit_values(self, metric: str, unit: Unit = "volume", class_name: str = "") -> np.ndarray:
        """Return the value of every unit [units], of one class or averaged over classes except the absent ones.

        Metrics named `atlas_…` are those of the atlas baseline.
        """
        values = self.values[unit][metric]
        if class_name:
            return values[:, self.classes.index(class_name)]
        absent = [self.classes.index(name) for name in self.absent_classes]
        return (np.delete(values, absent, axis=1) if absent else values).mean(axis=1)

    @property
    def absent_classes(self) -> list[str]:
        """The classes that `evaluation.summary.find_absent_classes` leaves out of means over classes."""
        is_present = self.values["volume"]["reference_volume_ml"].any(axis=0)
        return [name for name, present in zip(self.classes, is_present, strict=True) if not present and any(is_present)]

    def case_values(self, metric: str) -> dict[str, float]:
        """Return case id -> value of its volume, averaged over classes."""
        return dict(zip(sorted(self.split["test"]), self.unit_values(metric).tolist(), strict=True))


class Mean(NamedTuple):
    """A mean over volumes or slices, each first averaged over seeds. Standard deviations divide by n − 1."""

    unit: Unit
    mean: float
    sd: float | None  # standard deviation over volumes or slices; None if there is only one
    n: int
    # Bootstrap interval of the mean over cases; None for a single case, and for slices, which depend on each other.
    ci95_low: float | None
    ci95_high: float | None
    sd_over_seeds: float | None  # standard deviation of the seeds' means; None for a single seed


@dataclass(frozen=True)
class Results:
    """All runs of a study: one for each protocol, method and seed, on the same scans and the same test cases."""

    name: str
    summary: str
    command: str
    protocols: list[str]
    methods: list[str]
    seeds: list[int]
    runs: list[StudyRun]

    @property
    def classes(self) -> list[str]:
        return self.runs[0].classes

    @property
    def test_cases(self) -> list[str]:
        return sorted(self.runs[0].split["test"])

    @property
    def largest_protocol(self) -> str:
        """The protocol with the most training patients; among equals, one that uses all of them."""

        def size(protocol: str) -> tuple[int, bool]:
            data = self.select(protocol)[0].record.experiment.data
            return self.count_training_patients(protocol), not data.train_patients and data.train_percent == 100

        return max(self.protocols, key=size)

    def select(self, protocol: str, method: str = "") -> list[StudyRun]:
        """Return the runs under a protocol, of one method (a run for each seed) or of all methods."""
        return [run for run in self.runs if run.protocol == protocol and method in ("", run.method)]

    def count_training_patients(self, protocol: str) -> int:
        return len(self.select(protocol)[0].split["train"])

    def seed_values(
        self, protocol: str, method: str, metric: str, unit: Unit = "volume", class_name: str = ""
    ) -> np.ndarray:
        """Return the value of every unit for every seed [seeds, units], of one class or averaged over classes."""
        return np.array([run.unit_values(metric, unit, class_name) for run in self.select(protocol, method)])

    def case_means(self, protocol: str, method: str, metric: str, class_name: str = "") -> dict[str, float]:
        """Return case id -> value of its volume averaged over seeds, of one class or averaged over classes."""
        values = self.seed_values(protocol, method, metric, class_name=class_name).mean(axis=0)
        return dict(zip(self.test_cases, values.tolist(), strict=True))

    def mean(self, protocol: str, method: str, metric: str, unit: Unit = "volume", class_name: str = "") -> Mean:
        """Return the mean over volumes or slices, of one class or averaged over classes."""
        by_seed = self.seed_values(protocol, method, metric, unit, class_name)
        values, seed_means = by_seed.mean(axis=0), by_seed.mean(axis=1)
        low, high = (mean_interval(values) if unit == "volume" else None) or (None, None)
        sd, sd_over_seeds = (float(v.std(ddof=1)) if len(v) > 1 else None for v in (values, seed_means))
        return Mean(unit, float(values.mean()), sd, len(values), low, high, sd_over_seeds)

    def cost(self, protocol: str, method: str) -> dict[str, Any]:
        """Return the cost of a method: times are means over runs, and the peak memory is the highest of any run."""
        runs = self.select(protocol, method)
        first = runs[0].cost
        peaks = [run.cost.peak_device_bytes or run.cost.peak_host_bytes for run in runs]
        return {
            "parameters": first.parameters,
            "trained_parameters": first.trained_parameters,
            "multiply_adds": first.multiply_adds,
            "step_bytes": first.step_bytes,
            "epoch_seconds": float(np.mean([line["seconds"] for run in runs for line in run.history])),
            "epochs": float(np.mean([len(run.history) for run in runs])),
            "inference_seconds": float(np.mean([seconds for run in runs for seconds in run.cost.inference_seconds])),
            "peak_bytes": None if None in peaks else max(peaks),
        }


class _Run(TypedDict):
    folder: str
    protocol: str
    method: str
    seed: int


class _StudyFile(TypedDict):
    """The content of `study.json`."""

    name: str
    summary: str
    command: str
    runs: list[_Run]


def read_study(folder: Path) -> Results:
    """Read the results of a study. All its runs must be complete.

    Raises:
        InputError: the folder does not hold a study; a run is missing, incomplete, damaged, not the scheduled one or
            from another version of this package; or the runs cannot be compared.
    """
    fix = "Rerun the study with the same command; complete runs are kept."
    try:
        content = read_json(folder / STUDY, _StudyFile, fix)
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"not a study folder (no {STUDY})"
        raise InputError(f"--study={folder}", problem, "Pass the --output of `python -m jaxla.study`.") from error
    schedule = [(run["protocol"], run["method"], run["seed"]) for run in content["runs"]]
    run_dirs = [folder / RUNS / run["folder"] for run in content["runs"]]
    if not schedule or sorted(schedule) != sorted(product(*map(set, zip(*schedule, strict=True)))):
        raise InputError(folder / STUDY, "damaged: expected a run for each protocol, method and seed", fix)
    name, summary, command = (content[key] for key in ("name", "summary", "command"))
    runs = []
    fix = f"Resume the study with `{command}`."
    for run_dir, scheduled in zip(run_dirs, schedule, strict=True):
        if not run_dir.exists():
            raise InputError(run_dir, "this run of the study has not started", fix)
        record = read_record(run_dir)
        if not run_files.is_finished(run_dir):
            raise InputError(run_dir, "this run of the study is incomplete", fix)
        _require_scheduled(run_dir, record, *scheduled)
        runs.append(_read_run(run_dir, record))
    _require_comparable(runs)
    present = {path.name for path in (folder / RUNS).iterdir() if path.is_dir()}
    if unscheduled := present - {run_dir.name for run_dir in run_dirs}:
        log.warning("not in the report, because the schedule does not list them: %s", ", ".join(sorted(unscheduled)))
    axes = (list(dict.fromkeys(getattr(run, axis) for run in runs)) for axis in ("protocol", "method", "seed"))
    return Results(name, summary, command, *axes, runs)


def _read_run(folder: Path, record: Record) -> StudyRun:
    fix = f"Move the folder {folder} away and rerun the study."
    try:
        summary = run_files.read_summary(folder, fix)
        classes = list(summary["classes"])
        split = read_json(folder / run_files.SPLIT, SplitFile, fix)
        split = {part: list(map(str, split.get(part, ()))) for part in ("train", "val", "test")}
        cases = split["test"]
        case_hashes = read_json(folder / run_files.CASES, dict[str, str], fix)
        if missing := set(cases) - set(case_hashes):
            raise ValueError(f"{run_files.CASES} lacks {min(missing)}")
        history = run_files.read_metrics(folder)
        if not history:
            raise ValueError(f"{run_files.METRICS}: expected at least one epoch")
        cost = read_json(folder / run_files.COST, Cost, fix)
        volumes, slices = folder / run_files.TEST_CASES, folder / run_files.TEST_SLICES
        values = {
            "volume": _read_values(volumes, "volume", VOLUME_METRICS, cases, classes, len(cases)),
            "slice": _read_values(slices, "slice", REPORTED_METRICS, cases, classes, summary["slice"]["dice"]["n"]),
        }
        experiment = record.experiment
        about = {"protocol": experiment.name, "method": record.label, "seed": experiment.seed, "classes": classes}
        content = {"split": split, "case_hashes": case_hashes, "summary": summary, "cost": cost, "history": history}
        run = StudyRun(folder=folder, record=record, values=values, **about, **content)
        _require_summary(run)
        return run
    except OSError as error:
        problem = f"cannot be read ({error.strerror}), and the report needs it"
        raise InputError(error.filename, problem, fix) from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(folder, f"damaged: {describe_damage(error)}", fix) from error


def _read_values(
    path: Path, unit: Unit, metrics: Sequence[str], cases: Sequence[str], classes: Sequence[str], units: int
) -> dict[str, np.ndarray]:
    """Read metric -> [units, classes] from a table of volumes or slices with a row for each unit and class.

    Raises:
        OSError, ValueError, KeyError: the table cannot be read, is incomplete, or holds a value that is not finite
            or that its metric cannot have.
    """
    rows = read_csv(path)
    found = {(r["case"], int(r.get("slice", 0)), r["class"]): [float(r[metric]) for metric in metrics] for r in rows}
    keys = sorted({(case, index) for case, index, _ in found})
    if not len(rows) == len(found) == units * len(classes) or len(keys) != units or {k[0] for k in keys} != set(cases):
        expected = f"expected {units * len(classes)} rows, one per {unit} and class of the test cases"
        raise ValueError(f"{path.name}: {expected}")
    array = np.array([[found[*key, name] for name in classes] for key in keys])
    if bad := np.argwhere(~np.isfinite(array)).tolist():
        index, _, metric = bad[0]
        raise ValueError(f"{path.name}: {metrics[metric]} of {keys[index][0]} is not finite")
    maxima = [COLUMNS[metric.removeprefix("atlas_")].maximum for metric in metrics]
    if bad := np.argwhere((array < 0) | (array > maxima)).tolist():
        index, name, metric = bad[0]
        problem = f"{array[index, name, metric]:g} is not a possible {metrics[metric]}"
        raise ValueError(f"{path.name}: case {keys[index][0]}: {problem}")
    return dict(zip(metrics, np.moveaxis(array, 2, 0), strict=True))


def _require_summary(run: StudyRun) -> None:
    """Raise a ValueError unless the means of a run's tables are those of its summary."""
    tables = (("volume", run_files.TEST_CASES, run.summary), ("slice", run_files.TEST_SLICES, run.summary["slice"]))
    for (unit, table, summary), name, metric in product(tables, run.classes, REPORTED_METRICS):
        mean, expected = float(run.unit_values(metric, unit, name).mean()), summary["classes"][name][metric]["mean"]
        if not math.isclose(mean, expected, rel_tol=SUMMARY_TOLERANCE, abs_tol=SUMMARY_TOLERANCE):
            problem = f"the mean {metric} of {name} is {mean:g}, but {expected:g} in {run_files.SUMMARY}"
            raise ValueError(f"{table}: {problem}")


def _require_scheduled(folder: Path, record: Record, protocol: str, method: str, seed: int) -> None:
    """Raise an InputError if the folder of a scheduled run holds a different run."""
    experiment = record.experiment
    for option, expected, found in (
        ("exp", protocol, experiment.name),
        ("method", method, experiment.method.name),
        ("seed", seed, experiment.seed),
        ("data.subset_seed", seed, experiment.data.subset_seed),
    ):
        if found != expected:
            problem = f"holds a run with --{option}={found}, but the study schedules {expected} here"
            raise InputError(folder, problem, "Move the folder away and rerun the study.")


def _require_comparable(runs: Sequence[StudyRun]) -> None:
    """Raise an InputError that names two runs unless all runs differ in method, protocol and seed only."""
    require_same_cases({str(run.folder): run.case_values("dice") for run in runs})
    reference_facts: dict[object, tuple[StudyRun, dict[str, object]]] = {}
    for run in runs:
        record = run.record
        options = {f"--{name}": value for name, value in comparable_options(record.experiment).items()}
        options = {name: value for name, value in options.items() if name not in SEED_OPTIONS}
        groups = {
            "study": {
                "versions of jaxla": record.environment["versions"]["jaxla"],
                "scans or masks": run.case_hashes,
                "classes": run.classes,
                "validation patients": run.split["val"],
                "numbers of slices": len(run.values["slice"]["dice"]),
            },
            ("method", run.method): {
                **{name: value for name, value in options.items() if name not in PROTOCOL_OPTIONS},
                # Random weights follow the seed, so their hash is not compared.
                "weights": "random" if record.weights == "random" else record.weights_sha256[:12],
                "--model.plan": "given" if option_values(record.experiment).get("model.plan") else "not given",
            },
            ("protocol", run.protocol): {n: value for n, value in options.items() if n.startswith("--data.")},
            ("subset", run.protocol, run.seed): {"training patients": run.split["train"]},
        }
        for group, facts in groups.items():
            reference, expected = reference_facts.setdefault(group, (run, facts))
            for name in sorted(facts):
                if facts[name] != expected[name]:
                    values = f" ({facts[name]} and {expected[name]})" if isinstance(facts[name], str) else ""
                    problem = f"cannot be compared with {reference.folder}: different {name}{values}"
                    raise InputError(run.folder, problem, "Move one of the two folders away and rerun the study.")
