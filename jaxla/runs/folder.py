"""The folder of a run: names of its files, its lock, and whether a run can start or resume in it."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from filelock import FileLock, Timeout

from jaxla.cli.command_line import require_writable, strip_run_options
from jaxla.cli.files import is_leftover, remove_leftovers, report_os_errors, write_atomically
from jaxla.cli.json_files import RESTORE, Float32, Fraction, Seconds, check_types, parse_json, read_json
from jaxla.config import Experiment, InputError
from jaxla.data.split import FOLDS, Split, SplitFile, write_split
from jaxla.runs.record import RECORD, Record, changed_case, differences, format_value, read_record, write_record

log = logging.getLogger(__name__)

# Files of a run, besides its record.
LOCK = ".lock"
SPLIT = "split.json"
CASES = "cases.json"
LOG = "train.log"
BACKBONE = "backbone.safetensors"  # a frozen backbone with random weights, which no other file holds
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
CURVES = "progress.png"
LARGEST = "validation/largest.json"  # groups of classes that keep only their largest connected component
PREDICTIONS = "test/predictions"
TEST_CASES, TEST_SLICES = "test/cases.csv", "test/slices.csv"
SUMMARY = "test/summary.json"
OVERLAYS = "test/overlays.png"
COST = "cost.json"
REPORT = "report.html"  # written last: a run with it is finished

FIRST_FILES = (LOCK, SPLIT, CASES)  # written before the record, which makes the folder a run


def fold_folders(folder: Path) -> list[Path]:
    """Return the folders of the folds of a run with --fold=all."""
    return [folder / f"fold_{k}" for k in range(FOLDS)]


def require_free(folder: Path) -> None:
    """Raise an InputError if `folder` holds a run or other files, or cannot be written; leave nothing behind."""
    where = f"--run-dir={folder}"
    if is_finished(folder):
        raise InputError(where, "holds a finished run", "Use another folder.")
    if (folder / RECORD).exists():
        raise InputError(where, "holds an unfinished run", "Add --resume to continue it, or use another folder.")
    if folder.is_dir() and not has_not_begun(folder):
        raise InputError(where, "not empty", "Use another folder.")
    require_writable("--run-dir", folder)


def has_not_begun(folder: Path) -> bool:
    """Return whether an existing folder holds only files that a run leaves if it is killed before it begins."""
    return all(path.name in FIRST_FILES or is_leftover(path) for path in folder.iterdir())


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder was trained, tested and reported."""
    return (folder / REPORT).exists()


def is_running(folder: Path) -> bool:
    """Return whether a process is training in a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that this user cannot write to
        return False


class Metrics(TypedDict):
    """A line of `metrics.jsonl`."""

    epoch: int
    train_loss: Float32
    val_loss: NotRequired[Float32]  # this and the next two are missing from all lines without validation cases
    val_dice: NotRequired[Fraction]
    val_iou: NotRequired[Fraction]
    seconds: Seconds
    slices_per_second: float


VALIDATION_METRICS = frozenset(("val_loss", "val_dice", "val_iou"))


class Mean(TypedDict):
    """A mean Dice or IoU in `summary.json`."""

    mean: Fraction
    sd: float | None
    n: int
    unit: str


class Overlaps(TypedDict):
    dice: Mean
    iou: Mean


class RunSummary(TypedDict):
    """The entries that are read from `summary.json` of a run without test cases."""

    best_epoch: NotRequired[int]


class TestSummary(RunSummary, Overlaps):
    """The entries that are read from `summary.json`."""

    classes: dict[str, dict[str, Any]]
    slice: Overlaps
    atlas: Overlaps
    definitions: dict[str, str]
    empty_rule: str


def read_metrics(folder: Path) -> list[Metrics]:
    """Return the metrics of each epoch so far, from `metrics.jsonl`.

    Raises:
        FileNotFoundError: the file is missing.
        InputError: it cannot be read, or is damaged.
    """
    path = folder / METRICS
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", RESTORE) from error
    history = [parse_json(line, Metrics, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    if [metrics["epoch"] for metrics in history] != list(range(1, len(history) + 1)):
        raise InputError(path, "damaged: the epochs do not count from 1", RESTORE)
    if {len(VALIDATION_METRICS & metrics.keys()) for metrics in history} not in (set(), {0}, {len(VALIDATION_METRICS)}):
        raise InputError(path, "damaged: some validation metrics are missing", RESTORE)
    return history


def read_summary(folder: Path, fix: str = RESTORE) -> RunSummary | TestSummary:
    """Return the summary of a run's test, which has no scores without test cases; raises as `read_metrics`.

    Entries that the types do not name are returned as well.
    """
    path = folder / SUMMARY
    content = read_json(path, dict[str, Any], fix)
    has_scores = bool(content.keys() & (TestSummary.__annotations__.keys() - RunSummary.__annotations__.keys()))
    check_types(content, TestSummary if has_scores else RunSummary, path, fix)
    return content


def read_split_file(folder: Path) -> SplitFile:
    """Return the split of a run; raises as `read_metrics`."""
    return read_json(folder / SPLIT, SplitFile)


def kept_metrics(folder: Path, history: Sequence[Metrics], summary: RunSummary) -> Metrics:
    """Return the metrics of the tested epoch; raise an InputError if the run's files do not have it."""
    epoch = summary.get("best_epoch", 0)
    if not 1 <= epoch <= len(history):
        raise InputError(folder / SUMMARY, f"damaged: {METRICS} has no epoch {epoch}", RESTORE)
    return history[epoch - 1]


