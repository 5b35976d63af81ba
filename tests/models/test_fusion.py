"""Paper 2's network: parity with PyTorch, the weights of the blocks, and its inputs."""

import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.config import InputError
from jaxla.data.batches import SliceSource, training_batches
from jaxla.data.inputs import Canvas
from jaxla.models.backbones import TRANSFORMERS
from jaxla.models.networks.base import build_network
from jaxla.models.networks.fusion import (
    Fusion,
    FusionDecoder,
    FusionOptions,
    FusionSegmenter,
    weighted_product,
    weighted_sums,
)
from jaxla.models.ops.images import three_channels
from jaxla.training.features import FeatureCache
from jaxla.training.step import make_gradient, split_network
from tests.parity.references import make_reference, network_to_torch
from tests.tiny import ROTARY, TINY, randomise, tiny_backbone
from tests.training.scans import disc_scans

SIZE = (24, 40)  # H, W of the images; h, w of the features are 3, 5
WIDTHS = (12, 8, 4)
IMAGE_STAGES = ("all", "last", "none")
VARIANTS = (weighted_sums, weighted_product)

# Tests of parity and memory come first: once used, `fast_compilation` stays active for the rest of the module.
fast = pytest.mark.usefixtures("fast_compilation")


def make_decoder(blocks=3, outputs=1, seed=0, dtype=jnp.float32, **options):
    """Return a decoder in evaluation mode with random parameters."""
    decoder = randomise(
        nnx.eval_shape(lambda: FusionDecoder(32, blocks, WIDTHS, outputs, dtype=dtype, rngs=nnx.Rngs(0), **options)),
        seed,
    )
    for _, variable in nnx.to_flat_state(nnx.state(decoder)):
        variable.set_value(jnp.asarray(np.asarray(variable), dtype))
    decoder.eval()
    return decoder


def make_network(blocks=(0, 1, 2), variant=TINY, **options):
    return FusionSegmenter(tiny_backbone(variant=variant), blocks, make_decoder(len(blocks), **options))


def random_inputs(batch=2, blocks=3, dtype=np.float32):
    """Return features [B, blocks, h, w, C] and images [B, H, W, 1]."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((batch, blocks, 3, 5, 32)).astype(dtype), rng.random((batch, *SIZE, 1)).astype(dtype)


def to_torch(features, images):
    images = np.asarray(three_channels(jnp.asarray(images)))
    return (
        torch.from_numpy(np.ascontiguousarray(features.transpose(0, 1, 4, 2, 3))),
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
    )


def jitted(network):
    graph, state = nnx.split(network)
    run = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))
    return lambda inputs: run(state, inputs)


# --- parity with PyTorch ---


@pytest.mark.parametrize(("image", "weights"), [("all", "per_level"), ("last", "shared"), ("none", "uniform")])
def test_logits_equal_pytorch(image, weights):
    decoder, (features, images) = make_decoder(outputs=3, image=image, weights=weights), random_inputs()
    inputs = (features, images) if decoder.reads_images else features
    ours = jax.jit(lambda inputs: decoder(inputs, SIZE))(inputs)
    with torch.no_grad():
        theirs = make_reference(decoder, SIZE)(*to_torch(features, images)).numpy().transpose(0, 2, 3, 1)
    assert (ours.shape, ours.dtype) == ((2, *SIZE, 3), jnp.float32)
    assert np.std(theirs) > 0.2
    np.testing.assert_allclose(ours, theirs, atol=2e-6)  # measured: 3.6e-7


def test_gradients_and_statistics_equal_pytorch():
    """Compared in float64, because in float32 rounding moves activations across a ReLU's zero."""
    with jax.enable_x64():
        decoder, (features, images) = make_decoder(dtype=jnp.float64), random_inputs(dtype=np.float64)
        weight = np.random.default_rng(2).standard_normal((2, *SIZE, 1))
        theirs = make_reference(decoder, SIZE).train()
        decoder.train()
        graph, parameters, rest = nnx.split(decoder, nnx.Param, ...)

        def loss(parameters):
            network = nnx.merge(graph, parameters, rest, copy=True)
            return (network((features, images), SIZE) * weight).mean(), nnx.state(network, nnx.BatchStat)

        gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))(parameters)
        (theirs(*to_torch(features, images)) * torch.from_numpy(weight.transpose(0, 3, 1, 2).copy())).mean().backward()
        ours, expected = network_to_torch(decoder, gradients), dict(theirs.named_parameters())
        assert ours.keys() == expected.keys()
        for name, parameter in expected.items():
            error = np.linalg.norm(ours[name] - parameter.grad.numpy()) / np.linalg.norm(parameter.grad.numpy())
            assert error <= 1e-13, name  # measured: 4.6e-15
        buffers = dict(theirs.named_buffers())
        ours = network_to_torch(decoder, statistics)
        assert len(ours) == 2 * 3 * 2  # mean and variance of the stem and two convolutions in two stages
        for name, value in ours.items():
            np.testing.assert_allclose(value, buffers[name], rtol=1e-13, err_msg=name)  # measured: 3.3e-15


