"""The folder of a run: who may write it, and the record of what was run."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxla.config import (
    Experiment,
    InputError,
    experiment_from_json,
    experiment_to_json,
    require_writable,
    without_folder_and_process,
)
from jaxla.data.cases import Labels
from jaxla.data.inputs import Canvas
from jaxla.data.split import Split, write_split

# No JAX here: `python -m jaxla.info` reads a record in less time than JAX takes to import.

log = logging.getLogger(__name__)

RECORD = "experiment.json"
CASES = "cases.json"
LOG = "train.log"
METRICS = "metrics.jsonl"
LOCK = ".lock"
BACKBONE = "backbone.safetensors"  # of a run on a frozen backbone of random weights, which no other file holds
SPLIT = "split.json"
COST = "cost.json"
FEATURES_KEPT = "The frozen backbone's features were computed once per slice"  # how such a record's `features` begins
FIRST_FILES = (LOCK, SPLIT, CASES, f".{RECORD}")  # what a run that was killed before it began may have left
REPORT = "report.html"  # written last: a run that has it is finished
VERSION = 3
PACKAGES = (
    "jaxla",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "nibabel",
    "pillow",
)
NOT_COMPARED = {"summary", "data.root", "data.split", "model.weights"}  # of files the content is compared


@dataclass(frozen=True)
class Record:
    """What a run folder says of itself in `experiment.json`.

    Attributes:
        experiment: with every option resolved.
        labels: classes of the data set.
        weights: the backbone's origin: `random`, or the file's path.
        weights_sha256: of that file's data; of a random backbone that stays frozen, of its parameters; else empty.
        split_sha256: of the case ids in `split.json`.
        data_sha256: of the scans and masks of all cases.
        command: that started the run.
        begun: when, in local time, ISO 8601.
        environment: package versions, device and platform.
        resumed: when, where and by what command it was gone on with, each time.
        features: a sentence on how the backbone was run: in every epoch, or once per slice.
        extent: mm a side of the square that slices are laid on; 0 where each has its own.
    """

    experiment: Experiment
    labels: Labels
    weights: str
    weights_sha256: str
    split_sha256: str
    data_sha256: str
    command: str
    begun: str
    environment: dict[str, Any]
    resumed: tuple[dict[str, Any], ...] = ()
    features: str = ""
    extent: float = 0.0

    @property
    def canvas(self) -> Canvas:
        """The square that slices are laid on before it is resized to the network's input."""
        return Canvas(self.experiment.preprocessing.image_size, self.extent)


def require_free(folder: Path) -> None:
    """Check, leaving nothing behind, that a run can be written there.

    Raises:
        InputError: it holds a run or other files, or cannot be written.
    """
    if is_finished(folder):
        raise InputError(f"--run-dir={folder}: already holds a finished run; choose another folder or remove this one")
    if (folder / RECORD).exists():
        raise InputError(
            f"--run-dir={folder}: already holds a run; go on with it by --resume, choose another folder or remove it"
        )
    if folder.is_dir() and {path.name for path in folder.iterdir()} - set(FIRST_FILES):
        raise InputError(f"--run-dir={folder}: is not empty; choose another folder")
    require_writable("--run-dir", folder)


def is_finished(folder: Path) -> bool:
    return (folder / REPORT).exists()


