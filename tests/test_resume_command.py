"""--resume as a user runs it: a training that was killed and stopped ends as one that was not; and what is refused."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock
from flax import nnx

import jaxla
from tests.commands import refuse


def options_of(data, run, cache):
    """Those of `small_run`."""
    return [
        "--exp=quickstart", f"--data.root={data}", f"--run-dir={run}", f"--cache-dir={cache}",
        "--preprocessing.image_size=48", "--training.epochs=3", "--seed=1",
    ]  # fmt: skip


def start(*options):
    command = [sys.executable, "-m", "jaxla.train", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"it ended without {text!r}: {process.stderr.read()}")


def timeless(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "slices_per_second")} for line in lines]


def test_killed_then_stopped_then_resumed_it_ends_as_if_nothing_had_happened(small_run, phantoms, tmp_path):
    """Killed after its first epoch, the data moved to another folder, stopped in the second, then left alone."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    killed = start(*options_of(phantoms, run, cache))
    wait_for_line(killed, "epoch 1/3")
    killed.kill()
    killed.communicate()
    assert not (run / "report.html").exists()

    moved = shutil.copytree(phantoms, tmp_path / "moved")
    drawn = (run / "progress.png").stat().st_mtime_ns if (run / "progress.png").exists() else 0
    stopped = start(*options_of(moved, run, cache), "--resume")
    wait_for_line(stopped, "goes on after 1 epochs and 0 steps")
    while not ((run / "progress.png").exists() and (run / "progress.png").stat().st_mtime_ns > drawn):
        assert stopped.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)  # the epoch that it now begins takes ten times as long
    stopped.send_signal(signal.SIGTERM)
    _, stderr = stopped.communicate(timeout=100)
    assert stopped.returncode == 1
    (line,) = stderr.splitlines()
    assert re.match(r"stopped in epoch 2, after \d+ of \d+ steps; go on with: ", line)
    python, *command = shlex.split(line.split("go on with: ")[1])
    assert python == "python"
    assert command[-2:] == [f"--run-dir={run}", "--resume"]

    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"goes on after 1 epochs and [1-9]\d* steps", done.stdout)
    assert (run / "report.html").exists()
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(jaxla.load_network(r))) for r in (run, small_run)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert timeless(run / "metrics.jsonl") == timeless(small_run / "metrics.jsonl")
    for name in ("split.json", "test/cases.csv", "test/slices.csv", "test/summary.json"):
        assert (run / name).read_bytes() == (small_run / name).read_bytes(), name
    for path in (small_run / "test" / "predictions").iterdir():
        np.testing.assert_array_equal(
            nib.load(run / "test" / "predictions" / path.name).get_fdata(), nib.load(path).get_fdata()
        )
    log = (run / "train.log").read_text()
    assert [int(n) for n in re.findall(r"epoch (\d)/3: train loss", log)] == [1, 2, 3]


# --- what is refused: exit code 2, one line, and the run folder as it was ---


@pytest.fixture
def folder(small_run, phantoms, tmp_path):
    """Holds `run`, which is not finished, its `data` and `cache`."""
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", "test", "stdout.txt"))
    shutil.copytree(phantoms, tmp_path / "data")
    shutil.copytree(small_run.parent / "cache", tmp_path / "cache")
    return tmp_path


