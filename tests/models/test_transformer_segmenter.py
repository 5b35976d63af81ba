"""The decoders of paper 1's network: parity with PyTorch, and positions of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.models.backbones.vision_transformer import VisionTransformer
from jaxla.models.networks.transformer_segmenter import ConvolutionalDecoder, LinearDecoder, TransformerSegmenter
from jaxla.models.ops.resizing import resize, upsample_2x
from tests.parity.references import make_reference, network_to_torch
from tests.tiny import TINY, flat_arrays, randomise, tiny_backbone

WIDTHS = (8, 6, 4)


def make_decoder(kind, width=16, outputs=1, widths=WIDTHS, seed=0):
    """Return a decoder in evaluation mode with random parameters."""
    make = {
        "linear": lambda: LinearDecoder(width, outputs, rngs=nnx.Rngs(0)),
        "convolutional": lambda: ConvolutionalDecoder(width, widths, outputs, rngs=nnx.Rngs(0)),
    }
    decoder = randomise(nnx.eval_shape(make[kind]), seed)
    decoder.eval()
    return decoder


def to_torch(array):
    """Convert [B, H, W, C] to [B, C, H, W]."""
    return torch.from_numpy(np.array(array).transpose(0, 3, 1, 2).copy())


def from_torch(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


# --- resizing ---


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 6), (8, 12)),
        ((3, 5), (24, 40)),
        ((7, 7), (98, 98)),
        ((1, 3), (5, 4)),
        ((7, 5), (4, 3)),
        ((6, 9), (6, 9)),
        ((64, 16), (56, 14)),
        ((16, 5), (14, 5)),
        ((4, 9), (3, 18)),
        ((512, 2), (448, 1)),
    ],
)
def test_resizing_equals_bilinear_interpolation_in_pytorch(shape, size):
    x = np.random.default_rng(0).standard_normal((2, *shape, 3), dtype=np.float32)
    expected = torch.nn.functional.interpolate(to_torch(x), size=size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize(jnp.asarray(x), size), from_torch(expected), atol=3e-6)  # measured: 5e-7


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (1, 5), (2, 2), (7, 3)])
def test_doubling_and_its_gradient_equal_bilinear_interpolation_in_pytorch(shape):
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((2, *s, 3), dtype=np.float32) for s in (shape, (2 * shape[0], 2 * shape[1])))
    theirs = to_torch(x).requires_grad_()
    expected = torch.nn.functional.interpolate(theirs, scale_factor=2, mode="bilinear", align_corners=False)
    (expected * to_torch(weight)).sum().backward()
    np.testing.assert_allclose(upsample_2x(jnp.asarray(x)), from_torch(expected), atol=1e-6)  # measured: 2.4e-7
    gradient = jax.grad(lambda x: (upsample_2x(x) * weight).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, from_torch(theirs.grad), atol=2e-6)  # measured: 4.8e-7


# --- positions ---

# corner token of a map of 12 × 20 tokens -> the quarter of 96 × 160 pixels that contains it
CORNERS = {
    (0, 0): np.s_[:48, :80],
    (0, 19): np.s_[:48, 80:],
    (11, 0): np.s_[48:, :80],
    (11, 19): np.s_[48:, 80:],
}


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_a_token_in_a_corner_changes_only_that_corner(kind):
    decoder = make_decoder(kind)
    decode = jax.jit(lambda tokens: decoder(tokens, (96, 160))[0, ..., 0])
    empty = np.asarray(decode(np.zeros((1, 12, 20, 16), np.float32)))
    for corner, pixels in CORNERS.items():
        tokens = np.zeros((1, 12, 20, 16), np.float32)
        tokens[0, *corner] = np.random.default_rng(1).standard_normal(16)
        change = np.abs(decode(tokens) - empty)
        inside = np.zeros(change.shape, bool)
        inside[pixels] = True
        assert change[8 * corner[0] + 4, 8 * corner[1] + 4] > 1e-3
        assert change[inside].max() > 0.01
        assert change[~inside].max() == 0


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_the_response_to_a_token_is_centred_on_it(kind):
    """With symmetric kernels the response is symmetric, so its centre of mass is the centre of the token."""
    decoder = make_decoder(kind)
    for path, variable in nnx.to_flat_state(nnx.state(decoder, nnx.Param)):
        variable.set_value(jnp.full(variable.shape, 0.1 if path[-1] in ("kernel", "scale") else 0.0))
    for _, variable in nnx.to_flat_state(nnx.state(decoder, nnx.BatchStat)):
        variable.set_value(jnp.ones(variable.shape) * (variable.get_value().min() > 0))  # mean 0, variance 1
    positions = ((5, 7), (6, 13))
    tokens = np.zeros((len(positions), 12, 20, 16), np.float32)
    for i, position in enumerate(positions):
        tokens[i, *position] = 1
    responses = np.asarray(jax.jit(lambda tokens: decoder(tokens, (96, 160)))(tokens), np.float64)[..., 0]
    for logits, position in zip(responses, positions, strict=True):
        logits /= logits.sum()
        centre = [(logits.sum(1) @ np.arange(96)), (logits.sum(0) @ np.arange(160))]
        np.testing.assert_allclose(centre, [8 * n + 3.5 for n in position], atol=1e-5)  # measured: 5e-7


def test_logits_change_where_the_image_changes():
    """On average over random decoders, the change in the logits is centred on the changed patch."""
    backbone = tiny_backbone()
    for scale in (backbone.blocks.scale1, backbone.blocks.scale2):  # blocks add nothing, so tokens are independent
        scale.gamma.set_value(jnp.zeros_like(scale.gamma[...]))
    images = np.full((3, 96, 160, 1), 0.5, np.float32)
    patches = {1: (5, 13), 2: (6, 6)}
    for i, (row, column) in patches.items():
        images[i, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    compute_logits = jax.jit(lambda graph, state: nnx.merge(graph, state)(images)[..., 0], static_argnums=0)
    changes = np.zeros((3, 96, 160))
    for seed in range(40):
        decoder = make_decoder("convolutional", width=32, widths=(24, 16, 12), seed=seed)
        network = TransformerSegmenter(backbone, decoder)
        logits = np.asarray(compute_logits(*nnx.split(network)))
        changes += np.abs(logits - logits[0])
    changes /= np.maximum(changes.sum((1, 2), keepdims=True), 1e-9)
    for i, (row, column) in patches.items():
        centre = [changes[i].sum(1) @ np.arange(96), changes[i].sum(0) @ np.arange(160)]
        expected = [8 * row + 3.5, 8 * column + 3.5]  # a token is 8 pixels wide
        np.testing.assert_allclose(centre, expected, atol=1.0)  # measured: 0.75


# --- parameters ---


def test_default_decoder_on_vit_g_has_15_million_parameters():
    widths = (512, 256, 128, 64, 32)
    decoder = nnx.eval_shape(lambda: ConvolutionalDecoder(1536, widths, 1, rngs=nnx.Rngs(0)))
    token_classifier = 1536 * 512 + 512
    mix = 7 * 7 * 512 * 512 + 512
    stages = sum(9 * i * o + 2 * o for i, o in ((512, 256), (256, 128), (128, 64), (64, 32)))
    logits = 9 * 32 + 1
    count = sum(x.size for x in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
    assert count == token_classifier + mix + stages + logits == 15_200_481


# --- parity with PyTorch ---


def random_tokens():
    return np.random.default_rng(3).standard_normal((4, 5, 7, 16), dtype=np.float32)


def test_convolutional_decoder_equals_pytorch_in_evaluation():
    decoder = make_decoder("convolutional", outputs=3)
    theirs = make_reference(decoder, (40, 56))
    before = flat_arrays(decoder, nnx.BatchStat)
    ours = jax.jit(lambda tokens: decoder(tokens, (40, 56)))(random_tokens())
    expected = from_torch(theirs(to_torch(random_tokens())))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours, expected, atol=5e-6)  # measured: 5e-7
    for name, value in flat_arrays(decoder, nnx.BatchStat).items():
        np.testing.assert_array_equal(value, before[name])


def test_convolutional_decoder_equals_pytorch_in_training():
    decoder = make_decoder("convolutional", outputs=3)
    theirs = make_reference(decoder, (40, 56)).train()
    decoder.train()
    graph, parameters, rest = nnx.split(decoder, nnx.Param, ...)
    weight = 100 * np.random.default_rng(4).standard_normal((4, 40, 56, 3), dtype=np.float32)

    def forward(parameters):
        network = nnx.merge(graph, parameters, rest, copy=True)
        logits = network(random_tokens(), (40, 56))
        return jnp.mean(logits * weight), (logits, nnx.state(network, nnx.BatchStat))

    (_, (ours, statistics)), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(parameters)
    expected = theirs(to_torch(random_tokens()))
    (expected * to_torch(weight)).mean().backward()
    np.testing.assert_allclose(ours, from_torch(expected), atol=1e-5)  # measured: 1.9e-6

    buffers = dict(theirs.named_buffers())
    found = network_to_torch(decoder, statistics)
    assert len(found) == 4
    for name, value in found.items():  # measured: 1.2e-8 for means, 6e-8 for variances
        np.testing.assert_allclose(value, buffers[name], atol=5e-7 if name.endswith("mean") else 1e-6, err_msg=name)

    found = network_to_torch(decoder, gradients)
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0.02
        np.testing.assert_allclose(found[name], parameter.grad, atol=3e-6)  # measured: 7e-7


def test_linear_decoder_equals_pytorch():
    decoder = make_decoder("linear", outputs=3)
    arrays = flat_arrays(decoder)
    tokens = random_tokens()
    expected = torch.nn.functional.interpolate(
        torch.nn.functional.conv2d(
            to_torch(tokens),
            torch.from_numpy(arrays["classifier.kernel"].T.copy())[:, :, None, None],
            torch.from_numpy(arrays["classifier.bias"].copy()),
        ),
        size=(40, 56),
        mode="bilinear",
    )
    np.testing.assert_allclose(decoder(tokens, (40, 56)), from_torch(expected), atol=5e-6)  # measured: 5e-7


def test_grey_images_are_normalised_with_imagenets_statistics():
    network = TransformerSegmenter(
        nnx.eval_shape(lambda: VisionTransformer(TINY, rngs=nnx.Rngs(0))), make_decoder("linear", width=32)
    )
    network = randomise(network, 5)
    grey = np.random.default_rng(0).random((2, 24, 40, 1), dtype=np.float32)
    colour = (np.repeat(grey, 3, -1) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(network(grey), network(colour.astype(np.float32)), atol=5e-6)  # measured: 4e-7
