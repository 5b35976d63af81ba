"""Training that was ended at any moment goes on as if it had not been: to the bit, on CPU."""

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
from tests.training.faults import flip_a_bit, start_process
from tests.training.resume_driver import RECIPE, STEPS, as_command, make_trainer
from tests.training.scans import disc_scans


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """-> a function that starts a training in a folder, with options of the driver; its output is in `<folder>.log`."""
    shared = tmp_path_factory.mktemp("shared")
    disc_scans(shared / "scans")

    def start(folder, *options):
        arguments = [folder, shared / "scans", f"--compiled={shared / 'compiled'}", *options]
        return start_process(f"{folder}.log", as_command, arguments)

    return start


@pytest.fixture(scope="module")
def run(start):
    """`start`, and wait for the end; -> the exit code, and what this process said."""

    def run(folder, *options):
        log = folder.with_name(f"{folder.name}.log")
        said = log.stat().st_size if log.exists() else 0
        process = start(folder, *options)
        process.join(100)
        assert process.exitcode is not None
        return process.exitcode, log.read_text()[said:]

    return run


@pytest.fixture(scope="module")
def like():
    """The shapes of what checkpoints hold."""
    trainer = make_trainer()
    best = network_state(trainer.trainable, trainer.frozen.statistics)
    assert len(jax.tree.leaves(best["statistics"])) == 4  # mean and variance of two BatchNorms
    return {"best": best, "latest": {**best, "optimiser": trainer.optimiser_state}}


def restore(folder, kind, like, step):
    checkpoints = Checkpoints(folder / "checkpoints" / kind, read_only=True)
    trees, record = checkpoints.restore(like[kind], step)
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)], record


def timeless(metrics):
    return {key: value for key, value in metrics.items() if key not in ("seconds", "slices_per_second")}