def refused(folder, *options, resume=True):
    """-> the line; a later option of the same name wins."""
    given = options_of(folder / "data", folder / "run", folder / "cache")
    return refuse(folder, "jaxla.train", *given, *(["--resume"] if resume else []), *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.epochs=5"], "--training.epochs is 5, but the run in {run} was begun with 3"),
        (["--training.batch_size=4", "--training.epochs=5"], "--training.epochs is 5, but"),  # the first of two
        (["--seed=2"], "--seed is 2, but the run in {run} was begun with 1"),
        (
            ["--method=dinov2_vits14", "--preprocessing.image_size=56"],
            "--method is dinov2_vits14, but the run in {run} was begun with vit_mini8",
        ),
        (["--exp=paper1", "--method=vit_mini8"], "--exp is paper1, but the run in {run} was begun with quickstart"),
        (["--data.labels=LA:255"], "--data.labels is LA:255, but the run in {run} was begun with not given"),
        (["--data.train_patients=2"], "--data.train_patients is 2, but the run in {run} was begun with 0"),
        (
            ["--model.decoder_widths=[64,32]"],
            "--model.decoder_widths is [64,32], but the run in {run} was begun with [64,32,16]",
        ),
        (
            ["--model.weights=elsewhere.safetensors"],
            "--model.weights is elsewhere.safetensors, but the run in {run} was",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_option_is_named_with_both_values(folder, options, message):
    line = refused(folder, *options)
    assert f"error: --resume: option {message.format(run=folder / 'run')}" in line
    assert "it was begun by: python -m jaxla.train --exp=quickstart" in line


def change_a_voxel(cases):
    path = cases / "train_2" / "enhanced.nii.gz"
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[5, 5, 5] += 1
    nib.save(nib.Nifti1Image(array, image.affine, image.header), path)


def change_a_mask(cases):
    path = cases / "train_2" / "atriumSegImgMO.nii.gz"
    mask = nib.load(path)
    array = np.asarray(mask.dataobj).copy()
    array[5, 5, 5] = 255 - array[5, 5, 5]
    nib.save(nib.Nifti1Image(array, mask.affine, mask.header), path)


def remove_a_case(cases):
    shutil.rmtree(cases / "train_3")


def add_a_case(cases):
    shutil.copytree(cases / "train_2", cases / "train_7")
    path = cases / "train_7" / "enhanced.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine, image.header), path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_a_voxel, "case train_2 is another scan or mask"),
        (change_a_mask, "case train_2 is another scan or mask"),
        (remove_a_case, "case train_3 is gone"),
        (add_a_case, "case train_7 is new"),
    ],
)
def test_other_data_are_named(folder, change, what):
    change(folder / "data" / "task2" / "train_data")
    line = refused(folder)
    assert f"--resume: the data in {folder / 'data'} are not those that the run in {folder / 'run'} was begun" in line
    assert what in line


def test_another_split_is_named(folder):
    split = json.loads((folder / "run" / "split.json").read_text())
    split["val"], split["test"] = split["test"], split["val"]
    (folder / "split.json").write_text(json.dumps(split))
    line = refused(folder, f"--data.split={folder / 'split.json'}")
    assert (
        f"--data.split={folder / 'split.json'} is not the split that the run in {folder / 'run'} was begun with" in line
    )
    assert f"give {folder / 'run' / 'split.json'}" in line


def test_a_finished_run_is_not_resumed(folder):
    (folder / "run" / "report.html").touch()
    assert f"--resume: the run in {folder / 'run'} is finished" in refused(folder)


def test_resume_needs_the_folder(folder):
    given = options_of(folder / "data", folder / "run", folder / "cache")
    line = refuse(folder, "jaxla.train", *[o for o in given if not o.startswith("--run-dir")], "--resume")
    assert line == "error: option --resume needs --run-dir: the folder of the run to go on with"


@pytest.mark.parametrize("name", ["nowhere", "data"])
def test_a_folder_that_is_no_run_is_named(folder, name):
    line = refused(folder, f"--run-dir={folder / name}")
    assert f"error: {folder / name}: not a run folder (no experiment.json)" in line


@pytest.mark.parametrize(("change", "message"), [(1, "by a newer version"), (-1, "by an earlier version")])
def test_a_run_of_another_version_is_refused(folder, change, message):
    path = folder / "run" / "experiment.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"version": record["version"] + change}))
    assert f"error: {folder / 'run'}: written {message} of this package" in refused(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 4}'])
def test_a_damaged_record_is_named(folder, content):
    (folder / "run" / "experiment.json").write_text(content)
    assert f"error: {folder / 'run' / 'experiment.json'}: damaged" in refused(folder)


def test_two_processes_never_train_in_one_folder(folder):
    with FileLock(folder / "run" / ".lock"):
        assert f"--run-dir={folder / 'run'}: another process is training there" in refused(folder)


def test_a_new_training_never_begins_in_the_folder_of_an_unfinished_one(folder):
    line = refused(folder, resume=False)
    assert f"--run-dir={folder / 'run'}: already holds a run; go on with it by --resume" in line


def test_a_user_sees_one_line(folder):
    """The same in a process of its own."""
    done = start(*options_of(folder / "data", folder / "run", folder / "cache"), "--resume", "--seed=2")
    stdout, stderr = done.communicate(timeout=100)
    assert (done.returncode, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert "option --seed is 2" in stderr
