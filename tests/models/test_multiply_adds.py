"""Counts of multiply-adds against hand-computed ones, and those of networks against PyTorch's FLOP counter."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from jaxla.experiments import METHODS
from torch.utils.flop_counter import FlopCounterMode

from jaxla.models.networks.base import build_network
from jaxla.models.networks.fusion import weighted_product, weighted_sums
from jaxla.models.ops.attention import cudnn_attention
from jaxla.models.ops.multiply_adds import multiply_adds
from tests.gpu import pretend_gpu
from tests.parity.references import make_reference
from tests.tiny import randomise, tiny_backbone


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def convolve(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def test_cudnn_attention_has_the_same_count(monkeypatch):
    """Traced as on a GPU with cuDNN, and not run."""
    pretend_gpu(monkeypatch)
    q, k = (jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16) for tokens in (65, 33))
    expected = 2 * (2 * 4 * 65 * 33 * 64)
    for implementation in ("xla", "cudnn"):
        attention = partial(jax.nn.dot_product_attention, implementation=implementation)
        assert multiply_adds(attention, q, k, k) == expected
    assert multiply_adds(cudnn_attention, q, q, q) == 2 * (2 * 4 * 65 * 65 * 64)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (jnp.matmul, [shape(3, 5), shape(5, 7)], 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [shape(2, 3, 5), shape(2, 5, 7)], 2 * 3 * 5 * 7),
        (convolve, [shape(2, 8, 6, 4), shape(3, 3, 4, 5)], 2 * 8 * 6 * 5 * 9 * 4),
        (lambda x, k: convolve(x, k, stride=2), [shape(2, 8, 6, 4), shape(3, 3, 4, 5)], 2 * 4 * 3 * 5 * 9 * 4),
        (lambda x, k: convolve(x, k, groups=2), [shape(1, 8, 6, 4), shape(3, 3, 2, 6)], 8 * 6 * 6 * 9 * 2),
        (lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=6)[0], [shape(3, 5), shape(5, 5)], 450),
        (jax.jit(jax.checkpoint(lambda a, b: jnp.tanh(a @ b) + a)), [shape(4, 4), shape(4, 4)], 64),
        (lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b), [shape(2, 2), shape(2, 2)], 16),
        (lambda a: jnp.tanh(a) * 2 + a.sum(), [shape(9, 9)], 0),
    ],
)
def test_counts_equal_hand_computed_counts(function, arguments, expected):
    assert multiply_adds(function, *arguments) == expected


def test_a_while_loop_is_refused():
    with pytest.raises(ValueError, match="while"):
        multiply_adds(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), shape(2, 2))


def test_both_variants_of_fusion_have_the_same_count():
    weights, features = shape(4, 3), shape(2, 3, 5, 7, 32)
    expected = 4 * 3 * (2 * 5 * 7 * 32)
    assert multiply_adds(weighted_sums, weights, features) == expected
    assert multiply_adds(weighted_product, weights, features) == expected


def count_network(network, size):
    graph, state = nnx.split(network)
    return multiply_adds(lambda state, images: nnx.merge(graph, state)(images), state, shape(1, size, size, 1))


@pytest.mark.parametrize("method", ["unet", "attention_unet", "resnet50_unet", "segnet"])
def test_convolutional_networks_equal_pytorchs_counter(method):
    model = METHODS[method].model.with_weights("random")
    network = randomise(nnx.eval_shape(lambda: build_network(model, 1, 0)))
    channels = 3 if hasattr(network, "backbone") else 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        make_reference(network).eval()(torch.zeros(1, channels, 64, 64))
    assert count_network(network, 64) == counter.get_total_flops() // 2


def test_the_count_of_a_transformer_equals_its_formula():
    backbone = tiny_backbone()
    variant, tokens = backbone.variant, (32 // backbone.variant.patch) ** 2 + 1
    images = shape(1, 32, 32, 3)
    graph, state = nnx.split(backbone)
    counted = multiply_adds(lambda state, images: nnx.merge(graph, state)(images).patches, state, images)
    width, hidden = variant.width, variant.hidden
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens**2 * width
    assert counted == (tokens - 1) * 3 * variant.patch**2 * width + variant.depth * block
