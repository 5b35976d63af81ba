"""A run's folder appears with all its files or not at all, and is locked by one process at a time."""

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from jaxla.experiments import EXPERIMENTS

from jaxla.config import InputError
from jaxla.data.labels import Labels
from jaxla.data.split import Split
from jaxla.runs.folder import is_running, require_free, require_resumable, run_folder
from jaxla.runs.record import Record, read_record
from tests.training.faults import limit_file_size, start_process

EXPERIMENT = EXPERIMENTS["quickstart"]
SPLIT = Split(("a", "b"), ("c",), ("d",))
CASES = {"a": "1", "b": "2", "c": "3", "d": "4"}
RECORD = Record(
    EXPERIMENT, "vit_mini8", "vit_mini8 (random weights, trained)", "96 × 96 pixels", "per volume", Labels(("LA",)),
    "random", "", SPLIT.sha256, "", "python -m jaxla.train", "2026-01-01T00:00:00+00:00",
    {"versions": {"jax": "0.10.0"}, "device": "cpu: cpu", "devices": 1},
)  # fmt: skip
FILES = {"experiment.json", "split.json", "cases.json", ".lock"}


def open_folder(folder: Path, resume: bool = False):
    return run_folder(folder, RECORD, SPLIT, CASES, resume)


def names(folder):
    return {path.name for path in folder.iterdir()}


def lock_until_killed(folder: Path, resume: bool = False) -> None:
    """Keep the folder locked until this process, which a test starts, is killed, or for 600 s."""
    try:
        with open_folder(folder, resume):
            print("inside", flush=True)
            time.sleep(600)
    except InputError as error:
        print(f"refused: {error}", flush=True)


def wait_for_answers(*logs):
    """Wait until every process has logged whether it holds the lock, and return the logs."""
    end = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert time.monotonic() < end
        time.sleep(0.01)
    return [log.read_text() for log in logs]


@pytest.fixture
def locked_folder(tmp_path):
    """A run's folder, and the process that keeps it locked."""
    folder = tmp_path / "runs" / "run"
    process = start_process(tmp_path / "holder.log", lock_until_killed, folder)
    assert wait_for_answers(tmp_path / "holder.log") == ["inside\n"]
    yield folder, process
    process.kill()
    process.join()


