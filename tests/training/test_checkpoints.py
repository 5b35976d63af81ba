"""Checkpoints are restored bit for bit, or are recognised as damaged, and the previous one is restored."""

import errno
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint._src.serialization import ocdbt_utils

from jaxla.config import BackboneTraining, InputError, command_line_wording
from jaxla.models.networks.transformer_segmenter import LinearDecoder, TransformerSegmenter
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps
from jaxla.training.optimisers import make_optimiser, make_rates
from jaxla.training.step import make_gradient, make_step, split_network
from tests.tiny import randomise, tiny_backbone
from tests.training.faults import flip_a_bit, limit_file_size, package_messages, truncate

RECORD = {"epoch": 2, "best_dice": 0.5, "lowest_loss": float("inf"), "batches": {"next_index": 7}}


@pytest.fixture(scope="module")
def training():
    """A training step, and the state of a network without BatchNorm after two steps."""
    decoder = nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0)))
    parts = split_network(TransformerSegmenter(tiny_backbone(), randomise(decoder, 1)), train_backbone=True)
    recipe = BackboneTraining(learning_rate=1e-2, schedule="cosine")
    optimiser, rates = make_optimiser(recipe, has_pretrained_backbone=True), make_rates(recipe, 10)(0)
    jitted = make_step(make_gradient(parts.training), optimiser)
    rng = np.random.default_rng(0)
    batch = {
        "input": rng.random((2, 24, 40, 1), dtype=np.float32),
        "mask": rng.integers(0, 2, (2, 24, 40), np.uint8),
        "weight": np.ones(2, np.float32),
    }

    def step(trees):
        trainable, state = jax.tree.map(jnp.copy, (trees["trainable"], trees["optimiser"]))
        trainable, statistics, state, _ = jitted(trainable, parts.frozen, state, batch, jax.random.key(0), rates)
        return {"trainable": trainable, "statistics": statistics, "optimiser": state}

    trees = {"trainable": parts.trainable, "optimiser": optimiser.init(parts.trainable)}
    return step, step(step(trees))


def abstract_trees(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def test_parameters_optimiser_and_record_are_restored_bit_for_bit(tmp_path, training):
    step, trees = training
    checkpoints = Checkpoints(tmp_path / "latest")
    checkpoints.save(2, trees, RECORD)
    checkpoints.close()

    reopened = Checkpoints(tmp_path / "latest")
    restored, record = reopened.restore(abstract_trees(trees), 2)
    reopened.close()
    assert record == RECORD
    assert len(jax.tree.leaves(restored["optimiser"])) > 2 * len(jax.tree.leaves(restored["trainable"]))
    assert jax.tree.leaves(restored["statistics"]) == []
    assert_identical(restored, trees)
    assert_identical(step(restored), step(trees))  # training continues identically


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "best")
    for step in (1, 2, 5):
        checkpoints.save(step, {"trainable": {"x": jnp.full(3, step)}}, {"epoch": step})
    assert checkpoints.steps() == [5, 2]
    assert names(tmp_path / "best") == {"2", "2.sha256", "5", "5.sha256"}
    for step in (2, 5):
        restored, record = checkpoints.restore({"trainable": {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}}, step)
        assert (restored["trainable"]["x"].tolist(), record) == ([step] * 3, {"epoch": step})
    checkpoints.close()


def test_trees_with_lists_and_integer_keys_are_restored(tmp_path):
    tree = {"stages": [{"x": jnp.arange(3.0)}, {"x": jnp.arange(4)}], "rest": (jnp.float32(2), {7: jnp.ones(2)})}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"tree": tree}, {})
    restored, _ = checkpoints.restore(abstract_trees({"tree": tree}), 1)
    checkpoints.close()
    assert_identical(restored["tree"], tree)


def test_an_empty_folder_has_no_newest_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "best")
    assert checkpoints.find_newest_intact() == 0
    checkpoints.close()
    assert checkpoint_steps(tmp_path / "best") == checkpoint_steps(tmp_path / "nowhere") == []