def count_epochs(folder: Path) -> int:
    """Return the number of epochs that earlier sessions of a run reported."""
    path = folder / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `metrics.jsonl`."""
    with report_os_errors("written", folder / METRICS, "Fix this and rerun with --resume."):
        text = "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history)
        write_atomically(folder / METRICS, text)


def summarise_fold(folder: Path) -> dict[str, Any]:
    """Return what the report of all folds shows for one fold: its kept epoch, its test, and its minutes."""
    summary, history = read_summary(folder), read_metrics(folder)
    kept = kept_metrics(folder, history, summary)
    return {
        "folder": folder.name,
        "patients": len(read_split_file(folder).get("val", ())),
        **{name: kept.get(name) for name in ("epoch", "val_dice", "val_iou")},
        **{f"test_{name}": summary[name]["mean"] if name in summary else None for name in ("dice", "iou")},
        "minutes": sum(metrics["seconds"] for metrics in history) / 60,
    }


@contextmanager
def run_folder(folder: Path, record: Record, split: Split, cases: Mapping[str, str], resume: bool) -> Iterator[None]:
    """Create or reopen a run's folder, locked against other processes; `cases` are hashes of scans and masks by id.

    Raises:
        InputError: another process holds it, it cannot be written, or the run to resume differs.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    with lock_folder(folder, "--run-dir", "is training"):
        if resume:
            _require_unfinished(folder)
            earlier_record = read_record(folder)
            _require_same_run(folder, earlier_record, record, split, cases)
            remove_leftovers(folder)
            session = {"begun": record.begun, "command": record.command, "environment": record.environment}
            # Scans and weights may have moved, and files that the record also covers by a hash may be gone.
            moved = replace(
                earlier_record, experiment=record.experiment, weights=record.weights, network=record.network
            )
            write_record(folder, replace(moved, resumed=(*earlier_record.resumed, session)))
            _write_first_files(folder, split, cases)
        else:
            require_free(folder)
            remove_leftovers(folder)
            with report_os_errors("written", f"--run-dir={folder}", "Use another folder."):
                try:
                    _write_first_files(folder, split, cases)
                    write_record(folder, record)  # last: it makes the folder a run
                except OSError:
                    for name in FIRST_FILES:
                        (folder / name).unlink(missing_ok=True)
                    for path in missing:
                        path.rmdir()
                    raise
        yield


def _write_first_files(folder: Path, split: Split, cases: Mapping[str, str]) -> None:
    write_split(split, folder / SPLIT)
    write_atomically(folder / CASES, json.dumps(cases, indent=1) + "\n")


