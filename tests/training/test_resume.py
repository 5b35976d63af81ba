"""Training that is interrupted at any moment and resumed is bit-identical, on CPU, to uninterrupted training."""

import json
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from jaxla.training.checkpoints import Checkpoints, checkpoint_steps, network_state
from tests.commands import snapshot
from tests.training.faults import flip_a_bit, start_process
from tests.training.resume_driver import RECIPE, STEPS, make_trainer, run_as_command
from tests.training.scans import disc_scans


@pytest.fixture(scope="module")
def start_training(tmp_path_factory):
    """A function that starts training in a folder with options of the driver; its output goes to `<folder>.log`."""
    shared = tmp_path_factory.mktemp("shared")
    disc_scans(shared / "scans")

    def start_training(folder, *options):
        arguments = [folder, shared / "scans", f"--compiled={shared / 'compiled'}", *options]
        return start_process(f"{folder}.log", run_as_command, arguments)

    return start_training


@pytest.fixture(scope="module")
def train(start_training):
    """A function that starts training and waits for its end; it returns the exit code and the output."""

    def train(folder, *options):
        log = folder.with_name(f"{folder.name}.log")
        before = log.stat().st_size if log.exists() else 0
        process = start_training(folder, *options)
        process.join(100)
        assert process.exitcode is not None
        return process.exitcode, log.read_text()[before:]

    return train


@pytest.fixture(scope="module")
def structures():
    """The structure of each kind of checkpoint."""
    trainer = make_trainer()
    best = network_state(trainer.trainable, trainer.frozen.statistics)
    assert len(jax.tree.leaves(best["statistics"])) == 4  # mean and variance of two BatchNorms
    return {"best": best, "latest": {**best, "optimiser": trainer.optimiser_state}}


def restore(folder, kind, structures, step):
    checkpoints = Checkpoints(folder / "checkpoints" / kind, read_only=True)
    trees, record = checkpoints.restore(structures[kind], step)
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)], record


def without_times(metrics):
    return {key: value for key, value in metrics.items() if key not in ("seconds", "slices_per_second")}


