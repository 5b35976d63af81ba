"""Paper 3's network: parity with PyTorch, independence of windows, and padding of volumes."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jaxla.experiments import METHODS
from torch.nn import functional

from jaxla.config import InputError
from jaxla.models.networks.base import build_network, parameter_count
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.models.networks.windows import FeatureWindows, WindowDecoder, WindowOptions, WindowSegmenter
from tests.parity.references import make_reference, network_to_torch
from tests.tiny import ROTARY, TINY, randomise, tiny_backbone

WIDTHS = (16, 12, 8, 8)
SIZE = (32, 64)  # H, W of the slices; h, w of the features are 4, 8
SLICES = 6
# Tests of parity come first: once used, `fast_compilation` stays active for the rest of the module.
fast = pytest.mark.usefixtures("fast_compilation")
KINDS = {
    "3D": {"depth_places": 5},
    "without depth embedding": {"depth_places": 0},
    "2D": {"depth_places": 5, "slicewise": True},
}


def make_decoder(outputs=1, seed=0, dtype=jnp.float32, depth_places=5, **options):
    """Return a decoder with random parameters."""
    decoder = randomise(
        nnx.eval_shape(
            lambda: WindowDecoder(
                32, WIDTHS, outputs, depth_places=depth_places, dtype=dtype, rngs=nnx.Rngs(0), **options
            )
        ),
        seed,
    )
    for _, variable in nnx.to_flat_state(nnx.state(decoder)):
        variable.set_value(jnp.asarray(np.asarray(variable), dtype))
    return decoder


def random_features(batch=2, slices=SLICES, dtype=np.float32, seed=1):
    """Return features [B, D, 4, h, w, C]."""
    return np.random.default_rng(seed).standard_normal((batch, slices, 4, 4, 8, 32)).astype(dtype)


def to_torch(features):
    return torch.from_numpy(np.ascontiguousarray(features.transpose(0, 2, 5, 1, 3, 4)))


def slice_arguments(window, slices=SLICES, batch=2):
    """Return the decoder's arguments for a window: slice numbers, their presence, and the slices of each volume.

    Args:
        window: range of the slices in the window.
        slices: number of slices in the volumes.
    """
    numbers = np.broadcast_to(np.arange(window.start, window.stop), (batch, len(window)))
    return numbers, np.ones(numbers.shape, bool), np.full(batch, slices)


@nnx.jit
def apply(network, *arguments):
    return network(*arguments)


def run(network, *arguments):
    return np.asarray(apply(network, *arguments))


# --- parity with PyTorch ---


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_window_equal_pytorch(kind):
    window = range(2, 5)
    decoder = make_decoder(outputs=3, **KINDS[kind])
    features = random_features(slices=len(window))
    reference = make_reference(decoder)
    with torch.no_grad():
        theirs = reference(to_torch(features), SLICES, window)
        if kind == "2D":  # GroupNorm normalises each slice by itself
            slice_logits = [
                reference(to_torch(features[:, i : i + 1]), SLICES, window[i : i + 1]) for i in range(len(window))
            ]
            theirs = torch.cat(slice_logits, dim=2)
    ours = run(decoder, features, *slice_arguments(window))
    assert (ours.shape, ours.dtype) == ((2, len(window), 32, 64, 3), np.float32)
    assert theirs.std() > 0.2
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 4, 1), atol=1e-5)  # measured: 4.6e-6


def test_gradients_equal_pytorch():
    """Compared in float64, because in float32 rounding moves activations across a ReLU's zero."""
    with jax.enable_x64():
        decoder, features = make_decoder(dtype=jnp.float64), random_features(dtype=np.float64)
        weight = np.random.default_rng(2).standard_normal((2, SLICES, 32, 64, 1))
        theirs = make_reference(decoder)
        graph, parameters = nnx.split(decoder)

        def loss(parameters):
            return (nnx.merge(graph, parameters)(features, *slice_arguments(range(SLICES))) * weight).mean()

        gradients = jax.jit(jax.grad(loss))(parameters)
        logits = theirs(to_torch(features), SLICES, range(SLICES))
        (logits * torch.from_numpy(weight.transpose(0, 4, 1, 2, 3).copy())).mean().backward()
        ours, expected = network_to_torch(decoder, gradients), dict(theirs.named_parameters())
        assert ours.keys() == expected.keys()
        for name, parameter in expected.items():
            error = np.linalg.norm(ours[name] - parameter.grad.numpy()) / np.linalg.norm(parameter.grad.numpy())
            assert error <= 1e-13, name  # measured: 8.3e-15


