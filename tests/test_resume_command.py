"""--resume as a user runs it: an interrupted run gives the result of an uninterrupted one; changes are refused."""

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
from tests.commands import SMALL_RUN_OPTIONS, refuse, run_in_new_process


def small_run_options(data, run, cache):
    """Return the options of `small_run` with other folders."""
    return ["--exp=quickstart", f"--data.root={data}", f"--run-dir={run}", f"--cache-dir={cache}", *SMALL_RUN_OPTIONS]


def start(*options):
    command = [sys.executable, "-m", "jaxla.train", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the process ended without {text!r}: {process.stderr.read()}")


def metrics_without_times(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "slices_per_second")} for line in lines]


def test_killed_and_stopped_run_gives_identical_results_when_resumed(small_run, phantoms, tmp_path):
    """The run is killed after its first epoch, its data are moved, and it is stopped by SIGTERM in a later epoch."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    killed = start(*small_run_options(phantoms, run, cache))
    wait_for_line(killed, "epoch 1/3")
    killed.kill()
    killed.communicate()
    assert not (run / "report.html").exists()

    moved = shutil.copytree(phantoms, tmp_path / "moved")
    drawn = (run / "progress.png").stat().st_mtime_ns if (run / "progress.png").exists() else 0
    stopped = start(*small_run_options(moved, run, cache), "--resume")
    wait_for_line(stopped, "resuming after 1 epochs and 0 steps")
    while not ((run / "progress.png").exists() and (run / "progress.png").stat().st_mtime_ns > drawn):
        assert stopped.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)  # an epoch takes about ten times as long
    stopped.send_signal(signal.SIGTERM)
    _, stderr = stopped.communicate(timeout=100)
    assert stopped.returncode == 1
    (line,) = stderr.splitlines()
    assert re.match(r"stopped (in epoch [23], after \d+ of \d+ steps|during validation); resume with: ", line)
    python, *command = shlex.split(line.split("resume with: ")[1])
    assert python == "python"
    assert command[-2:] == [f"--run-dir={run}", "--resume"]

    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming after [12] epochs and [1-9]\d* steps", done.stdout)
    assert (run / "report.html").exists()
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(jaxla.load_network(r))) for r in (run, small_run)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert metrics_without_times(run / "metrics.jsonl") == metrics_without_times(small_run / "metrics.jsonl")
    for name in ("split.json", "test/cases.csv", "test/slices.csv", "test/summary.json"):
        assert (run / name).read_bytes() == (small_run / name).read_bytes(), name
    for path in (small_run / "test" / "predictions").iterdir():
        np.testing.assert_array_equal(
            nib.load(run / "test" / "predictions" / path.name).get_fdata(), nib.load(path).get_fdata()
        )
    log = (run / "train.log").read_text()
    assert [int(n) for n in re.findall(r"epoch (\d)/3: train loss", log)] == [1, 2, 3]


# --- refused attempts leave the run folder as it was ---


@pytest.fixture
def folder(small_run, phantoms, tmp_path):
    """A folder with the unfinished `run`, its `data` and its `cache`."""
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", "test", "stdout.txt"))
    shutil.copytree(phantoms, tmp_path / "data")
    shutil.copytree(small_run.parent / "cache", tmp_path / "cache")
    return tmp_path


def refuse_to_resume(folder, *options):
    """Resume with changed options, which must be refused; return the error line."""
    original = small_run_options(folder / "data", folder / "run", folder / "cache")
    return refuse(folder, "jaxla.train", *original, "--resume", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.epochs=5"], "--training.epochs is 5, but the run in {run} began with 3"),
        (["--training.batch_size=4", "--training.epochs=5"], "--training.epochs is 5, but"),  # the first of two changes
        (["--seed=2"], "--seed is 2, but the run in {run} began with 1"),
        (
            ["--method=dinov2_vits14", "--preprocessing.image_size=56"],
            "--method is dinov2_vits14, but the run in {run} began with vit_mini8",
        ),
        (["--exp=paper1", "--method=vit_mini8"], "--exp is paper1, but the run in {run} began with quickstart"),
        (["--data.labels=LA:255"], "--data.labels is LA:255, but the run in {run} began with not given"),
        (["--data.train_patients=2"], "--data.train_patients is 2, but the run in {run} began with 0"),
        (
            ["--model.decoder_widths=[64,32]"],
            "--model.decoder_widths is [64,32], but the run in {run} began with [64,3",
        ),
        (
            ["--model.weights=elsewhere.safetensors"],
            "--model.weights is elsewhere.safetensors, but the run in {run} beg",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_changed_option_is_named_with_both_values(folder, options, message):
    line = refuse_to_resume(folder, *options)
    assert f"error: --resume: {message.format(run=folder / 'run')}" in line
    assert "Resume with: python -m jaxla.train --exp=quickstart" in line
    assert line.endswith(" --resume")


def test_a_changed_default_is_added_to_the_command_that_resumes(folder):
    """The run began when another method was the default, or when its method had another default."""
    record, run = json.loads((folder / "run" / "experiment.json").read_text()), folder / "run"
    folders = [f"--data.root={folder / 'data'}", f"--run-dir={run}", f"--cache-dir={folder / 'cache'}"]

    def refuse_with(*words):
        record["command"] = " ".join(["python -m jaxla.train --exp=quickstart", *words, *folders])
        (run / "experiment.json").write_text(json.dumps(record))
        return refuse(folder, "jaxla.train", "--exp=quickstart", *words, *folders, "--resume")

    line = refuse_with(*(word for word in SMALL_RUN_OPTIONS if not word.startswith("--method=")))
    assert "--method is unet_small, but the run in" in line
    assert line.endswith(f" --method=vit_mini8 --run-dir={run} --resume")
    line = refuse_with(*(word for word in SMALL_RUN_OPTIONS if not word.startswith("--training.epochs=")))
    assert "--training.epochs is 4, but the run in" in line
    assert line.endswith(f" --training.epochs=3 --run-dir={run} --resume")


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
    ("change", "difference"),
    [
        (change_a_voxel, "case train_2 is a different scan or mask"),
        (change_a_mask, "case train_2 is a different scan or mask"),
        (remove_a_case, "case train_3 is missing"),
        (add_a_case, "case train_7 is new"),
    ],
)
def test_changed_data_are_named(folder, change, difference):
    change(folder / "data" / "task2" / "train_data")
    line = refuse_to_resume(folder)
    assert line.startswith(
        f"error: --resume: the data in {folder / 'data'} differ from those that the run in {folder / 'run'} began with"
        f": {difference}"
    )


def test_a_changed_split_is_named(folder):
    split = json.loads((folder / "run" / "split.json").read_text())
    split["val"], split["test"] = split["test"], split["val"]
    (folder / "split.json").write_text(json.dumps(split))
    assert refuse_to_resume(folder, f"--data.split={folder / 'split.json'}") == (
        f"error: --resume: --data.split={folder / 'split.json'} differs from the split that the run began with. "
        f"Use --data.split={folder / 'run' / 'split.json'}."
    )


def test_a_finished_run_is_not_resumed(folder):
    (folder / "run" / "report.html").touch()
    assert f"error: --resume: the run in {folder / 'run'} is finished. " in refuse_to_resume(folder)


def test_resume_needs_the_folder(folder):
    options = small_run_options(folder / "data", folder / "run", folder / "cache")
    options = [option for option in options if not option.startswith("--run-dir")]
    assert refuse(folder, "jaxla.train", *options, "--resume") == (
        "error: --resume: --run-dir is missing. Pass the folder of the run to resume."
    )


@pytest.mark.parametrize("name", ["nowhere", "data"])
def test_a_folder_without_a_run_is_named(folder, name):
    line = refuse_to_resume(folder, f"--run-dir={folder / name}")
    assert f"error: {folder / name}: not a run folder (no experiment.json). " in line


@pytest.mark.parametrize(("change", "message"), [(1, "by a newer version"), (-1, "by an earlier version")])
def test_a_run_of_another_version_is_refused(folder, change, message):
    path = folder / "run" / "experiment.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"version": record["version"] + change}))
    assert f"error: {folder / 'run'}: written {message} of jaxla. " in refuse_to_resume(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 5}'])
def test_a_damaged_record_is_named(folder, content):
    (folder / "run" / "experiment.json").write_text(content)
    assert f"error: {folder / 'run' / 'experiment.json'}: damaged" in refuse_to_resume(folder)


def test_two_processes_never_train_in_one_folder(folder):
    with FileLock(folder / "run" / ".lock"):
        line = refuse_to_resume(folder)
    assert f"error: --run-dir={folder / 'run'}: another process is training in this folder. " in line


def test_a_user_sees_one_line(folder):
    """The command runs in a new process."""
    line = refuse(
        folder,
        "jaxla.train",
        *small_run_options(folder / "data", folder / "run", folder / "cache"),
        "--resume",
        "--seed=2",
        run=run_in_new_process,
    )
    assert line.startswith("error: --resume: --seed is 2, but ")