# --- memory ---


def test_memory_of_fine_tuning_is_linear_in_the_number_of_blocks():
    """The gradient of the features is compiled for 4 and for 32 blocks of 1 MB each."""

    def temporary_bytes(blocks):
        fusion = Fusion(4, blocks, "per_level")
        features = jax.ShapeDtypeStruct((1, blocks, 64, 64, 64), jnp.float32)
        gradient = jax.grad(lambda features: sum(jnp.sum(level**2) for level in fusion(features)))
        return jax.jit(gradient).lower(features).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(4), temporary_bytes(32)
    assert many - few <= 28 * 2**20  # measured: 1 MB


# --- weights ---


@pytest.mark.parametrize(("weights", "count"), [("per_level", 9), ("shared", 3), ("uniform", 0)])
def test_weights_start_equal_and_sum_to_1(weights, count):
    fusion = Fusion(3, 3, weights)
    np.testing.assert_allclose(fusion.weights(), np.full((3, 3), 1 / 3), rtol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(fusion, nnx.Param))) == count
    network = make_network(weights=weights)  # random scalars
    levels = np.array(network.block_weights()["levels"])
    np.testing.assert_allclose(levels, network.decoder.fusion.weights(), rtol=1e-6)
    np.testing.assert_allclose(levels.sum(1), np.ones(3), rtol=1e-6)
    assert (np.ptp(levels) > 0.01) == (weights != "uniform")
    assert (np.ptp(levels, axis=0).max() > 0.01) == (weights == "per_level")
    assert network.block_weights()["blocks"] == [0, 1, 2]


@fast
@pytest.mark.parametrize(("backbone", "weights"), [("frozen", "shared"), ("finetuned", "per_level")])
def test_the_gradient_reaches_every_weight(backbone, weights):
    parts = split_network(make_network(weights=weights), train_backbone=backbone == "finetuned")
    mask = (np.random.default_rng(3).random((2, *SIZE)) > 0.6).astype(np.uint8)
    batch = {"input": random_inputs()[1], "mask": mask, "weight": np.ones(2, np.float32)}
    _, gradients, _ = jax.jit(make_gradient(parts.training))(parts.trainable, parts.frozen, batch, jax.random.key(0))
    grad_scalars = np.asarray(gradients["decoder"]["fusion"]["scalars"][...])
    assert grad_scalars.shape == ((3, 3) if weights == "per_level" else (1, 3))
    assert np.abs(grad_scalars).min() > 1e-7
    np.testing.assert_allclose(grad_scalars.sum(1), 0, atol=1e-6)  # the weights sum to 1 for any scalars
    assert ("backbone" in gradients) == (backbone == "finetuned")