ODD_NAMES = ["a[1]b", "[", "a*b", "a?b", "a{b}", "#1 100%", "a b", "José", "a:b", "~a", "$HOME"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_of_any_name_can_contain_checkpoints(tmp_path, name):
    save(tmp_path / "aXb" / "latest", 1)  # some of the names, read as patterns, match this folder
    folder = save(tmp_path / name / "latest", 1, 2, 3)
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.steps() == [3, 2]
    assert restores(checkpoints, 3)
    checkpoints.close()
    assert len([path for path in files(folder / "3") if path.parent.name == "array_metadatas"]) == 1


@pytest.mark.parametrize("folder", ["/s3/run", "/gs/run", "logs:/run", "a\\b"])
def test_a_folder_whose_path_orbax_misreads_is_refused(tmp_path, folder):
    with pytest.raises(InputError, match=r"Orbax treats th.* as a (remote store|slash)"):
        Checkpoints(tmp_path / folder)
    assert names(tmp_path) == set()


def test_a_checkpoint_that_cannot_be_opened_does_not_count_as_saved(tmp_path, monkeypatch):
    """Orbax merges what each process has written, and only logs it if it finds nothing to merge."""

    async def merge_nothing(*arguments, **options):
        pass

    folder = save(tmp_path / "latest", 1)
    checkpoints = Checkpoints(folder)
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge_nothing)
    with pytest.raises(InputError, match=f"{folder / '2'}: was written, but cannot be read back"):
        checkpoints.save(2, make_trees(2), {"epoch": 2})
    monkeypatch.undo()
    checkpoints.close()
    assert names(folder) == {"1", "1.sha256"}
    reopened = Checkpoints(folder, read_only=True)
    assert restores(reopened, 1)
    reopened.close()


def test_a_checkpoint_of_a_different_network_is_refused(tmp_path):
    folder = save(tmp_path / "best", 1)
    checkpoints = Checkpoints(folder, read_only=True)
    for shapes in ({"x": (5,), "y": (2, 3)}, {"x": (4000,), "z": (2, 3)}):
        like = {"trainable": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}}
        with pytest.raises(InputError, match="1: does not contain the arrays of this network"):
            checkpoints.restore(like, 1)
    checkpoints.close()


def test_copies_that_a_user_made_are_neither_read_nor_removed(tmp_path):
    folder = save(tmp_path / "latest", 1, 2)
    shutil.copytree(folder / "2", folder / "2 (copy)")
    shutil.copy(folder / "2.sha256", folder / "4 (copy).sha256")
    shutil.copy(folder / "2.sha256", folder / "02.sha256")
    before = names(folder)
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() == 2
    assert restores(checkpoints, 2)
    checkpoints.save(3, make_trees(3), {"epoch": 3})
    checkpoints.close()
    assert names(folder) == before - {"1", "1.sha256"} | {"3", "3.sha256"}


# --- damage ---


def names(folder):
    return {path.name for path in folder.iterdir()}


def make_trees(step):
    return {"trainable": {"x": jnp.arange(4000.0) * step, "y": jnp.full((2, 3), step)}}


def restores(checkpoints, step):
    trees, record = checkpoints.restore(abstract_trees(make_trees(step)), step)
    assert_identical(trees, make_trees(step))
    assert record == {"epoch": step}
    return True


def save(folder, *steps):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(step, make_trees(step), {"epoch": step})
    checkpoints.close()
    return folder


def files(checkpoint):
    """Return the files of a checkpoint, largest first."""
    return sorted((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, p))


def hash_file(checkpoint):
    return checkpoint.with_name(f"{checkpoint.name}.sha256")