def test_a_run_appears_with_all_its_files(tmp_path):
    folder = tmp_path / "runs" / "run"
    with open_folder(folder):
        assert names(folder) == FILES
        assert names(tmp_path / "runs") == {"run"}
        assert read_record(folder) == RECORD
        assert json.loads((folder / "split.json").read_text()) == {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
        assert json.loads((folder / "cases.json").read_text()) == CASES
        assert is_running(folder)
    assert not is_running(folder)


def test_an_empty_folder_can_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    require_free(tmp_path / "run")
    with open_folder(tmp_path / "run"):
        assert names(tmp_path / "run") == FILES


def test_files_of_a_run_killed_at_its_start_are_replaced(tmp_path):
    for name in (".lock", "split.json", f".{32 * 'a'}.experiment.json"):
        (tmp_path / name).write_text("half")
    require_free(tmp_path)
    with open_folder(tmp_path):
        assert names(tmp_path) == FILES
        assert json.loads((tmp_path / "split.json").read_text())["val"] == ["c"]


def test_a_full_disk_leaves_no_folder(tmp_path):
    """The record, which is written last, is larger than the other files."""
    with limit_file_size(1000), pytest.raises(InputError) as error, open_folder(tmp_path / "run"):
        pass
    assert str(error.value).startswith(f"--run-dir={tmp_path / 'run'}: cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(locked_folder):
    folder, _ = locked_folder
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert is_running(folder)
    with pytest.raises(InputError, match=f"^--run-dir={folder}: another process is training in this folder"):
        require_resumable(folder, EXPERIMENT)
    with (
        pytest.raises(InputError, match=f"^--run-dir={folder}: another process is training in this folder"),
        open_folder(folder, True),
    ):
        pass
    with (
        pytest.raises(InputError, match=f"^--run-dir={folder}: another process is training in this folder"),
        open_folder(folder),
    ):
        pass
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert names(folder.parent) == {"run"}


def test_a_killed_process_releases_the_folder(locked_folder):
    folder, process = locked_folder
    os.kill(process.pid, 9)
    process.join()
    assert not is_running(folder)
    require_resumable(folder, EXPERIMENT)
    with open_folder(folder, True):
        assert is_running(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_lost_or_damaged_case_lists_are_written_again(tmp_path, content):
    with open_folder(tmp_path / "run"):
        pass
    before = {path: path.read_text() for path in (tmp_path / "run" / "cases.json", tmp_path / "run" / "split.json")}
    for path in before:
        path.unlink() if content is None else path.write_text(content)
    changed = replace(RECORD, data_sha256="changed")
    with (
        pytest.raises(InputError, match=r"^--resume: the data in .* differ from those that the run in"),
        run_folder(tmp_path / "run", changed, SPLIT, CASES, resume=True),
    ):
        pass
    with open_folder(tmp_path / "run", resume=True):
        assert {path: path.read_text() for path in before} == before


def test_resuming_records_each_session_and_the_new_data_folder(tmp_path):
    with open_folder(tmp_path / "run"):
        pass
    moved = replace(EXPERIMENT, data=replace(EXPERIMENT.data, root="/elsewhere"))
    now = replace(RECORD, experiment=moved, begun="2026-02-02T00:00:00+00:00", command="python -m jaxla.train --resume")
    for sessions in (1, 2):
        with run_folder(tmp_path / "run", now, SPLIT, CASES, resume=True):
            pass
        record = read_record(tmp_path / "run")
        assert (record.begun, record.command) == (RECORD.begun, RECORD.command)
        assert record.experiment.data.root == "/elsewhere"
        assert [session["begun"] for session in record.resumed] == [now.begun] * sessions


def test_resuming_with_different_settings_of_jax_is_logged(tmp_path, caplog):
    def record(**settings):
        return replace(RECORD, environment={**RECORD.environment, "settings": settings})

    started, resumed = record(XLA_FLAGS="--a", JAX_DISABLE_JIT="0"), record(XLA_FLAGS="--b", JAX_DISABLE_JIT="0")
    with run_folder(tmp_path, started, SPLIT, CASES, resume=False):
        pass
    caplog.set_level(logging.WARNING, "jaxla")
    for now in (started, resumed, record(JAX_DISABLE_JIT="0")):
        with run_folder(tmp_path, now, SPLIT, CASES, resume=True):
            pass
    assert caplog.messages == [
        "the run began with XLA_FLAGS=--a and resumes with XLA_FLAGS=--b: the result may differ",
        "the run began with XLA_FLAGS=--a and resumes with XLA_FLAGS not set: the result may differ",
    ]


def test_resuming_removes_half_written_files(tmp_path):
    with open_folder(tmp_path):
        pass
    half = tmp_path / "test" / "predictions" / f".{32 * 'a'}.train_1.nii.gz"
    half.parent.mkdir(parents=True)
    half.write_text("half")
    with run_folder(tmp_path, RECORD, SPLIT, CASES, resume=True):
        assert not half.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_one_of_two_processes_that_start_together_gets_the_folder(tmp_path, resume):
    if resume:
        with open_folder(tmp_path / "run"):
            pass
    logs = [tmp_path / "1.log", tmp_path / "2.log"]
    processes = [start_process(log, lock_until_killed, tmp_path / "run", resume) for log in logs]
    answers = sorted(wait_for_answers(*logs))
    assert answers[0] == "inside\n"
    assert answers[1].startswith(f"refused: --run-dir={tmp_path / 'run'}: another process is training in this folder")
    for process in processes:
        process.kill()
        process.join()
    assert names(tmp_path / "run") == FILES