def test_a_block_contributes_in_proportion_to_its_weight():
    fusion, (features, _) = Fusion(2, 3, "per_level"), random_inputs()
    fusion.scalars.set_value(jnp.array([[0.5, -1.0, 2.0], [0.0, 0.3, -0.2]]))
    moved = features.copy()
    moved[:, 1] += 1
    for before, after, weights in zip(fusion(features), fusion(moved), fusion.weights(), strict=True):
        np.testing.assert_allclose(after - before, np.full(before.shape, weights[1]), atol=1e-6)  # measured: 1.8e-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 4e-15), (jnp.bfloat16, 5e-3)])
def test_both_variants_have_the_same_values_and_gradients(dtype, tolerance):
    weights = np.random.default_rng(0).random((4, 3)).astype(np.promote_types(dtype, np.float32))
    features = random_inputs()[0].astype(dtype)

    def loss(variant, weights, features):
        return sum((level**2).sum() for level in variant(weights, features)).astype(np.float32)

    with jax.enable_x64(dtype is np.float64):
        gradients = jax.grad(loss, argnums=(1, 2))
        results = [(variant(weights, features), *gradients(variant, weights, features)) for variant in VARIANTS]
    for sums, product in zip(*map(jax.tree.leaves, results), strict=True):
        assert sums.dtype == product.dtype
        difference = np.asarray(sums, np.float64) - np.asarray(product, np.float64)
        # measured: at most 1.2e-15 in float64 and 3.7e-3 in bfloat16
        assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(np.asarray(sums, np.float64))


@fast
def test_all_weight_on_the_last_block_equals_the_network_without_fusion():
    fused, last = make_network(image="none"), make_network(blocks=(2,), image="none")
    for path, variable in nnx.to_flat_state(nnx.state(fused.decoder)):
        if path[0] != "fusion":
            last_variable = dict(nnx.to_flat_state(nnx.state(last.decoder)))[path]
            last_variable.set_value(variable.get_value())
    fused.decoder.fusion.scalars.set_value(jnp.full((3, 3), -jnp.inf).at[:, 2].set(0))
    images = random_inputs()[1]
    np.testing.assert_array_equal(jitted(fused)(images), jitted(last)(images))


# --- inputs ---


@fast
def test_features_are_the_blocks_tokens_after_the_final_norm():
    network = make_network(blocks=(2, 0), variant=ROTARY)
    images = random_inputs()[1]
    features = network.features(jnp.asarray(images))
    assert features.shape == (2, 2, 3, 5, 32)
    colour = three_channels(jnp.asarray(images))
    np.testing.assert_array_equal(features[:, 0], network.backbone(colour).patches)  # the last block
    expected = network.backbone.norm(network.backbone.intermediate(colour, (0,))[0])
    np.testing.assert_allclose(features[:, 1], expected, atol=2e-6)  # measured: 4.8e-7


def test_networks_share_cached_features_if_they_read_the_same_blocks(tmp_path):
    def folder(blocks, **options):
        return FeatureCache(tmp_path, make_network(blocks, **options), "tiny", Canvas(24)).folder

    assert folder((1, 2)) == folder((1, 2), image="none") == folder((1, 2), weights="uniform", seed=5)
    assert len({folder((0, 1, 2)), folder((1, 2)), folder((2,))}) == 3


@fast
@pytest.mark.parametrize("image", IMAGE_STAGES)
def test_the_image_reaches_the_logits_through_features_and_stems(image):
    """With fixed features, the image reaches the logits through the stems only."""
    network, images = make_network(image=image), random_inputs()[1]
    features = jax.jit(lambda images: network.features(images))(images)
    rest = network.on_features(SIZE)
    assert [stage.stem is not None for stage in rest.decoder.stages] == [image == "all", image != "none"]
    run = jitted(rest)
    if image == "none":
        assert not network.reads_images
        np.testing.assert_allclose(run(features), jitted(network)(images), atol=1e-6)  # measured: equal
        return
    with pytest.raises(ValueError, match=r"also reads the images: call it with \(features, images\)"):
        rest(features)
    before = run((features, images))
    np.testing.assert_allclose(before, jitted(network)(images), atol=1e-6)  # measured: equal
    changed = images.copy()
    changed[:, :8, :8] = 1 - changed[:, :8, :8]
    change = np.abs(before - run((features, changed)))[..., 0]
    assert change[:, :8, :8].max() > 1e-3
    if image == "last":  # outside the receptive field of three convolutions at half the resolution and a resizing
        assert change[:, 20:].max() == 0
        assert change[:, :, 20:].max() == 0