def outcome(folder, like):
    """All that a training leaves, but for times: arrays by checkpoint, records, metrics."""
    arrays, records = {}, {}
    for kind in ("best", "latest"):
        (step,) = checkpoint_steps(folder / "checkpoints" / kind)  # after the end one of each kind is left
        arrays[kind], records[kind] = restore(folder, kind, like, step)
        records[kind]["step"] = step
    records["latest"]["history"] = [timeless(metrics) for metrics in records["latest"]["history"]]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return arrays, records, [timeless(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(run, like, tmp_path_factory):
    """What a training that nothing interrupts leaves."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, said = run(folder)
    assert code == 0, said
    arrays, records, lines = outcome(folder, like)
    assert "stopped early" in said
    assert 1 < records["best"]["epoch"] < len(lines) < RECIPE.epochs
    return arrays, records, lines


def assert_same(folder, like, uninterrupted):
    arrays, records, lines = outcome(folder, like)
    expected_arrays, expected_records, expected_lines = uninterrupted
    assert lines == expected_lines
    assert records == expected_records
    for kind in ("best", "latest"):
        for found, expected in zip(arrays[kind], expected_arrays[kind], strict=True):
            np.testing.assert_array_equal(found, expected, strict=True)


# --- ended at random moments ---


@pytest.mark.parametrize(
    ("signals", "save_every", "most_saves", "seed"),
    [([signal.SIGKILL], 0, 5, 1), ([signal.SIGKILL, signal.SIGTERM], 0.2, 2, 2)],
    ids=["SIGKILL", "SIGKILL or SIGTERM"],
)
def test_ended_at_random_moments_it_leaves_what_it_would_have_left(
    start, like, uninterrupted, tmp_path, signals, save_every, most_saves, seed
):
    """Each life ends a random while after a random number of saves, often while a checkpoint is written or removed."""
    rng = random.Random(seed)
    log, latest = tmp_path / "run.log", tmp_path / "run" / "checkpoints" / "latest"
    ended = []
    while 0 not in ended:
        process = start(tmp_path / "run", f"--save-every={save_every}")
        number, saves, delay = rng.choice(signals), rng.randint(1, most_saves), rng.uniform(0, 0.2)
        seen = set(checkpoint_steps(latest))
        while process.is_alive() and saves > 0:
            new = set(checkpoint_steps(latest)) - seen
            seen, saves = seen | new, saves - len(new)
            time.sleep(0.001)
        process.join(delay)
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join(100)
        ended.append(process.exitcode)
        assert process.exitcode in (0, -number if number == signal.SIGKILL else 1), log.read_text()
        assert len(ended) < 40
    assert len(ended) > 3
    assert log.read_text().count("resuming after") >= len(ended) - 2  # the first began, the second may have begun anew
    assert_same(tmp_path / "run", like, uninterrupted)


# --- ended at chosen moments ---


def test_ended_between_the_latest_and_the_best_checkpoint_the_best_is_made_up_for(run, like, uninterrupted, tmp_path):
    """In the fifth epoch, the best of all."""
    assert uninterrupted[1]["best"]["epoch"] == 5
    folder = tmp_path / "run"
    assert run(folder, "--dies-before-best=5")[0] == 9
    assert checkpoint_steps(folder / "checkpoints" / "latest")[0] == 5 * (STEPS + 1)
    assert checkpoint_steps(folder / "checkpoints" / "best") == [4, 3]
    code, said = run(folder)
    assert code == 0, said
    assert "resuming after 5 epochs and 0 steps" in said
    assert "was lost" not in said
    assert_same(folder, like, uninterrupted)


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    """A training that SIGTERM ended in the validation of its sixth epoch, the one after the best."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    code, said = run(folder, "--stopped-in-validation=6")
    assert (code, said.splitlines()[-1]) == (1, "stopped during validation")
    assert checkpoint_steps(folder / "checkpoints" / "latest") == [5 * (STEPS + 1) + STEPS, 5 * (STEPS + 1)]
    assert checkpoint_steps(folder / "checkpoints" / "best") == [5, 4]
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def test_stopped_in_validation_it_goes_on_with_validation(run, like, uninterrupted, copy):
    code, said = run(copy)
    assert code == 0, said
    assert f"resuming after 5 epochs and {STEPS} steps" in said
    assert "half-written" not in said
    assert "damaged" not in said
    assert_same(copy, like, uninterrupted)


def test_stopped_twice_in_one_validation_it_still_goes_on(run, like, uninterrupted, copy):
    code, said = run(copy, "--stopped-in-validation=6")
    assert (code, said.splitlines()[-1]) == (1, "stopped during validation")
    assert run(copy)[0] == 0
    assert_same(copy, like, uninterrupted)


def test_stopped_in_validation_just_after_it_was_saved(run, like, uninterrupted, tmp_path):
    code, said = run(tmp_path / "run", "--save-every=0", "--stopped-in-validation=1")
    assert (code, said.splitlines()[-1]) == (1, "stopped during validation")
    assert run(tmp_path / "run")[0] == 0
    assert_same(tmp_path / "run", like, uninterrupted)


# --- damaged checkpoints ---


def damage(checkpoint):
    """In the middle of its largest file."""
    flip_a_bit(max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))


def test_from_a_damaged_latest_checkpoint_training_falls_back_and_ends_the_same(run, like, uninterrupted, copy):
    latest = copy / "checkpoints" / "latest"
    newest, _ = checkpoint_steps(latest)
    damage(latest / str(newest))
    code, said = run(copy)
    assert code == 0, said
    assert f"{latest / str(newest)}: damaged checkpoint: " in said
    assert "the one before it is used" in said
    assert "resuming after 5 epochs and 0 steps" in said
    assert_same(copy, like, uninterrupted)


def test_without_a_whole_latest_checkpoint_nothing_is_trained_or_lost(run, copy):
    """Rather than to begin anew without a word."""
    latest, best = (copy / "checkpoints" / name for name in ("latest", "best"))
    for step in checkpoint_steps(latest):
        damage(latest / str(step))
    kept = (checkpoint_steps(best), (copy / "metrics.jsonl").read_text())
    for _ in range(2):
        code, said = run(copy)
        assert code == 2, said
        assert f"error: {latest}: no intact checkpoint is left of the 5 trained epochs" in said
        assert (checkpoint_steps(best), (copy / "metrics.jsonl").read_text()) == kept


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(run, like, uninterrupted, copy):
    """With the fifth epoch's gone, the fourth's is the best: the sixth is worse."""
    _, _, lines = uninterrupted
    assert lines[4]["val_dice"] > lines[3]["val_dice"] > lines[5]["val_dice"]
    best = copy / "checkpoints" / "best"
    damage(best / "5")
    fourth, record = restore(copy, "best", like, 4)
    assert record == {"epoch": 4, "dice": lines[3]["val_dice"]}
    code, said = run(copy)
    assert code == 0, said
    assert f"{best / '5'}: damaged checkpoint: " in said
    assert "the checkpoint of the best epoch, 5, was lost; epoch 4 replaces it" in said

    assert checkpoint_steps(best) == [4]
    again, record_again = restore(copy, "best", like, 4)
    assert record_again == record
    for x, y in zip(again, fourth, strict=True):
        np.testing.assert_array_equal(x, y)
    _, records, lines_again = outcome(copy, like)
    assert lines_again == lines
    latest, expected = records["latest"], uninterrupted[1]["latest"]
    assert latest == expected | {"best_epoch": 4, "best_dice": lines[3]["val_dice"]}