def test_logits_of_a_volume_equal_pytorch_on_its_windows():
    counts = (4, 1, 3)  # windows of different sizes along slices and columns
    decoder, features = make_decoder(), random_features()
    reference = make_reference(decoder)
    assembled = torch.zeros(2, 1, SLICES, 32, 64)
    for index in product(*map(range, counts)):
        window, rows, columns = (
            range(i * n // k, (i + 1) * n // k) for i, n, k in zip(index, (SLICES, 4, 8), counts, strict=True)
        )
        part = features[:, window.start : window.stop, :, rows.start : rows.stop, columns.start : columns.stop]
        with torch.no_grad():
            logits = reference(to_torch(part), SLICES, window)
        fine = (slice(8 * axis.start, 8 * axis.stop) for axis in (rows, columns))
        assembled[:, :, window.start : window.stop, *fine] = logits
    size = (24, 40)
    theirs = functional.interpolate(assembled, size=(SLICES, *size), mode="trilinear").numpy().transpose(0, 2, 3, 4, 1)
    ours = run(FeatureWindows(decoder, size, counts), features)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # measured: 1.6e-6


# --- independence ---


@fast
@pytest.mark.parametrize(("kind", "reached"), [("3D", {3, 4, 5}), ("2D", {3})])
def test_a_changed_slice_affects_only_its_window_and_in_2d_only_itself(kind, reached):
    network = FeatureWindows(make_decoder(**KINDS[kind]), SIZE, (2, 1, 2))
    features = random_features(1)
    changed = features.copy()
    changed[:, 3, ..., :4, :] += 1  # in the window of slices 3 to 5 and columns 0 to 3
    before, after = run(network, features), run(network, changed)
    differs = (before != after).any(axis=(0, 2, 4))  # [D, W]
    assert differs[3, :32].any()
    assert not differs[:, 32:].any()
    assert not differs[:3].any()
    assert {int(i) for i in np.flatnonzero(differs.any(1))} == reached


@fast
@pytest.mark.parametrize("depth_places", [0, 5])
def test_equal_slices_differ_only_by_the_depth_embedding(depth_places):
    # slicewise, because in 3D the border of the volume also makes slices different
    decoder = make_decoder(depth_places=depth_places, slicewise=True)
    equal = np.repeat(random_features(1, slices=1), SLICES, axis=1)
    logits = run(FeatureWindows(decoder, SIZE, (2, 1, 1)), equal)
    change = np.abs(logits - logits[:, :1]).max(axis=(0, 2, 3, 4))
    assert (change[1:] > 1e-2).all() if depth_places else (change == 0).all()


@fast
@pytest.mark.parametrize(("kind", "counts"), [("3D", (3, 1, 2)), ("2D", (1, 1, 1))])
def test_padding_slices_do_not_change_a_volume(kind, counts):
    network = FeatureWindows(make_decoder(outputs=2, **KINDS[kind]), SIZE, counts)
    features = random_features(slices=9)
    padded = run(network, features, np.arange(9) < np.array([9, 5])[:, None])
    alone = run(network, features[1:, :5])
    np.testing.assert_allclose(padded[1, :5], alone[0], atol=1e-5)  # measured: 1.3e-6
    assert not padded[1, 5:].any()
    assert padded[0].all()


# --- with a backbone ---


@fast
def test_network_on_features_equals_the_network():
    backbone = tiny_backbone(variant=replace(ROTARY, depth=8))
    network = WindowSegmenter(backbone, make_decoder(), (2, 1, 1))
    images = np.random.default_rng(0).random((2, 3, *SIZE, 1), dtype=np.float32)
    features = jnp.stack([network.features(jnp.asarray(volume)) for volume in images])
    assert features.shape == (2, 3, 4, 4, 8, 32)
    on_features = run(network.on_features(SIZE), features)
    np.testing.assert_allclose(on_features, run(network, images), atol=1e-5)  # measured: 2.8e-6


def test_levels_read_blocks_at_the_quarters_of_the_backbones_depth():
    for depth, blocks in ((12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (4, (0, 1, 2, 3)), (3, (0, 1, 2, 2))):
        network = WindowSegmenter(tiny_backbone(variant=replace(TINY, depth=depth)), make_decoder(), (1, 1, 1))
        assert network.blocks == blocks
    network = nnx.eval_shape(lambda: build_network(WindowOptions("dinov3_vits16", weights="random"), 1, 0))
    assert network.feature_description == "patch tokens of blocks 2, 5, 8, 11 after the final norm"


def test_the_decoder_has_few_parameters():
    model = METHODS["windows_dinov3_vitb16"].model
    total = parameter_count(model)
    linear_head = 768 + 1  # weights and bias
    backbone = parameter_count(TransformerSegmenterOptions(model.arch, decoder="linear")) - linear_head
    assert total - backbone < 0.02 * backbone  # 1.0 M and 85.7 M


# --- bad input ---


@pytest.mark.parametrize(
    ("windows", "counts"), [("1", (1, 1, 1)), ("3", (3, 1, 1)), ("2x2x2", (2, 2, 2)), ("4x1x12", (4, 1, 12))]
)
def test_window_counts_are_read_for_slices_rows_and_columns(windows, counts):
    assert WindowOptions(windows=windows).window_counts() == counts


@pytest.mark.parametrize("windows", ["", "0", "2x2", "2x0x1", "-1", "2x2x2x2", "two", "1.5"])
def test_malformed_window_counts_are_refused(windows):
    with pytest.raises(InputError, match=rf"^model\.windows={windows}: not a number of windows\. Use 2 for .* 2x2x2 "):
        WindowOptions(windows=windows).resolve()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"decoder_widths": (8, 8)},
            r"model.decoder_widths=\[8, 8\]: 2 widths, but the network needs 4. Set 4 widths,",
        ),
        ({"depth_places": -1}, r"model.depth_places=-1: must not be negative\. Use 0 or more\."),
    ],
)
def test_impossible_options_are_refused(options, line):
    with pytest.raises(InputError, match=f"^{line}"):
        WindowOptions("vit_mini8", **options).resolve()


