"""The convolutional networks as a user builds them: sizes, channels, parameter counts, refused input."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxla.experiments import METHODS

import jaxla
from jaxla.config import InputError
from jaxla.models.networks.attention_unet import AttentionUNet
from jaxla.models.networks.base import build_network, parameter_count
from jaxla.models.networks.resnet_unet import ResNetUNetOptions
from jaxla.models.networks.unet import UNet, UNetOptions
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.train import list_experiments
from tests.parity.test_rivals import NETWORKS, make_network
from tests.tiny import randomise

# U-Net: the common PyTorch version has 31 043 521, with biases and three input channels. ResNet U-Nets: as in
# segmentation_models_pytorch. SegNet: as published, for one class.
PARAMETERS = {
    "unet": 31_036_481,
    "attention_unet": 33_127_365,
    "resnet50_unet": 32_521_105,
    "resnet152_unet": 67_156_881,
    "segnet": 29_443_585,
}

pytestmark = pytest.mark.usefixtures("fast_compilation")
run = nnx.jit(lambda network, images: network(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_is_cropped_from_the_logits(name):
    """An image gives the same logits as a copy that was padded beforehand by repeating its border."""
    net, rng = make_network(name), np.random.default_rng(0)
    small = rng.random((1, 50, 57, 1), dtype=np.float32)
    padding = [-side % getattr(net, "multiple", 32) for side in (50, 57)]
    top, left = (side // 2 for side in padding)
    margins = ((0, 0), (top, padding[0] - top), (left, padding[1] - left), (0, 0))
    padded = run(net, np.pad(small, margins, mode="edge"))
    np.testing.assert_array_equal(run(net, small), padded[:, top : top + 50, left : left + 57])


@pytest.mark.parametrize("name", ["resnet_unet", "segnet"])
def test_grey_images_are_normalised_like_imagenet(name):
    net, images = make_network(name), np.random.default_rng(0).random((1, 40, 40, 1), dtype=np.float32)
    normalised = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
    np.testing.assert_allclose(run(net, images), run(net, normalised), rtol=0, atol=1e-5)  # measured: 0


@pytest.mark.parametrize("method", PARAMETERS)
def test_parameter_count_equals_the_published_count(method):
    assert parameter_count(METHODS[method].model) == PARAMETERS[method]


def test_list_of_methods_shows_parameters_input_and_recipe():
    lines = list_experiments(with_details=True).splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("  segnet "))
    assert lines[row + 1].strip() == (
        "29.4 M parameters; 320×320 pixels; Adam 0.0001, at most 75 epochs, batches of 24"
    )
    assert sum("M parameters; " in line or "planned from the data; " in line for line in lines) == len(METHODS)


def test_attention_gates_scale_the_skips():
    """Open gates give the U-Net with the same parameters; closed gates give that U-Net without skips."""
    nets = {
        name: randomise(nnx.eval_shape(lambda network=network: network((4, 8, 8), 1, rngs=nnx.Rngs(0))))
        for name, network in {"unet": UNet, "gated": AttentionUNet}.items()
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
    for join in nets["unet"].join:  # the skip is the first half of a join's input
        kernel = join.first.convolution.kernel
        kernel.set_value(kernel[...].at[:, :, : kernel.shape[2] // 2].set(0))
    np.testing.assert_allclose(with_gates(-100.0), run(nets["unet"], images), rtol=0, atol=1e-6)


def test_networks_depend_only_on_the_seed_and_are_in_evaluation_mode():
    nets = [build_network(UNetOptions(widths=(8, 16)), 1, seed) for seed in (0, 0, 1)]
    first, repeated, different = (np.asarray(net.logits.kernel[...]) for net in nets)
    np.testing.assert_array_equal(first, repeated)
    assert (first != different).any()
    images = np.random.default_rng(0).random((2, 32, 32, 1), dtype=np.float32)
    batched, alone = run(nets[0], images)[:1], run(nets[0], images[:1])
    np.testing.assert_allclose(batched, alone, atol=1e-5)


# --- refused input ---


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("unet", (1, 3, 64, 1), "images of 3×64 pixels: at least 4×4 are needed"),
        ("unet", (1, 64, 64, 3), r"images of shape \(1, 64, 64, 3\): expected \[B, H, W, 1\]"),
        ("attention_unet", (1, 64, 2, 1), "images of 64×2 pixels: at least 4×4"),
        ("resnet_unet", (1, 31, 64, 1), "images of 31×64 pixels: at least 32×32"),
        ("segnet", (1, 64, 64, 2), r"expected \[B, H, W, 1\] or \[B, H, W, 3\]"),
        ("segnet", (1, 1, 64, 64), "channels must come last"),
    ],
)
def test_images_with_a_wrong_shape_are_refused(name, shape, words):
    net = nnx.eval_shape(lambda: NETWORKS[name](1, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=words):
        net(np.zeros(shape, np.float32))


def test_weights_for_a_network_without_a_pretrained_part_are_refused():
    message = r"^weights=some.safetensors: has no effect, because unet has no pretrained part\. Remove"
    with pytest.raises(InputError, match=message):
        jaxla.build_network("unet", weights="some.safetensors")


def test_decoder_widths_must_match_the_stages():
    line = (
        r"^model.decoder_widths=\[8, 8\]: 2 widths, but the network needs 5. Set 5 widths, one for each decoder stage"
    )
    with pytest.raises(InputError, match=line):
        ResNetUNetOptions("resnet50", decoder_widths=(8, 8)).resolve()


@pytest.mark.parametrize(("norm", "is_robust"), [("instance", True), ("batch", False)])
def test_only_instance_norm_gives_a_dim_scan_the_logits_of_a_bright_scan(norm, is_robust):
    """Bright spots stretch a scan's grey range, so that its blood pool lies at 0.33 of the range instead of at 0.8."""
    network = randomise(nnx.eval_shape(lambda: UNet((4, 8, 8), 1, norm=norm, neighbours=1, rngs=nnx.Rngs(0))))
    network.eval()
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)
    bright, dim = (np.asarray(network(factor * images)) for factor in (0.8, 0.33))
    difference = np.abs(dim - bright).max() / np.abs(bright).max()
    assert difference < 0.01 if is_robust else difference > 0.1
