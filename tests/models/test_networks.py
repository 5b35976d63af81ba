"""The convolutional networks as a user builds them: sizes, channels, counts, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxla.experiments import METHODS
from jaxla.models.build import parameter_count

import jaxla
from jaxla.config import InputError, Model
from jaxla.models import build
from jaxla.models.networks.attention_unet import AttentionUNet
from jaxla.models.networks.unet import UNet
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.train import list_experiments
from tests.parity.test_rivals import NETWORKS, network_of
from tests.tiny import randomise

# U-Net: 31 043 521 in the PyTorch version that most use, of which the biases of its three-channel form are left out;
# ResNet U-Nets: segmentation_models_pytorch's; SegNet: as published for one class.
PARAMETERS = {
    "unet": 31_036_481,
    "attention_unet": 33_127_365,
    "resnet50_unet": 32_521_105,
    "resnet152_unet": 67_156_881,
    "segnet": 29_443_585,
}


run = nnx.jit(lambda network, images: network(images))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(32, 32), (45, 61), (64, 33)])
def test_logits_have_the_images_size_whatever_it_is(name, size):
    net = nnx.eval_shape(lambda: NETWORKS[name](3, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, *size, 1), jnp.float32)
    graph, state = nnx.split(net)
    logits = jax.eval_shape(lambda state, images: nnx.merge(graph, state)(images), state, images)
    assert logits.shape == (2, *size, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_padded_is_cut_off_again_where_it_was_added(name):
    """An image whose border repeats, without it and with it: the same logits in the same place."""
    net, rng = network_of(name), np.random.default_rng(0)
    small = rng.random((1, 50, 57, 1), dtype=np.float32)
    lacking = [-side % getattr(net, "multiple", 32) for side in (50, 57)]
    top, left = (side // 2 for side in lacking)
    margins = ((0, 0), (top, lacking[0] - top), (left, lacking[1] - left), (0, 0))
    of_large = run(net, np.pad(small, margins, mode="edge"))
    np.testing.assert_array_equal(run(net, small), of_large[:, top : top + 50, left : left + 57])


@pytest.mark.parametrize("name", ["resnet_unet", "segnet"])
def test_grey_images_are_normalised_as_imagenets(name):
    net, images = network_of(name), np.random.default_rng(0).random((1, 40, 40, 1), dtype=np.float32)
    three = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
    np.testing.assert_allclose(run(net, images), run(net, three), rtol=0, atol=1e-5)  # measured: 0


@pytest.mark.parametrize("method", PARAMETERS)
def test_parameters_are_as_many_as_published(method):
    assert parameter_count(METHODS[method].model) == PARAMETERS[method]


def test_the_list_shows_parameters_input_and_recipe():
    lines = list_experiments(details=True).splitlines()
    where = next(i for i, line in enumerate(lines) if line.startswith("  segnet "))
    assert lines[where + 1].strip() == (
        "29.4 M parameters; 320×320 pixels; Adam 0.0001, at most 75 epochs, batches of 24"
    )
    assert sum("M parameters; " in line or "planned from the data; " in line for line in lines) == len(METHODS)


def test_attention_gates_weigh_the_skips():
    """With gates wide open the network is the U-Net of the same parameters; closed, no skip is left."""
    build = {"unet": UNet, "gated": AttentionUNet}
    nets = {
        name: randomise(nnx.eval_shape(lambda kind=kind: kind((4, 8, 8), 1, rngs=nnx.Rngs(0))))
        for name, kind in build.items()
    }
    for part in ("down", "up", "join", "logits"):
        nnx.update(getattr(nets["gated"], part), nnx.state(getattr(nets["unet"], part)))
    images = np.random.default_rng(0).random((1, 16, 16, 1), dtype=np.float32)

    def with_gates(bias):
        for gate in nets["gated"].gates:
            gate.psi.kernel.set_value(jnp.zeros_like(gate.psi.kernel[...]))
            gate.psi.bias.set_value(jnp.full(1, bias))
        return run(nets["gated"], images)

    np.testing.assert_allclose(with_gates(100.0), run(nets["unet"], images), rtol=0, atol=1e-6)
    for join in nets["unet"].join:  # skips are the first half of what is joined
        kernel = join.first.convolution.kernel
        kernel.set_value(kernel[...].at[:, :, : kernel.shape[2] // 2].set(0))
    np.testing.assert_allclose(with_gates(-100.0), run(nets["unet"], images), rtol=0, atol=1e-6)


def test_the_seed_decides_what_is_random_and_evaluation_is_the_mode():
    nets = [jaxla.build_network("unet", seed=seed) for seed in (0, 0, 1)]
    first, again, other = (np.asarray(net.logits.kernel[...]) for net in nets)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    images = np.random.default_rng(0).random((2, 32, 32, 1), dtype=np.float32)
    np.testing.assert_allclose(run(nets[0], images)[:1], run(nets[0], images[:1]), atol=1e-5)  # no batch's statistics


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("unet", (1, 7, 64, 1), "images of 7×64 pixels: at least 8×8 are needed"),
        ("unet", (1, 64, 64, 3), r"images of shape \(1, 64, 64, 3\): expected \[B, H, W, 1\]"),
        ("attention_unet", (1, 64, 4, 1), "images of 64×4 pixels: at least 8×8"),
        ("resnet_unet", (1, 31, 64, 1), "images of 31×64 pixels: at least 32×32"),
        ("segnet", (1, 64, 64, 2), r"expected \[B, H, W, 1\] or \[B, H, W, 3\]"),
        ("segnet", (1, 1, 64, 64), "channels come last"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(name, shape, words):
    net = nnx.eval_shape(lambda: NETWORKS[name](1, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=words):
        net(np.zeros(shape, np.float32))


def test_weights_for_a_network_that_has_none_are_refused():
    with pytest.raises(InputError, match=r"^--model.weights=some.safetensors: unet has no pretrained weights; leave"):
        jaxla.build_network("unet", weights="some.safetensors")


def test_another_number_of_widths_than_stages_is_refused():
    with pytest.raises(InputError, match="U-Net on resnet50 has 5 stages"):
        build.build_network(Model("resnet50", network="resnet_unet", weights="random", decoder_widths=(8, 8)), 1, 0)
