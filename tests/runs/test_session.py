"""One session of a run: how it ends, what it logs, and what it leaves on disk."""

import errno
import logging
import os
import re

import pytest

from jaxla.cli.process import Stopped
from jaxla.config import InputError
from jaxla.memory import StepTooLarge
from jaxla.runs.session import buffered_log, explain_end, log_file, remove_if_unusable

COMMAND = "python -m jaxla.train --exp=quickstart --run-dir=run --resume"
log = logging.getLogger("jaxla.tests")


@pytest.fixture
def package():
    """The package's logger, at the level that commands set; a test must leave its handlers as they were."""
    package = logging.getLogger("jaxla")
    handlers, level = package.handlers[:], package.level
    package.setLevel(logging.INFO)
    yield package
    package.setLevel(level)
    assert package.handlers == handlers


def end_session(folder, error):
    """Raise an error within a session in `folder`; return the log."""
    with log_file(folder / "train.log", []) as handler, explain_end(COMMAND, folder, handler):
        raise error
    return (folder / "train.log").read_text()


@pytest.mark.quick
def test_log_begins_with_the_lines_logged_before_the_folder_existed(package, tmp_path):
    with buffered_log() as early:
        log.info("before the folder")
        with log_file(tmp_path / "train.log", early.buffer):
            log.info("within the run of %s", "a\x1b[2J.nii")
            with log_file(tmp_path / "fold.log", ()):
                log.info("within the fold")
        log.info("after the run")
    assert (
        tmp_path / "train.log"
    ).read_text() == "before the folder\nwithin the run of a\\x1b[2J.nii\nwithin the fold\n"
    assert (tmp_path / "fold.log").read_text() == "within the fold\n"


@pytest.mark.quick
def test_a_programming_error_keeps_its_traceback(package, tmp_path):
    """A missing file is more often a mistake in the package than a fault of the disk."""
    with pytest.raises(FileNotFoundError) as error:
        end_session(tmp_path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "nowhere.npy"))
    assert not isinstance(error.value, InputError)
    assert (tmp_path / "train.log").read_text() == ""


@pytest.mark.quick
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_error_names_the_file_and_the_command_that_resumes(package, tmp_path, number):
    with pytest.raises(InputError) as error:
        end_session(tmp_path, OSError(number, os.strerror(number), "metrics.jsonl"))
    line = f"metrics.jsonl: cannot be read or written ({os.strerror(number)}). Fix this and run: {COMMAND}"
    assert str(error.value) == line
    assert (tmp_path / "train.log").read_text() == f"error: {line}\n"


@pytest.mark.quick
@pytest.mark.parametrize("error", [Stopped("during validation"), KeyboardInterrupt()])
def test_a_stop_names_the_command_that_resumes(package, tmp_path, error):
    with pytest.raises(Stopped) as stop:
        end_session(tmp_path, error)
    assert stop.value.resume_command == COMMAND
    assert re.fullmatch(rf"(during validation|before the end); resume with: {re.escape(COMMAND)}", str(stop.value))
    assert (tmp_path / "train.log").read_text() == f"stopped {stop.value.reason}\n"


@pytest.mark.quick
def test_a_stop_in_a_fold_names_the_command_of_the_whole_run(package, tmp_path):
    with pytest.raises(Stopped) as stop, explain_end("outer command", tmp_path, logging.NullHandler()):
        end_session(tmp_path, Stopped("during validation"))
    assert stop.value.resume_command == "outer command"


@pytest.mark.quick
def test_a_run_too_large_for_memory_is_removed_only_if_nothing_was_saved(tmp_path):
    """Checkpoints of a fold count as well."""
    too_large = StepTooLarge(2, "too large")
    for saved in ("checkpoints/latest", "fold_0/checkpoints/latest", "fold_3/checkpoints/latest"):
        run_dir = tmp_path / saved.replace("/", "_")
        (run_dir / saved).mkdir(parents=True)
        (run_dir / saved / "12.sha256").write_text("{}")
        with pytest.raises(StepTooLarge), remove_if_unusable(run_dir):
            raise too_large
        assert (run_dir / saved / "12.sha256").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError), remove_if_unusable(empty):
        raise InputError("a file", "another fault", "Fix it.")
    assert empty.exists()
    with pytest.raises(StepTooLarge), remove_if_unusable(empty):
        raise too_large
    assert not empty.exists()
