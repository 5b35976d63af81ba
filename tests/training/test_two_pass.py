"""Two passes over windows give the gradient of the whole volume, and hold the memory of one window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.config import Augmentation
from jaxla.models.networks.windows import WindowDecoder, WindowSegmenter
from jaxla.training.augmentation import augment
from jaxla.training.losses import cross_entropy, dice_cross_entropy, per_volume
from jaxla.training.step import make_gradient, split_network
from jaxla.training.two_pass import make_two_pass_gradient
from tests.tiny import randomise, tiny_backbone

KEY = jax.random.key(3)
SIZE, SLICES = (40, 56), (7, 5)  # of slices, and of two volumes in one batch; 5 × 7 patches, which 2 do not divide
LAYOUTS = [(1, 1, 1), (3, 1, 1), (2, 2, 2), (5, 2, 3)]
DICE = per_volume(partial(dice_cross_entropy, batch_dice=True))
LOSSES = [per_volume(cross_entropy), DICE, lambda *of_volume: (DICE(*of_volume) + 2) ** 3]
FAST = {"xla_backend_optimization_level": 0}  # to compile, which is most of what these tests do


def network_of(counts, outputs=1, slicewise=False):
    decoder = nnx.eval_shape(
        lambda: WindowDecoder(32, (16, 16, 8, 8), outputs, depth_places=4, slicewise=slicewise, rngs=nnx.Rngs(0))
    )
    return WindowSegmenter(tiny_backbone(), randomise(decoder, 1), counts)


def batch_of(outputs=1):
    draw = np.random.default_rng(0)
    shape = (len(SLICES), max(SLICES), *SIZE)
    return {
        "input": draw.random((*shape, 1), dtype=np.float32),
        "mask": draw.integers(0, max(2, outputs), shape).astype(np.uint8),
        "volume": np.arange(len(SLICES), dtype=np.int32),
        "weight": (np.arange(max(SLICES)) < np.array(SLICES)[:, None]).astype(np.float32),
    }


def gradient_of(make, network, batch, loss=DICE, train_backbone=False, changes=None):
    """-> the loss's value, and the gradient of every parameter that is trained."""
    return next(gradients_of(make, network, batch, [loss], train_backbone, changes))


def gradients_of(make, network, batch, losses, train_backbone=False, changes=None):
    """The same for several losses, compiled once."""
    parts = split_network(network, train_backbone)

    @partial(jax.jit, compiler_options=FAST)
    def gradient(chosen, *arguments):
        return make(parts.training, changes, lambda *of_volume: jax.lax.switch(chosen, losses, *of_volume))(*arguments)

    for chosen in range(len(losses)):
        value, gradients, _ = gradient(chosen, parts.trainable, parts.frozen, batch, KEY)
        flat = dict(nnx.to_flat_state(gradients))
        assert flat.keys() == dict(nnx.to_flat_state(parts.trainable)).keys()
        yield float(value), {path: np.asarray(leaf.get_value(), np.float64) for path, leaf in flat.items()}


def relative_l2(ours, theirs, of="") -> float:
    names = [path for path in theirs if of in map(str, path) or not of]
    assert names
    difference = sum(np.square(ours[path] - theirs[path]).sum() for path in names)
    return np.sqrt(difference / sum(np.square(theirs[path]).sum() for path in names))


# --- the gradient ---


@pytest.mark.parametrize("counts", LAYOUTS)
def test_it_is_that_of_the_whole_for_any_loss(counts):
    """Two volumes of 7 and 5 slices of 5 × 7 patches, filled up to one shape, on a frozen backbone."""
    batch, network = batch_of(), network_of(counts)
    both = (gradients_of(make, network, batch, LOSSES) for make in (make_two_pass_gradient, make_gradient))
    values = []
    for (a, ours), (b, whole) in zip(*both, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
        assert relative_l2(ours, whole) <= 1e-5  # measured: at most 1.1e-7
        values.append(a)
    assert len(set(values)) == len(LOSSES)


@pytest.mark.parametrize(("counts", "outputs", "slicewise"), [((2, 2, 2), 3, False), ((3, 1, 1), 1, True)])
def test_so_it_is_where_the_backbone_is_trained_too(counts, outputs, slicewise):
    batch, network = batch_of(outputs), network_of(counts, outputs, slicewise)
    (_, ours), (_, whole) = (
        gradient_of(make, network, batch, train_backbone=True) for make in (make_two_pass_gradient, make_gradient)
    )
    for part in ("backbone", "decoder"):
        assert relative_l2(ours, whole, part) <= 1e-5  # measured: at most 6.7e-8


def test_so_it_is_of_features_that_were_computed_before():
    network, batch = network_of((2, 2, 1)), batch_of()
    features = np.stack([jax.jit(network.features)(jnp.asarray(volume)) for volume in batch["input"]])
    of_features = gradient_of(make_two_pass_gradient, network.on_features(SIZE), batch | {"input": features})
    of_images = gradient_of(make_gradient, network, batch)
    assert relative_l2(of_features[1], of_images[1]) <= 1e-5  # measured: 1.9e-7


def test_so_it_is_of_augmented_volumes():
    changes = partial(augment, Augmentation(rotation=20, flips=True, intensity=0.2))
    network, batch = network_of((2, 1, 1)), batch_of()
    (a, ours), (_, whole) = (
        gradient_of(make, network, batch, changes=changes) for make in (make_two_pass_gradient, make_gradient)
    )
    assert relative_l2(ours, whole) <= 1e-5  # measured: 4.8e-10
    images, masks = changes(KEY, batch["input"], batch["mask"])
    assert a == pytest.approx(
        gradient_of(make_two_pass_gradient, network, batch | {"input": images, "mask": masks})[0], rel=1e-5
    )
    assert np.abs(images - batch["input"]).max() > 0.5


def test_a_loss_of_each_window_by_itself_has_another_gradient():
    """So equality is no matter of course: Dice is no sum over windows."""
    network = network_of((3, 1, 1))
    batch = {name: of_all[:1] for name, of_all in batch_of().items()}  # the volume of seven slices

    def of_windows(logits, mask, weight):
        windows = ((0, 2), (2, 4), (4, 7))
        return sum(DICE(logits[:, a:b], mask[:, a:b], weight[:, a:b]) for a, b in windows) / len(windows)

    (_, whole), (_, apart) = gradients_of(make_gradient, network, batch, [DICE, of_windows])
    assert relative_l2(apart, whole) > 1e-2


# --- the memory ---


def decoder_bytes(make, count):
    """Of a gradient's program, what lies between its arguments and results, for so many windows of four slices."""
    network = network_of((count, 1, 1))
    parts = split_network(network.on_features(SIZE), train_backbone=False)
    shape = (1, 4 * count)
    batch = {
        "input": jax.ShapeDtypeStruct((*shape, 4, 5, 7, 32), jnp.float32),
        "mask": jax.ShapeDtypeStruct((*shape, *SIZE), jnp.uint8),
        "weight": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    gradient = jax.jit(make(parts.training, None, DICE), compiler_options=FAST)
    return gradient.lower(parts.trainable, parts.frozen, batch, KEY).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_going_back_is_that_of_one_window():
    two_pass, whole = (
        {count: decoder_bytes(make, count) for count in (2, 8)} for make in (make_two_pass_gradient, make_gradient)
    )
    of_logits = 4 * 4 * SIZE[0] * SIZE[1]  # of a window's slices, which the loss holds some times over
    assert two_pass[8] - two_pass[2] <= 6 * 8 * of_logits, two_pass
    assert whole[8] - whole[2] >= 5 * (two_pass[8] - two_pass[2]), (two_pass, whole)
