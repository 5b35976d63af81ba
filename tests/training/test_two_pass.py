"""Two passes over windows compute the gradient of the loss on a whole volume with the memory of one window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.config import Augmentation
from jaxla.models.networks.base import FAST_COMPILATION
from jaxla.models.networks.windows import WindowDecoder, WindowSegmenter
from jaxla.training.augmentation import augment as augment_batch
from jaxla.training.losses import cross_entropy, dice_cross_entropy, per_volume
from jaxla.training.step import make_gradient, split_network
from jaxla.training.two_pass import make_two_pass_gradient
from tests.tiny import randomise, tiny_backbone

KEY = jax.random.key(3)
SIZE = (40, 56)  # pixels: 5 × 7 patches, which two windows cannot divide equally
SLICES = (7, 5)  # slices of the two volumes in a batch
DICE = per_volume(partial(dice_cross_entropy, batch_dice=True))


def mean_over_windows(logits, mask, weight):
    """Return the mean of the Dice losses of two groups of slices."""
    return sum(DICE(logits[:, part], mask[:, part], weight[:, part]) for part in (slice(0, 4), slice(4, None))) / 2


LOSSES = [per_volume(cross_entropy), DICE, lambda *arguments: (DICE(*arguments) + 2) ** 3, mean_over_windows]


def make_network(counts, outputs=1):
    decoder = nnx.eval_shape(lambda: WindowDecoder(32, (16, 16, 8, 8), outputs, depth_places=4, rngs=nnx.Rngs(0)))
    return WindowSegmenter(tiny_backbone(), randomise(decoder, 1), counts)


def make_batch(outputs=1):
    rng = np.random.default_rng(0)
    shape = (len(SLICES), max(SLICES), *SIZE)
    return {
        "input": rng.random((*shape, 1), dtype=np.float32),
        "mask": rng.integers(0, max(2, outputs), shape).astype(np.uint8),
        "volume": np.arange(len(SLICES), dtype=np.int32),
        "weight": (np.arange(max(SLICES)) < np.array(SLICES)[:, None]).astype(np.float32),
    }


def compute_gradients(make, network, batch, losses=(DICE,), train_backbone=False, augment=None):
    """Return loss and gradient of every trained parameter for several losses, compiled once."""
    parts = split_network(network, train_backbone)

    @partial(jax.jit, compiler_options=FAST_COMPILATION)
    def gradient(chosen, *arguments):
        return make(parts.training, augment, lambda *inputs: jax.lax.switch(chosen, losses, *inputs))(*arguments)

    results = []
    for chosen in range(len(losses)):
        value, gradients, _ = gradient(chosen, parts.trainable, parts.frozen, batch, KEY)
        flat_gradients = dict(nnx.to_flat_state(gradients))
        assert flat_gradients.keys() == dict(nnx.to_flat_state(parts.trainable)).keys()
        arrays = {path: np.asarray(leaf.get_value(), np.float64) for path, leaf in flat_gradients.items()}
        results.append((float(value), arrays))
    return results


def relative_l2(ours, theirs, part="") -> float:
    names = [path for path in theirs if part in map(str, path) or not part]
    assert names
    difference = sum(np.square(ours[path] - theirs[path]).sum() for path in names)
    return np.sqrt(difference / sum(np.square(theirs[path]).sum() for path in names))


# --- the gradient ---


def test_two_pass_gradient_on_cached_features_equals_one_pass_gradient_on_images_for_any_loss():
    """Two volumes of 7 and 5 slices of 5 × 7 patches, padded to one shape, on a frozen backbone."""
    network, batch = make_network((5, 2, 3)), make_batch()
    features = np.stack([jax.jit(network.features)(jnp.asarray(volume)) for volume in batch["input"]])
    on_features = compute_gradients(
        make_two_pass_gradient, network.on_features(SIZE), batch | {"input": features}, LOSSES
    )
    on_images = compute_gradients(make_gradient, network, batch, LOSSES)
    for (a, ours), (b, one_pass) in zip(on_features, on_images, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
        assert relative_l2(ours, one_pass) <= 1e-5  # measured: 1.9e-7
    assert len({value for value, _ in on_images}) == len(LOSSES)
    # Dice is not a sum over windows, so the equalities above are not trivial.
    assert relative_l2(on_images[-1][1], on_images[1][1]) > 1e-2


def test_two_pass_gradient_of_finetuned_backbone_with_augmentation_equals_one_pass_gradient():
    augment = partial(augment_batch, Augmentation(rotation=20, flips=True, intensity=0.2))
    batch, network = make_batch(outputs=3), make_network((2, 2, 2), outputs=3)
    ((value, ours),), ((_, one_pass),) = (
        compute_gradients(make, network, batch, train_backbone=True, augment=augment)
        for make in (make_two_pass_gradient, make_gradient)
    )
    for part in ("backbone", "decoder"):
        assert relative_l2(ours, one_pass, part) <= 1e-5  # measured: at most 6.7e-8
    images, masks = augment(KEY, batch["input"], batch["mask"])
    assert np.abs(images - batch["input"]).max() > 0.5
    logits = nnx.jit(lambda network: network(images, batch["weight"] > 0))(network)
    assert value == pytest.approx(float(DICE(logits, masks, batch["weight"])), rel=1e-5)


# --- the memory ---


def decoder_bytes(make, count):
    """Return the bytes of temporary memory that the compiled gradient of `count` windows of four slices needs."""
    network = make_network((count, 1, 1))
    parts = split_network(network.on_features(SIZE), train_backbone=False)
    shape = (1, 4 * count)
    batch = {
        "input": jax.ShapeDtypeStruct((*shape, 4, 5, 7, 32), jnp.float32),
        "mask": jax.ShapeDtypeStruct((*shape, *SIZE), jnp.uint8),
        "weight": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    gradient = jax.jit(make(parts.training, None, DICE), compiler_options=FAST_COMPILATION)
    return gradient.lower(parts.trainable, parts.frozen, batch, KEY).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_backward_pass_is_that_of_one_window():
    two_pass, one_pass = (
        {count: decoder_bytes(make, count) for count in (2, 8)} for make in (make_two_pass_gradient, make_gradient)
    )
    logits_bytes = 4 * 4 * SIZE[0] * SIZE[1]  # logits of one window; the loss holds several copies
    assert two_pass[8] - two_pass[2] <= 6 * 8 * logits_bytes, two_pass
    assert one_pass[8] - one_pass[2] >= 5 * (two_pass[8] - two_pass[2]), (two_pass, one_pass)