@pytest.mark.parametrize("arch", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14", "dinov3_vits16"])
def test_every_backbone_and_images_that_are_not_square_are_supported(arch):
    model = FusionOptions(arch, weights="random", decoder_widths=WIDTHS, blocks=(0, -1))
    network = nnx.eval_shape(lambda: build_network(model, 3, 0))
    patch = TRANSFORMERS[arch].patch
    graph, state = nnx.split(network)
    images = jax.ShapeDtypeStruct((2, 3 * patch, 5 * patch, 1), jnp.float32)
    logits = jax.eval_shape(lambda state, images: nnx.merge(graph, state)(images), state, images)
    assert logits.shape == (2, 3 * patch, 5 * patch, 3)
    assert network.blocks == (0, TRANSFORMERS[arch].depth - 1)


def test_default_decoder_on_vit_b_has_the_parameters_of_its_layers():
    widths = (512, 256, 128, 64, 32)
    decoder = nnx.eval_shape(lambda: FusionDecoder(768, 12, widths, 1, rngs=nnx.Rngs(0)))
    expected = 768 * 512 + 512 + 5 * 12 + 9 * 32 + 1  # first level, weights of the blocks, logits
    for i, o in pairwise(widths):
        expected += 768 * i + i  # projection of the weighted sum
        expected += 9 * 3 * 16 + 2 * 16  # stem of the image
        expected += 9 * (i + 16) * o + 2 * o + 9 * o * o + 2 * o
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param))) == expected == 3_555_293


# --- options ---


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [((), tuple(range(12))), ((-1,), (11,)), ((-4, -3, -2, -1), (8, 9, 10, 11)), ((11, 0, -2), (0, 10, 11))],
)
def test_blocks_are_counted_from_either_end(blocks, chosen):
    assert FusionOptions("dinov2_vits14", blocks=blocks).block_numbers() == chosen


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"blocks": (3, 12)}, r"model.blocks=\[3, 12\]: dinov2_vits14 has no block 12. Use 0 to 11, or -1 .* to -12\."),
        ({"blocks": (-13,)}, r"model.blocks=\[-13\]: dinov2_vits14 has no block -13\. "),
        ({"blocks": (11, 3, -1)}, r"model.blocks=\[11, 3, -1\]: block 11 of dinov2_vits14 is listed twice\. "),
        ({"decoder_widths": (8,)}, r"model.decoder_widths=\[8\]: needs the width of the first level and of at least"),
    ],
)
def test_impossible_options_are_refused(changed, line):
    with pytest.raises(InputError, match=f"^{line}"):
        FusionOptions("dinov2_vits14", **changed).resolve()


# --- batches ---


def test_batches_contain_the_images_of_their_features_and_at_most_two_large_ones_are_read_ahead(tmp_path):
    """A batch takes 520 MB here."""

    class Features:
        read = 0

        def __init__(self, volume):
            self.volume = volume

        def __getitem__(self, index):
            Features.read += 1
            return np.broadcast_to(np.float32(index), (65, 1000, 1000))

    volumes = disc_scans(tmp_path)
    frame = Canvas(32).frame(volumes[0].shape[1:], volumes[0].spacing[1:])
    source = SliceSource(volumes, Canvas(32), [Features(volume) for volume in volumes], with_images=True)
    batches = training_batches(source, 2, seed=0)
    try:
        batch = next(batches)
        time.sleep(1)
        assert Features.read <= 1 + 2 * 3  # one slice to find the shapes, and two in this batch and in each of two more
    finally:
        batches.close()
    for features, image, volume in zip(batch["input"], batch["image"], batch["volume"], strict=True):
        np.testing.assert_array_equal(image, volumes[volume].input(int(features[0, 0, 0]), frame))