def is_running(folder: Path) -> bool:
    """Whether a process trains in that folder now."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that this user cannot write
        return False


@contextmanager
def run_folder(folder: Path, record: Record, split: Split, cases: Mapping[str, str], resume: bool) -> Iterator[None]:
    """A run's folder, held by this process alone: made with its record, or opened to go on.

    Args:
        cases: id of each case, and a hash of its scan and mask.

    Raises:
        InputError: another process holds it, it cannot be written, or what is to be resumed differs.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    lock = FileLock(folder / LOCK, timeout=1)  # longer than `is_running` holds it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"--run-dir={folder}: another process is training there; wait for it or end it") from error
    except OSError as error:
        raise InputError(f"--run-dir={folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        if resume:
            _require_unfinished(folder)
            begun = read_record(folder)
            _require_same_run(folder, begun, record, split, cases)
            session = {"begun": record.begun, "command": record.command, "environment": record.environment}
            # files may have moved since, and the files that only repeat what was compared may be gone
            where = replace(begun, experiment=record.experiment, weights=record.weights)
            write_record(folder, replace(where, resumed=(*begun.resumed, session)))
            write_split(split, folder / SPLIT)
            (folder / CASES).write_text(json.dumps(cases, indent=1) + "\n")
        else:
            require_free(folder)
            try:
                write_split(split, folder / SPLIT)
                (folder / CASES).write_text(json.dumps(cases, indent=1) + "\n")
                write_record(folder, record)  # last: with it the folder is a run
            except OSError as error:
                for name in FIRST_FILES:
                    (folder / name).unlink(missing_ok=True)
                for path in missing:
                    path.rmdir()
                raise InputError(
                    f"--run-dir={folder}: cannot be written ({error.strerror}); choose another folder"
                ) from error
        yield
    finally:
        lock.release()


def require_resumable(folder: Path | None, experiment: Experiment) -> None:
    """Check that `folder` holds an unfinished run of these options.

    Raises:
        InputError: no folder, no run, a finished one, or one of other options; the first that differs is named.
    """
    if folder is None:
        raise InputError("option --resume needs --run-dir: the folder of the run to go on with")
    if folder.is_dir() and not {path.name for path in folder.iterdir()} - set(FIRST_FILES):
        raise InputError(f"--resume: no run has begun in {folder}; start it without --resume")
    record = read_record(folder)
    _require_unfinished(folder)
    require_writable("--run-dir", folder)
    if is_running(folder):
        raise InputError(f"--run-dir={folder}: another process is training there; wait for it or end it")
    for option, now, then in differences(experiment, record.experiment):
        raise InputError(
            f"--resume: option --{option} is {shown(now)}, but the run in {folder} was begun with {shown(then)}; "
            f"it was begun by: {record.command}"
        )


def resume_command(command: str, folder: Path) -> str:
    """The command that goes on with a run that `command` began in `folder`."""
    return f"{without_folder_and_process(command)} {shlex.join([f'--run-dir={folder}', '--resume'])}"


def _require_unfinished(folder: Path) -> None:
    if is_finished(folder):
        raise InputError(
            f"--resume: the run in {folder} is finished ({REPORT}); choose another --run-dir to train again"
        )


def _require_same_run(folder: Path, begun: Record, record: Record, split: Split, cases: Mapping[str, str]) -> None:
    """Raise an InputError unless data, split and weights are those that the run was begun with."""
    try:
        then: dict[str, str] = dict(json.loads((folder / CASES).read_text()))
    except (OSError, ValueError, TypeError):  # it only serves to name the case
        then = cases
    if case := changed_case(then, cases):
        raise InputError(
            f"--resume: the data in {record.experiment.data.root} are not those that the run in {folder} was begun "
            f"with: {case}; put the data back, or start a new run"
        )
    if begun.data_sha256 != record.data_sha256:
        raise InputError(
            f"--resume: the data in {record.experiment.data.root} are not those that the run in {folder} was begun "
            "with; put the data back, or start a new run"
        )
    if begun.split_sha256 != split.sha256:
        raise InputError(
            f"--resume: --data.split={record.experiment.data.split} is not the split that the run in {folder} was "
            f"begun with; give {folder / SPLIT}"
        )
    if record.weights != "random" and begun.weights_sha256 != record.weights_sha256:
        raise InputError(
            f"--resume: {record.weights} (sha256 of its data {record.weights_sha256[:12]}…) is not the file that the "
            f"run in {folder} was begun with ({begun.weights_sha256[:12]}…); put that one back, or start a new run"
        )
    if begun.environment["device"] != record.environment["device"]:
        log.warning(
            "the run was begun on %s and goes on on %s: it differs from one that was not interrupted",
            begun.environment["device"], record.environment["device"],
        )  # fmt: skip
    then, now = (f"{of.environment.get('devices', 1)} devices" for of in (begun, record))
    if then != now:
        log.info("the run was begun on %s and goes on with %s: it may differ in rounding", then, now)
    for name, version in record.environment["versions"].items():
        if begun.environment["versions"].get(name) != version:
            log.warning(
                "the run was begun with %s %s and goes on with %s: it may differ in rounding from one that was not "
                "interrupted", name, begun.environment["versions"].get(name), version,
            )  # fmt: skip


def changed_case(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What became of the first case whose hash is not what it was, in words; empty where all are the same."""
    for name in sorted(set(then) | set(now)):
        if then.get(name) != now.get(name):
            what = "new" if name not in then else "gone" if name not in now else "another scan or mask"
            return f"case {name} is {what}"
    return ""


def options_of(experiment: Experiment) -> dict[str, str]:
    """Every option that must be the same wherever the run goes on, by its dotted name."""
    flat = {"exp": experiment.name}
    for key, value in experiment_to_json(experiment).items():
        of_part = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {name: shown(v) for name, v in of_part.items() if name not in NOT_COMPARED | {"name"}}
    return flat


def differences(now: Any, then: Any, within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The options in which two experiments differ: dotted name, and the value of each."""
    for field in fields(now):
        option = within + field.name
        a, b = getattr(now, field.name), getattr(then, field.name)
        if is_dataclass(a):
            yield from differences(a, b, f"{option}.")
        elif option == "model.weights" and "random" in (a, b) and a != b:
            yield option, a, b
        elif a != b and option not in NOT_COMPARED:
            yield "exp" if option == "name" else option, a, b


def shown(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value) or "not given"


def environment() -> dict[str, Any]:
    import jax

    from jaxla.devices.mesh import device_count
    from jaxla.devices.processes import process_count

    device = jax.local_devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": processor(),
        "devices": device_count(),
        "processes": process_count(),
    }


def processor() -> str:
    """Name and number of cores of this machine's processor; JAX calls every one of them `cpu`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def describe_device(of: Mapping[str, Any]) -> str:
    """What an `environment` ran on: `cpu: AMD EPYC 7B13, 8 cores`, or `gpu: NVIDIA H100, 4 of them, in 2 processes`."""
    count, processes = of.get("devices", 1), of.get("processes", 1)  # older records do not say
    name = f"cpu: {of['processor']}" if of["device"].startswith("cpu") and "processor" in of else of["device"]
    return name + (f", {count} of them" if count > 1 else "") + (f", in {processes} processes" if processes > 1 else "")


def write_record(folder: Path, record: Record) -> None:
    labels = asdict(record.labels)
    content = {
        **vars(record),
        "version": VERSION,
        "experiment": experiment_to_json(record.experiment),
        "labels": labels,
    }
    beside = folder / f".{RECORD}"
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(folder / RECORD)


def read_record(folder: Path) -> Record:
    """What a run folder says of itself.

    Raises:
        InputError: `folder` holds no run, or one of a newer version.
    """
    try:
        content: dict[str, Any] = json.loads((folder / RECORD).read_text())
        version = content.pop("version")
        if version > VERSION:
            raise InputError(f"{folder}: written by a newer version of this package; update the one installed")
        if version < VERSION:
            raise InputError(f"{folder}: written by an earlier version of this package, which this one cannot read")
        for key in ("device", "versions"):
            content["environment"][key]
        return Record(
            **{
                **content,
                "experiment": experiment_from_json(content["experiment"]),
                "labels": _labels_from_json(content["labels"]),
                "resumed": tuple(content["resumed"]),
            }
        )
    except OSError as error:
        raise InputError(f"{folder}: not a run folder (no {RECORD}); give the folder that training wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / RECORD}: damaged ({error!r})") from error


def _labels_from_json(content: Mapping[str, Any]) -> Labels:
    values = content["values"]
    return Labels(
        names=tuple(content["names"]),
        values=None if values is None else tuple(tuple(group) for group in values),
        ignored=tuple(content["ignored"]),
        one_value=content["one_value"],
    )