def remove_content(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGED = {
    "a file truncated": lambda checkpoint: truncate(files(checkpoint)[0]),
    "a bit flipped": lambda checkpoint: flip_a_bit(files(checkpoint)[0]),
    "a file removed": lambda checkpoint: files(checkpoint)[0].unlink(),
    "the smallest file removed": lambda checkpoint: files(checkpoint)[-1].unlink(),
    "the record of the previous checkpoint": lambda checkpoint: shutil.copy(
        checkpoint.with_name("1") / "progress" / "metadata", checkpoint / "progress" / "metadata"
    ),
    "the folder emptied": remove_content,
    "hashes truncated": lambda checkpoint: truncate(hash_file(checkpoint)),
    "hashes emptied": lambda checkpoint: hash_file(checkpoint).write_bytes(b""),
    "hashes garbled": lambda checkpoint: hash_file(checkpoint).write_bytes(bytes(range(256))),
    "a bit of a hash flipped": lambda checkpoint: flip_a_bit(hash_file(checkpoint)),
}
UNFINISHED = {
    "no hashes": lambda checkpoint: hash_file(checkpoint).unlink(),
    "a temporary folder": lambda checkpoint: (
        hash_file(checkpoint).unlink(),
        checkpoint.rename(checkpoint.with_name("2.orbax-checkpoint-tmp")),
    ),
}


@pytest.mark.parametrize("kind", [*DAMAGED, *UNFINISHED])
def test_damage_is_reported_and_the_previous_checkpoint_is_used(tmp_path, caplog, kind):
    folder = save(tmp_path / "latest", 1, 2)
    (DAMAGED | UNFINISHED)[kind](folder / "2")
    caplog.set_level(logging.WARNING, "jaxla")
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() == 1
    word = "damaged checkpoint" if kind in DAMAGED else "half-written checkpoint, removed"
    (message,) = package_messages(caplog)
    assert message.startswith(f"{folder / '2'}")
    assert word in message
    assert restores(checkpoints, 1)
    checkpoints.remove_after(1)
    assert names(folder) == {"1", "1.sha256"}

    for step in (2, 3):  # training continues, and reaches that step again
        checkpoints.save(step, make_trees(step), {"epoch": step})
    checkpoints.close()
    caplog.clear()
    reopened = Checkpoints(folder)
    assert reopened.find_newest_intact() == 3
    assert reopened.steps() == [3, 2]
    assert restores(reopened, 3)
    assert restores(reopened, 2)
    reopened.close()
    assert package_messages(caplog) == []


def test_a_flipped_bit_in_any_file_is_found(tmp_path):
    folder = save(tmp_path / "latest", 1)
    checkpoints = Checkpoints(folder, read_only=True)
    assert len(files(folder / "1")) > 5
    for path in files(folder / "1"):
        flip_a_bit(path, 0.9)
        assert checkpoints.find_damage(1) == f"{path.relative_to(folder / '1')} is missing or has changed"
        flip_a_bit(path, 0.9)
        assert checkpoints.find_damage(1) == ""
    checkpoints.close()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = save(tmp_path / "best", 1)
    flip_a_bit(files(folder / "1")[0])
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(InputError) as error:
        checkpoints.restore(abstract_trees(make_trees(1)), 1)
    checkpoints.close()
    assert str(error.value).startswith(f"{folder / '1'}: damaged checkpoint (")
    assert "\n" not in str(error.value)


def test_if_all_checkpoints_are_damaged_none_is_used(tmp_path, caplog):
    folder = save(tmp_path / "latest", 1, 2)
    for step in (1, 2):
        truncate(files(folder / str(step))[0])
    before = names(folder)
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() == 0
    assert names(folder) == before
    assert [message.split(":")[0] for message in package_messages(caplog)] == [str(folder / "2"), str(folder / "1")]
    checkpoints.remove_after(0)
    checkpoints.save(1, make_trees(1), {"epoch": 1})
    assert restores(checkpoints, 1)
    checkpoints.close()


def test_hashes_without_a_checkpoint_are_removed(tmp_path):
    folder = save(tmp_path / "latest", 1, 2)
    shutil.rmtree(folder / "2")
    checkpoints = Checkpoints(folder)
    assert checkpoints.find_newest_intact() == 1
    checkpoints.close()
    assert names(folder) == {"1", "1.sha256"}


def test_reading_does_not_change_the_folder(tmp_path):
    folder = save(tmp_path / "best", 1, 2)
    hash_file(folder / "2").unlink()  # another process may be writing it
    before = names(folder)
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.steps() == [1]
    assert restores(checkpoints, 1)
    checkpoints.close()
    assert names(folder) == before


@pytest.mark.parametrize(
    ("size", "floats"), [(4000, 9999), (300, 9999), (0, 9999), (1000, 3)], ids=["array", "metadata", "any", "hashes"]
)
def test_a_full_disk_is_reported_and_saved_checkpoints_are_kept(tmp_path, caplog, size, floats):
    """Writing fails at the array, at the metadata, at the first file, or at the hashes, which are written last."""
    folder = save(tmp_path / "latest", 1, 2)
    noise = {"trainable": {"x": jax.random.normal(jax.random.key(0), (floats,))}}
    checkpoints = Checkpoints(folder)
    with limit_file_size(size), command_line_wording(), pytest.raises(InputError) as error:
        checkpoints.save(3, noise, {"epoch": 3})
    message = str(error.value)
    assert message.startswith(f"{folder / '3'}: cannot be written ({os.strerror(errno.EFBIG)}")
    assert "--resume" in message
    assert "\n" not in message

    reopened = Checkpoints(folder)
    assert reopened.find_newest_intact() == 2
    assert restores(reopened, 2)
    assert not [message for message in package_messages(caplog) if message.startswith(f"{folder / '2'}")]
    reopened.save(3, make_trees(3), {"epoch": 3})
    assert restores(reopened, 3)
    reopened.close()
    assert names(folder) == {"2", "2.sha256", "3", "3.sha256"}