def outcome(folder, structures):
    """Return all results of training except times: arrays and records by kind of checkpoint, and metrics."""
    arrays, records = {}, {}
    for kind in ("best", "latest"):
        (step,) = checkpoint_steps(folder / "checkpoints" / kind)  # one checkpoint of each kind is left at the end
        arrays[kind], records[kind] = restore(folder, kind, structures, step)
        records[kind]["step"] = step
    records["latest"]["history"] = [without_times(metrics) for metrics in records["latest"]["history"]]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return arrays, records, [without_times(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(train, structures, tmp_path_factory):
    """The outcome of uninterrupted training."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = train(folder)
    assert code == 0, output
    arrays, records, lines = outcome(folder, structures)
    assert "stopped early" in output
    assert 1 < records["best"]["epoch"] < len(lines) < RECIPE.epochs
    return arrays, records, lines


def assert_same(folder, structures, uninterrupted):
    arrays, records, lines = outcome(folder, structures)
    expected_arrays, expected_records, expected_lines = uninterrupted
    assert lines == expected_lines
    assert records == expected_records
    for kind in ("best", "latest"):
        for found, expected in zip(arrays[kind], expected_arrays[kind], strict=True):
            np.testing.assert_array_equal(found, expected, strict=True)


# --- interrupted at random moments ---


@pytest.mark.parametrize(
    ("signals", "save_every", "most_saves", "seed"),
    [([signal.SIGKILL], 0, 5, 1), ([signal.SIGKILL, signal.SIGTERM], 0.2, 2, 2)],
    ids=["SIGKILL", "SIGKILL or SIGTERM"],
)
def test_training_interrupted_at_random_moments_gives_identical_results(
    start_training, structures, uninterrupted, tmp_path, signals, save_every, most_saves, seed
):
    """Each process ends a random time after a random number of saves, often while it writes or removes a checkpoint."""
    rng = random.Random(seed)
    log, latest = tmp_path / "run.log", tmp_path / "run" / "checkpoints" / "latest"
    ended = []
    while 0 not in ended:
        process = start_training(tmp_path / "run", f"--save-every={save_every}")
        signal_number, saves, delay = rng.choice(signals), rng.randint(1, most_saves), rng.uniform(0, 0.2)
        seen = set(checkpoint_steps(latest))
        while process.is_alive() and saves > 0:
            new = set(checkpoint_steps(latest)) - seen
            seen, saves = seen | new, saves - len(new)
            time.sleep(0.001)
        process.join(delay)
        if process.exitcode is None:
            os.kill(process.pid, signal_number)
        process.join(100)
        ended.append(process.exitcode)
        assert process.exitcode in (0, -signal_number if signal_number == signal.SIGKILL else 1), log.read_text()
        assert len(ended) < 40
    assert len(ended) > 3
    assert log.read_text().count("resuming after") >= len(ended) - 2  # the second process may also start from scratch
    assert_same(tmp_path / "run", structures, uninterrupted)


# --- interrupted at chosen moments ---


def test_best_checkpoint_is_saved_after_a_kill_between_saving_latest_and_best(
    train, structures, uninterrupted, tmp_path
):
    """The process is killed in the fifth epoch, which is the best."""
    assert uninterrupted[1]["best"]["epoch"] == 5
    folder = tmp_path / "run"
    assert train(folder, "--dies-before-best=5")[0] == 9
    assert checkpoint_steps(folder / "checkpoints" / "latest")[0] == 5 * (STEPS + 1)
    assert checkpoint_steps(folder / "checkpoints" / "best") == [4, 3]
    code, output = train(folder)
    assert code == 0, output
    assert "resuming after 5 epochs and 0 steps" in output
    assert "was lost" not in output
    assert_same(folder, structures, uninterrupted)


@pytest.fixture(scope="module")
def stopped_folder(train, tmp_path_factory):
    """Training that SIGTERM stopped in the validation of its sixth epoch, after the best epoch, the fifth."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    code, output = train(folder, "--stopped-in-validation=6")
    assert (code, output.splitlines()[-1]) == (1, "stopped during validation")
    assert checkpoint_steps(folder / "checkpoints" / "latest") == [5 * (STEPS + 1) + STEPS, 5 * (STEPS + 1)]
    assert checkpoint_steps(folder / "checkpoints" / "best") == [5, 4]
    return folder


@pytest.fixture
def stopped_copy(stopped_folder, tmp_path):
    return shutil.copytree(stopped_folder, tmp_path / "run")


def test_training_stopped_twice_in_one_validation_resumes_with_validation(
    train, structures, uninterrupted, stopped_copy
):
    code, output = train(stopped_copy, "--stopped-in-validation=6")
    assert (code, output.splitlines()[-1]) == (1, "stopped during validation")
    code, output = train(stopped_copy)
    assert code == 0, output
    assert f"resuming after 5 epochs and {STEPS} steps" in output
    assert "half-written" not in output
    assert "damaged" not in output
    assert_same(stopped_copy, structures, uninterrupted)


def test_training_stopped_in_validation_just_after_a_save_gives_identical_results(
    train, structures, uninterrupted, tmp_path
):
    code, output = train(tmp_path / "run", "--save-every=0", "--stopped-in-validation=1")
    assert (code, output.splitlines()[-1]) == (1, "stopped during validation")
    assert train(tmp_path / "run")[0] == 0
    assert_same(tmp_path / "run", structures, uninterrupted)


# --- damaged checkpoints ---


def damage(checkpoint):
    """Flip a bit in the middle of a checkpoint's largest file."""
    flip_a_bit(max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))


def test_damaged_latest_checkpoint_is_replaced_by_the_previous_one(train, structures, uninterrupted, stopped_copy):
    latest = stopped_copy / "checkpoints" / "latest"
    newest, _ = checkpoint_steps(latest)
    damage(latest / str(newest))
    code, output = train(stopped_copy)
    assert code == 0, output
    assert f"{latest / str(newest)}: damaged checkpoint (" in output
    assert "the previous one is used" in output
    assert "resuming after 5 epochs and 0 steps" in output
    assert_same(stopped_copy, structures, uninterrupted)


def test_training_without_an_intact_latest_checkpoint_is_refused_and_removes_nothing(train, stopped_copy):
    latest = stopped_copy / "checkpoints" / "latest"
    for step in checkpoint_steps(latest):
        damage(latest / str(step))
    before = snapshot(stopped_copy / "checkpoints"), (stopped_copy / "metrics.jsonl").read_text()
    code, output = train(stopped_copy)
    assert code == 2, output
    assert f"error: {latest}: no intact checkpoint of the 5 trained epochs is left" in output
    assert (snapshot(stopped_copy / "checkpoints"), (stopped_copy / "metrics.jsonl").read_text()) == before


def test_a_damaged_best_checkpoint_is_replaced_by_the_next_best(train, structures, uninterrupted, stopped_copy):
    """Without the fifth epoch the fourth is the best; the sixth is worse."""
    _, _, lines = uninterrupted
    assert lines[4]["val_dice"] > lines[3]["val_dice"] > lines[5]["val_dice"]
    best = stopped_copy / "checkpoints" / "best"
    damage(best / "5")
    fourth, record = restore(stopped_copy, "best", structures, 4)
    assert record == {"epoch": 4, "dice": lines[3]["val_dice"]}
    code, output = train(stopped_copy)
    assert code == 0, output
    assert f"{best / '5'}: damaged checkpoint (" in output
    assert "the checkpoint of the best epoch, 5, was lost; epoch 4 replaces it" in output

    assert checkpoint_steps(best) == [4]
    again, record_again = restore(stopped_copy, "best", structures, 4)
    assert record_again == record
    for x, y in zip(again, fourth, strict=True):
        np.testing.assert_array_equal(x, y)
    _, records, lines_again = outcome(stopped_copy, structures)
    assert lines_again == lines
    latest, expected = records["latest"], uninterrupted[1]["latest"]
    assert latest == expected | {"best_epoch": 4, "best_dice": lines[3]["val_dice"]}
