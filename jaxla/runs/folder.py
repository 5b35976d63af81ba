"""The folder of a run: the names of its files, who may write it, and whether a run may go on in it."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxla.cli.command_line import require_writable, without_folder_and_process
from jaxla.cli.files import is_leftover, remove_leftovers, report_os_errors, write_atomically
from jaxla.config import Experiment, InputError
from jaxla.data.split import FOLDS, Split, write_split
from jaxla.runs.record import RECORD, Record, changed_case, differences, read_record, shown, write_record

log = logging.getLogger(__name__)

# What a run's folder holds, beside its record.
LOCK = ".lock"
SPLIT = "split.json"
CASES = "cases.json"
LOG = "train.log"
BACKBONE = "backbone.safetensors"  # of a run on a frozen backbone of random weights, which no other file holds
BEST, LATEST = "checkpoints/best", "checkpoints/latest"
METRICS = "metrics.jsonl"
CURVES = "progress.png"
PLAN = "plan.json"  # of a network that is planned from the data
LARGEST = "validation/largest.json"  # groups of classes of which the largest connected part is kept
PREDICTIONS = "test/predictions"
TEST_CASES, TEST_SLICES = "test/cases.csv", "test/slices.csv"
SUMMARY = "test/summary.json"
OVERLAYS = "test/overlays.png"
COST = "cost.json"
REPORT = "report.html"  # written last: a run that has it is finished

FIRST_FILES = (LOCK, SPLIT, CASES)  # written before the record, with which the folder is a run

STUDY, RUNS = "study.json", "runs"  # of a study's folder: its plan, and the folders of its runs


def fold_folders(folder: Path) -> list[Path]:
    """The folders of a run's folds, where it trains them all."""
    return [folder / f"fold_{k}" for k in range(FOLDS)]


def read_largest(folder: Path) -> tuple[tuple[int, ...], ...]:
    """The groups of classes of which a run keeps the largest connected part alone; none where it does not say.

    Raises:
        InputError: the file is damaged.
    """
    if not (folder / LARGEST).exists():
        return ()
    try:
        groups = json.loads((folder / LARGEST).read_text())["groups"]
        return tuple(tuple(int(k) for k in group) for group in groups)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / LARGEST}: damaged ({error!r}); put it back from a copy") from error


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
    if folder.is_dir() and not has_not_begun(folder):
        raise InputError(f"--run-dir={folder}: is not empty; choose another folder")
    require_writable("--run-dir", folder)


def has_not_begun(folder: Path) -> bool:
    """Whether an existing folder holds nothing but what a run that was killed before it began may have left."""
    return all(path.name in FIRST_FILES or is_leftover(path) for path in folder.iterdir())


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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What is known of each epoch so far, from `metrics.jsonl`.

    Raises:
        OSError, ValueError: the file cannot be read, or is damaged.
    """
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@contextmanager
def run_folder(folder: Path, record: Record, split: Split, cases: Mapping[str, str], resume: bool) -> Iterator[None]:
    """A run's folder, held by this process alone: made with its record, or opened to go on.

    Args:
        cases: id of each case, and a hash of its scan and mask.

    Raises:
        InputError: another process holds it, it cannot be written, or what is to be resumed differs.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    with folder_held(folder, "--run-dir", "is training"):
        if resume:
            _require_unfinished(folder)
            begun = read_record(folder)
            _require_same_run(folder, begun, record, split, cases)
            remove_leftovers(folder)
            session = {"begun": record.begun, "command": record.command, "environment": record.environment}
            # files may have moved since, and the files that only repeat what was compared may be gone
            where = replace(begun, experiment=record.experiment, weights=record.weights)
            write_record(folder, replace(where, resumed=(*begun.resumed, session)))
            write_split(split, folder / SPLIT)
            write_atomically(folder / CASES, json.dumps(cases, indent=1) + "\n")
        else:
            require_free(folder)
            remove_leftovers(folder)
            with report_os_errors("written", f"--run-dir={folder}", "choose another folder"):
                try:
                    write_split(split, folder / SPLIT)
                    write_atomically(folder / CASES, json.dumps(cases, indent=1) + "\n")
                    write_record(folder, record)  # last: with it the folder is a run
                except OSError:
                    for name in FIRST_FILES:
                        (folder / name).unlink(missing_ok=True)
                    for path in missing:
                        path.rmdir()
                    raise
        yield


@contextmanager
def folder_held(folder: Path, option: str, does: str) -> Iterator[None]:
    """A folder, of a run or a study, made where there is none and held by this process alone.

    Args:
        does: what another process does that holds it, for the message.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=1)  # longer than `is_running` holds it
    with report_os_errors("written", f"{option}={folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(f"{option}={folder}: another process {does} there; wait for it or end it") from error
    try:
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
    if folder.is_dir() and has_not_begun(folder):
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
