"""Checkpoints: what was saved comes back to the bit, or is known to be damaged and the one before it comes back."""

import errno
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.config import InputError, Training, command_line_wording
from jaxla.models.networks.transformer_segmenter import LinearDecoder, TransformerSegmenter
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps
from jaxla.training.optimisers import make_optimiser
from jaxla.training.step import make_gradient, make_step, split_network
from tests.tiny import randomise, tiny_backbone
from tests.training.faults import files_at_most, flip_a_bit, said_by_us, truncate

RECORD = {"epoch": 2, "best_dice": 0.5, "lowest_loss": float("inf"), "batches": {"next_index": 7}}


@pytest.fixture(scope="module")
def training():
    """-> a step, and the trees of a network without BatchNorm after two of its steps."""
    decoder = nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0)))
    parts = split_network(TransformerSegmenter(tiny_backbone(), randomise(decoder, 1)), train_backbone=True)
    optimiser = make_optimiser(Training(learning_rate=1e-2, schedule="cosine"), 10, has_pretrained_backbone=True)
    jitted = make_step(make_gradient(parts.training), optimiser)
    rng = np.random.default_rng(0)
    batch = {
        "input": rng.random((2, 24, 40, 1), dtype=np.float32),
        "mask": rng.integers(0, 2, (2, 24, 40), np.uint8),
        "weight": np.ones(2, np.float32),
    }

    def step(trees):
        trainable, state = jax.tree.map(jnp.copy, (trees["trainable"], trees["optimiser"]))
        trainable, statistics, state, _ = jitted(trainable, parts.frozen, state, batch, jax.random.key(0))
        return {"trainable": trainable, "statistics": statistics, "optimiser": state}

    trees = {"trainable": parts.trainable, "optimiser": optimiser.init(parts.trainable)}
    return step, step(step(trees))


def shapes_of(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def test_parameters_optimiser_and_record_come_back_to_the_bit(tmp_path, training):
    step, trees = training
    checkpoints = Checkpoints(tmp_path / "latest")
    checkpoints.save(2, trees, RECORD)
    checkpoints.close()

    reopened = Checkpoints(tmp_path / "latest")
    restored, record = reopened.restore(shapes_of(trees), 2)
    reopened.close()
    assert record == RECORD
    assert len(jax.tree.leaves(restored["optimiser"])) > 2 * len(jax.tree.leaves(restored["trainable"]))
    assert jax.tree.leaves(restored["statistics"]) == []
    assert_identical(restored, trees)
    assert_identical(step(restored), step(trees))  # and training goes on the same


def test_the_newest_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "best")
    for step in (1, 2, 5):
        checkpoints.save(step, {"trainable": {"x": jnp.full(3, step)}}, {"epoch": step})
    assert checkpoints.steps() == [5, 2]
    assert names(tmp_path / "best") == {"2", "2.sha256", "5", "5.sha256"}
    for step in (2, 5):
        restored, record = checkpoints.restore({"trainable": {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}}, step)
        assert (restored["trainable"]["x"].tolist(), record) == ([step] * 3, {"epoch": step})
    checkpoints.close()


def test_trees_with_numbered_parts_come_back(tmp_path):
    tree = {"stages": [{"x": jnp.arange(3.0)}, {"x": jnp.arange(4)}], "rest": (jnp.float32(2), {7: jnp.ones(2)})}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"tree": tree}, {})
    restored, _ = checkpoints.restore(shapes_of({"tree": tree}), 1)
    checkpoints.close()
    assert_identical(restored["tree"], tree)


def test_a_folder_without_a_checkpoint_has_no_newest_one(tmp_path):
    checkpoints = Checkpoints(tmp_path / "best")
    assert checkpoints.find_newest_intact() is None
    checkpoints.close()
    assert checkpoint_steps(tmp_path / "best") == checkpoint_steps(tmp_path / "nowhere") == []


# --- damage ---


def names(folder):
    return {path.name for path in folder.iterdir()}


def tree_of(step):
    return {"trainable": {"x": jnp.arange(4000.0) * step, "y": jnp.full((2, 3), step)}}


def restored_is(checkpoints, step):
    trees, record = checkpoints.restore(shapes_of(tree_of(step)), step)
    assert_identical(trees, tree_of(step))
    assert record == {"epoch": step}
    return True


def save(folder, *steps):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, tree_of(step), {"epoch": step})
    checkpoints.close()
    return folder


def files(checkpoint):
    """Its files, the largest first."""
    return sorted((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, p))


def sums_of(checkpoint):
    return checkpoint.with_name(f"{checkpoint.name}.sha256")


def empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGED = {
    "a file truncated": lambda checkpoint: truncate(files(checkpoint)[0]),
    "a bit flipped": lambda checkpoint: flip_a_bit(files(checkpoint)[0]),
    "a file removed": lambda checkpoint: files(checkpoint)[0].unlink(),
    "the smallest file removed": lambda checkpoint: files(checkpoint)[-1].unlink(),
    "the record of the one before it": lambda checkpoint: shutil.copy(
        checkpoint.with_name("1") / "progress" / "metadata", checkpoint / "progress" / "metadata"
    ),
    "the folder emptied": empty,
    "sums of half the files": lambda checkpoint: truncate(sums_of(checkpoint)),
    "sums emptied": lambda checkpoint: sums_of(checkpoint).write_bytes(b""),
    "sums garbled": lambda checkpoint: sums_of(checkpoint).write_bytes(bytes(range(256))),
    "a bit of a sum flipped": lambda checkpoint: flip_a_bit(sums_of(checkpoint)),
}
UNFINISHED = {
    "no sums": lambda checkpoint: sums_of(checkpoint).unlink(),
    "a temporary folder": lambda checkpoint: (
        sums_of(checkpoint).unlink(),
        checkpoint.rename(checkpoint.with_name("2.orbax-checkpoint-tmp")),
    ),
}


@pytest.mark.parametrize("kind", [*DAMAGED, *UNFINISHED])
def test_every_damage_is_named_and_the_one_before_is_used(tmp_path, caplog, kind):
    folder = save(tmp_path / "latest", 1, 2)
    (DAMAGED | UNFINISHED)[kind](folder / "2")
    caplog.set_level(logging.WARNING, "jaxla")
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() == 1
    word = "damaged checkpoint" if kind in DAMAGED else "half-written checkpoint, removed"
    (said,) = said_by_us(caplog)
    assert said.startswith(f"{folder / '2'}")
    assert word in said
    assert restored_is(checkpoints, 1)
    assert names(folder) == {"1", "1.sha256"}

    for step in (2, 3):  # training goes on, and comes to that step again
        checkpoints.save(step, tree_of(step), {"epoch": step})
    checkpoints.close()
    caplog.clear()
    reopened = Checkpoints(folder)
    assert reopened.find_newest_intact() == 3
    assert reopened.steps() == [3, 2]
    assert restored_is(reopened, 3)
    assert restored_is(reopened, 2)
    reopened.close()
    assert said_by_us(caplog) == []


def test_a_bit_flipped_in_any_file_is_noticed(tmp_path):
    folder = save(tmp_path / "latest", 1)
    checkpoints = Checkpoints(folder, read_only=True)
    assert len(files(folder / "1")) > 5
    for path in files(folder / "1"):
        flip_a_bit(path, 0.9)
        assert checkpoints.find_damage(1) == f"{path.relative_to(folder / '1')} is missing or has changed"
        flip_a_bit(path, 0.9)
        assert checkpoints.find_damage(1) == ""
    checkpoints.close()


def test_a_damaged_checkpoint_is_not_restored(tmp_path):
    folder = save(tmp_path / "best", 1)
    flip_a_bit(files(folder / "1")[0])
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(InputError) as error:
        checkpoints.restore(shapes_of(tree_of(1)), 1)
    checkpoints.close()
    assert str(error.value).startswith(f"{folder / '1'}: damaged checkpoint: ")
    assert "\n" not in str(error.value)


def test_with_all_damaged_there_is_none(tmp_path, caplog):
    folder = save(tmp_path / "latest", 1, 2)
    for step in (1, 2):
        truncate(files(folder / str(step))[0])
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() is None
    assert [message.split(":")[0] for message in said_by_us(caplog)] == [str(folder / "2"), str(folder / "1")]
    checkpoints.save(1, tree_of(1), {"epoch": 1})
    assert restored_is(checkpoints, 1)
    checkpoints.close()


def test_a_checkpoint_whose_folder_is_gone_is_forgotten(tmp_path):
    folder = save(tmp_path / "latest", 1, 2)
    shutil.rmtree(folder / "2")
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() == 1
    checkpoints.close()
    assert names(folder) == {"1", "1.sha256"}


def test_reading_changes_nothing(tmp_path):
    folder = save(tmp_path / "best", 1, 2)
    sums_of(folder / "2").unlink()  # it may be that another process is writing it
    before = names(folder)
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.steps() == [1]
    assert restored_is(checkpoints, 1)
    checkpoints.close()
    assert names(folder) == before


@pytest.mark.parametrize(
    ("size", "floats"), [(4000, 9999), (300, 9999), (0, 9999), (1000, 3)], ids=["array", "metadata", "any", "sums"]
)
def test_a_disk_that_refuses_is_named_and_what_was_saved_is_kept(tmp_path, caplog, size, floats):
    """From the first file that is written at all to the sums, the last and, of three floats, the largest."""
    folder = save(tmp_path / "latest", 1, 2)
    noise = {"trainable": {"x": jax.random.normal(jax.random.key(0), (floats,))}}
    checkpoints = Checkpoints(folder)
    with files_at_most(size), command_line_wording(), pytest.raises(InputError) as error:
        checkpoints.save(3, noise, {"epoch": 3})
    message = str(error.value)
    assert message.startswith(f"{folder / '3'}: cannot be written ({os.strerror(errno.EFBIG)}")
    assert "--resume" in message
    assert "\n" not in message

    reopened = Checkpoints(folder)
    assert reopened.find_newest_intact() == 2
    assert restored_is(reopened, 2)
    assert not [message for message in said_by_us(caplog) if message.startswith(f"{folder / '2'}")]
    reopened.save(3, tree_of(3), {"epoch": 3})
    assert restored_is(reopened, 3)
    reopened.close()
    assert names(folder) == {"2", "2.sha256", "3", "3.sha256"}
