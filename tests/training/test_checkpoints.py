"""Checkpoints: what was saved comes back to the bit, and only the newest is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.config import InputError, Training
from jaxla.models.decoders import LinearDecoder
from jaxla.models.network import TransformerSegmenter
from jaxla.training.checkpoints import Checkpoints
from jaxla.training.step import make_gradient, make_optimiser, make_step, split_network
from tests.tiny import randomise, tiny_backbone

RECORD = {"epoch": 2, "best_dice": 0.5, "lowest_loss": float("inf"), "batches": {"next_index": 7}}


@pytest.fixture(scope="module")
def training():
    """-> a step, and the trees of a network without BatchNorm after two of its steps."""
    decoder = nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0)))
    parts = split_network(TransformerSegmenter(tiny_backbone(), randomise(decoder, 1)), train_backbone=True)
    optimiser = make_optimiser(Training(learning_rate=1e-2, schedule="cosine"), 10, pretrained_backbone=True)
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
    restored, record = reopened.restore(shapes_of(trees))
    reopened.close()
    assert record == RECORD
    assert len(jax.tree.leaves(restored["optimiser"])) > 2 * len(jax.tree.leaves(restored["trainable"]))
    assert jax.tree.leaves(restored["statistics"]) == []
    assert_identical(restored, trees)
    assert_identical(step(restored), step(trees))  # and training goes on the same


def test_only_the_newest_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "best")
    for epoch in (1, 2, 5):
        checkpoints.save(epoch, {"trainable": {"x": jnp.full(3, epoch)}}, {"epoch": epoch})
    restored, record = checkpoints.restore({"trainable": {"x": jax.ShapeDtypeStruct((3,), jnp.int32)}})
    checkpoints.close()
    assert (restored["trainable"]["x"].tolist(), record) == ([5, 5, 5], {"epoch": 5})
    assert [path.name for path in (tmp_path / "best").iterdir() if path.is_dir()] == ["5"]


def test_trees_with_numbered_parts_come_back(tmp_path):
    tree = {"stages": [{"x": jnp.arange(3.0)}, {"x": jnp.arange(4)}], "rest": (jnp.float32(2), {7: jnp.ones(2)})}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"tree": tree}, {})
    restored, _ = checkpoints.restore(shapes_of({"tree": tree}))
    checkpoints.close()
    assert_identical(restored["tree"], tree)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path / "best")
    with pytest.raises(InputError) as error:
        checkpoints.restore({"trainable": {}})
    checkpoints.close()
    assert str(error.value).startswith(f"{tmp_path / 'best'}: no checkpoint")
    assert "\n" not in str(error.value)
