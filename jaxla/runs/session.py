"""One session of a run: its locked folder, its log, and a message for every early end."""

from __future__ import annotations

import errno
import logging
import logging.handlers
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxla.cli.files import WRITE_FAULTS
from jaxla.cli.process import Stopped
from jaxla.cli.terminal import EscapingFormatter
from jaxla.config import InputError
from jaxla.data.dataset import PreparedData
from jaxla.distributed import broadcast, is_first, name_resume_command
from jaxla.memory import StepTooLarge
from jaxla.runs.folder import CHECKPOINTS, LOG, fold_folders, resume_command, run_folder
from jaxla.runs.record import RECORD, Record
from jaxla.runs.training_scans import write_known_scans
from jaxla.tasks import TooFewSteps
from jaxla.training.checkpoints import checkpoint_steps
from jaxla.training.progress import LATEST

# Faults of a disk or network file system. ENOENT is left out: a missing file is more often a mistake in this package,
# which should show its traceback.
DISK_FAULTS = (*WRITE_FAULTS, errno.EIO, errno.ESTALE)

log = logging.getLogger("jaxla.train")


@contextmanager
def buffered_log() -> Iterator[logging.handlers.BufferingHandler]:
    """Collect the package's log lines, for the time before there is a folder to write them to."""
    handler = logging.handlers.BufferingHandler(capacity=1_000_000)
    logging.getLogger("jaxla").addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger("jaxla").removeHandler(handler)


@contextmanager
def open_run(
    run_dir: Path,
    record: Record,
    data: PreparedData,
    early_log: Sequence[logging.LogRecord],
    *,
    resume: bool,
    outer_resume_command: str = "",
) -> Iterator[None]:
    """Lock a run's folder while it is trained and tested; log and explain any early end.

    Args:
        early_log: the first lines of the log.
        outer_resume_command: the command that resumes the cross-validation, if this run is one of its folds.

    Raises:
        InputError: another process holds the folder, the run to resume differs, or a disk fails.
        Stopped: the process was asked to stop; the message holds the command that resumes the run.
    """
    command = outer_resume_command or resume_command(record.command, run_dir)
    if not is_first():
        _require_shared_folder(run_dir)
        with explain_end(command, run_dir, logging.NullHandler()):
            yield
        return
    with (
        remove_if_unusable(run_dir),
        run_folder(run_dir, record, data.split, data.content_keys, resume),
        log_file(run_dir / LOG, early_log) as handler,
    ):
        _require_shared_folder(run_dir)
        with explain_end(command, run_dir, handler):
            write_known_scans(run_dir, data)
            yield


def _require_shared_folder(run_dir: Path) -> None:
    """Raise an InputError unless this process sees the folder that process 0 created."""
    begun = broadcast((run_dir / RECORD).read_text("utf-8") if is_first() else None)
    if not (run_dir / RECORD).exists() or (run_dir / RECORD).read_text("utf-8") != begun:
        raise InputError(f"--run-dir={run_dir}", "not visible to all processes", "Use a disk that all hosts share.")


@contextmanager
def log_file(path: Path, early_log: Sequence[logging.LogRecord]) -> Iterator[logging.Handler]:
    """Write the package's log lines to a file, those of `early_log` first."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(EscapingFormatter())
    package = logging.getLogger("jaxla")
    for line in early_log:
        handler.handle(line)
    package.addHandler(handler)
    try:
        yield handler
    finally:
        package.removeHandler(handler)
        handler.close()


@contextmanager
def explain_end(command: str, run_dir: Path, handler: logging.Handler) -> Iterator[None]:
    """Note in the log what ends a session early, and say which command resumes it."""

    def note(message: str) -> None:
        handler.handle(logging.LogRecord("jaxla.train", logging.ERROR, "", 0, message, None, None))

    try:
        with name_resume_command(command, note):
            yield
    except Stopped as stop:
        if not stop.resume_command:
            note(f"stopped {stop.reason}")
        raise Stopped(stop.reason, command) from stop
    except KeyboardInterrupt as stop:
        note("stopped before the end")
        raise Stopped("before the end", command) from stop
    except InputError as error:
        note(f"error: {error}")
        raise
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        explained = InputError(
            error.filename or run_dir, f"cannot be read or written ({error.strerror})", f"Fix this and run: {command}"
        )
        note(f"error: {explained}")
        raise explained from error


@contextmanager
def remove_if_unusable(run_dir: Path) -> Iterator[None]:
    """Remove the folder of a run that can take no step or no update, so that the next try may use it."""
    try:
        yield
    except (StepTooLarge, TooFewSteps):
        folders = (run_dir, *fold_folders(run_dir))
        if not any(checkpoint_steps(folder / CHECKPOINTS / LATEST) for folder in folders):
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