def test_images_with_fewer_patches_than_windows_are_refused():
    model = WindowOptions("vit_mini8", windows="1x9x1")
    model.check_size("preprocessing.image_size", 72)
    line = "^preprocessing.image_size=64: 8x8 patches are too few for 9x1 windows. Use fewer model.windows."
    with pytest.raises(InputError, match=line):
        model.check_size("preprocessing.image_size", 64)


def test_scans_with_fewer_slices_than_windows_are_refused():
    model = WindowOptions("vit_mini8", windows="5")
    model.check_depth("scan.nii.gz", 5)
    with pytest.raises(InputError, match=r"^scan.nii.gz: has 4 slices, fewer than the 5 windows along the slices\. "):
        model.check_depth("scan.nii.gz", 4)
    with pytest.raises(ValueError, match=r"^volumes have 4×4×8 slices, .*: too few for the network's 5×1×1 w"):
        FeatureWindows(make_decoder(), SIZE, (5, 1, 1))(random_features(slices=4))


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((2, 32, 32, 1), r"shape \(2, 32, 32, 1\): expected \[B, D, H, W, 1\] or \[B, D, H, W, 3\]"),
        ((1, 3, 4, 32, 1), r"4×32 pixels|3×4×32 pixels"),
    ],
)
def test_volumes_with_a_wrong_shape_are_refused(shape, line):
    network = WindowSegmenter(tiny_backbone(), make_decoder(), (1, 1, 1))
    with pytest.raises(ValueError, match=line):
        network(np.zeros(shape, np.float32))