@contextmanager
def lock_folder(folder: Path, option: str, action: str) -> Iterator[None]:
    """Create the folder of a run or study if needed, and lock it against other processes.

    Args:
        option, action: for the error `{option}={folder}: another process {action} in this folder`.

    Raises:
        InputError: the folder cannot be written, or another process holds it.
    """
    lock = FileLock(folder / LOCK, timeout=1)  # longer than `is_running` holds it
    with report_os_errors("written", f"{option}={folder}", "Use another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            problem = f"another process {action} in this folder"
            raise InputError(f"{option}={folder}", problem, "Wait until it has finished.") from error
    try:
        yield
    finally:
        lock.release()


def require_resumable(folder: Path | None, experiment: Experiment) -> None:
    """Raise an InputError unless `folder` holds an unfinished run with these options; it names the first difference."""
    if folder is None:
        raise InputError("--resume", "--run-dir is missing", "Pass the folder of the run to resume.")
    if folder.is_dir() and has_not_begun(folder):
        raise InputError("--resume", f"no run has started in {folder}", "Start it without --resume.")
    record = read_record(folder)
    _require_unfinished(folder)
    require_writable("--run-dir", folder)
    if is_running(folder):
        raise InputError(
            f"--run-dir={folder}", "another process is training in this folder", "Wait until it has finished."
        )
    if changes := list(differences(experiment, record.experiment)):
        name, current, earlier = changes[0]
        problem = f"--{name} is {format_value(current)}, but the run in {folder} began with {format_value(earlier)}"
        command = _with_former_defaults(record.command, changes)
        raise InputError("--resume", problem, f"Resume with: {resume_command(command, folder)}")


def _with_former_defaults(command: str, changes: Sequence[tuple[str, Any, Any]]) -> str:
    """Return a run's command with the former value of each changed option that it does not set.

    The defaults of such options may have changed since. If the experiment or the method has changed, only that option
    is added, because the others follow from it.
    """
    given = {word.split("=")[0] for word in shlex.split(command)}
    if changes[0][0] in ("exp", "method"):
        changes = changes[:1]
    words = [f"--{name}={format_value(earlier)}" for name, _, earlier in changes if earlier not in ("", None)]
    return shlex.join([*shlex.split(command), *(word for word in words if word.split("=")[0] not in given)])


def resume_command(command: str, folder: Path) -> str:
    """Return the command that resumes the run that `command` began in `folder`."""
    return f"{strip_run_options(command)} {shlex.join([f'--run-dir={folder}', '--resume'])}"


def _require_unfinished(folder: Path) -> None:
    if is_finished(folder):
        raise InputError("--resume", f"the run in {folder} is finished", "Use another --run-dir to train again.")


def _require_same_run(
    folder: Path, earlier_record: Record, record: Record, split: Split, cases: Mapping[str, str]
) -> None:
    """Raise an InputError unless data, split and weights are those that the run began with."""
    try:
        earlier_cases = read_json(folder / CASES, dict[str, str])
    except (FileNotFoundError, InputError):  # the file only serves to name the changed case
        earlier_cases = dict(cases)
    data = record.experiment.data
    case = changed_case(earlier_cases, cases)
    if case or earlier_record.data_sha256 != record.data_sha256:
        problem = f"the data in {data.root} differ from those that the run in {folder} began with"
        raise InputError("--resume", problem + (f": {case}" if case else ""), "Restore them, or start a new run.")
    if earlier_record.split_sha256 != split.sha256:
        problem = f"--data.split={data.split} differs from the split that the run began with"
        raise InputError("--resume", problem, f"Use {shlex.quote(f'--data.split={folder / SPLIT}')}.")
    if record.weights != "random" and earlier_record.weights_sha256 != record.weights_sha256:
        current, earlier = (f"{sha256[:12]}…" for sha256 in (record.weights_sha256, earlier_record.weights_sha256))
        problem = f"{record.weights} (sha256 {current}) is not the file that the run began with ({earlier})"
        raise InputError("--resume", problem, "Restore that file, or start a new run.")
    _log_changed_environment(earlier_record.environment, record.environment)


def _log_changed_environment(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    may_differ = "the result may differ in rounding"
    if (began := earlier["device"]) != (resumes := current["device"]):
        will_differ = "the result will differ from an uninterrupted run"
        log.warning("the run began on %s and resumes on %s: %s", began, resumes, will_differ)
    if (began := earlier["devices"]) != (resumes := current["devices"]):
        log.info("the run began on %d devices and resumes on %d: %s", began, resumes, may_differ)
    for name, resumes in current["versions"].items():
        if (began := earlier["versions"].get(name)) != resumes:
            log.warning("the run began with %s %s and resumes with %s: %s", name, began, resumes, may_differ)
    if "settings" not in earlier:  # the record of an earlier version
        return
    for name in sorted({*earlier["settings"], *current["settings"]}):
        values = (environment["settings"].get(name) for environment in (earlier, current))
        began, resumes = (f"{name} not set" if value is None else f"{name}={value}" for value in values)
        if began != resumes:
            log.warning("the run began with %s and resumes with %s: the result may differ", began, resumes)
