"""Attention against PyTorch's, in the formulation that each device takes."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.hardware import prefers_bfloat16, supports_cudnn_attention
from jaxla.models.ops import columns
from jaxla.models.ops.attention import attention, cudnn_attention, padded_attention
from jaxla.models.ops.positions import rotation
from tests.gpu import pretend_gpu
from tests.tiny import TINY_VARIANTS, tiny_backbone


def in_columns(q, k, v):
    """The CPU's formulation, for [B, N, heads, D]."""
    return columns.attention(*(x.transpose(0, 2, 3, 1) for x in (q, k, v))).transpose(0, 3, 1, 2)


def value_and_gradients(formulation, weight, *qkv):
    value, pull = jax.vjp(formulation, *qkv)
    return value, pull(weight)


of_even_length_by_xla = partial(padded_attention, implementation="xla")


@pytest.mark.parametrize("formulation", [attention, in_columns, of_even_length_by_xla])
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 26, 3, 16), (1, 101, 2, 64), (3, 1, 1, 8)])
def test_values_and_gradients_equal_pytorch(formulation, batch, tokens, heads, width):
    rng = np.random.default_rng(0)
    *qkv, weight = (rng.standard_normal((batch, tokens, heads, width), dtype=np.float32) for _ in range(4))
    with jax.default_matmul_precision("highest"):
        ours, gradients = jax.jit(value_and_gradients, static_argnums=0)(formulation, weight, *qkv)

    leaves = [torch.from_numpy(x).requires_grad_() for x in qkv]
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    theirs.backward(torch.from_numpy(weight))

    np.testing.assert_allclose(ours, theirs.detach(), atol=2e-6)  # measured: 5e-7
    for mine, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(mine, leaf.grad, atol=5e-6)  # measured: 1.6e-6


@pytest.mark.parametrize("formulation", [attention, in_columns])
def test_every_query_takes_a_mean_of_values(formulation):
    """Equal keys: each output is the plain mean of the head's values."""
    v = np.random.default_rng(0).standard_normal((1, 5, 2, 4), dtype=np.float32)
    out = formulation(v, np.ones_like(v), v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


@pytest.mark.parametrize("tokens", [144, 145])
def test_cudnn_gives_the_gradient_for_any_number_of_tokens(monkeypatch, tokens):
    """Traced as on a GPU that has cuDNN; nothing is run."""
    pretend_gpu(monkeypatch)
    qkv = [jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16)] * 3

    def traced_gradient(formulation):
        return str(jax.make_jaxpr(jax.grad(lambda *qkv: formulation(*qkv).sum().astype(jnp.float32)))(*qkv))

    assert "dot_product_attention_bwd" in traced_gradient(cudnn_attention)
    untrained = str(jax.make_jaxpr(cudnn_attention)(*qkv))
    assert "dot_product_attention_fwd" in untrained
    assert " pad" not in untrained
    with nullcontext() if tokens % 2 == 0 else pytest.raises(NotImplementedError, match="145"):
        traced_gradient(partial(jax.nn.dot_product_attention, implementation="cudnn"))  # once it does, ours can go


def device(platform, version="", **about):
    return SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version), **about)


@pytest.mark.parametrize(
    ("of", "bfloat16", "cudnn"),
    [
        (device("cpu", "cpu"), False, False),
        (device("gpu", "PJRT C API\ncuda 12090", compute_capability="7.5"), False, False),  # T4
        (device("gpu", "PJRT C API\ncuda 12090", compute_capability="8.0"), True, True),  # A100
        (device("gpu", "PJRT C API\ncuda 13000", compute_capability="12.0"), True, True),
        (device("gpu", "PJRT C API\nrocm 60443483", compute_capability="gfx942"), True, False),
        (device("tpu", "TFRT TPU v5 lite"), True, False),
    ],
    ids=["CPU", "Turing", "Ampere", "Blackwell", "AMD", "TPU"],
)
def test_what_a_device_computes_with(of, bfloat16, cudnn):
    assert (prefers_bfloat16(of), supports_cudnn_attention(of)) == (bfloat16, cudnn)


@pytest.mark.parametrize("variant", TINY_VARIANTS.values(), ids=TINY_VARIANTS)
def test_a_block_in_rows_and_in_columns_has_the_same_values_and_gradients(variant):
    """A GPU takes the rows, and this is the only check of their values without one."""
    vit = tiny_backbone(variant=variant)
    prefix = 1 + variant.registers
    tokens = np.random.default_rng(1).standard_normal((2, prefix + 15, variant.width), dtype=np.float32)
    rotate = None if variant.grid else rotation(vit.periods[...], 3, 5, prefix)
    graph, stacked = nnx.split(vit.blocks)
    first = jax.tree.map(lambda x: x[0], stacked)

    def half(part, formulation):
        def loss(parameters, tokens):
            module = getattr(nnx.merge(graph, parameters), part)
            arguments = (rotate,) if part == "attention" else ()
            out = getattr(module, formulation)(tokens, *arguments)
            return jnp.sum(out**2), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(first, tokens)

    for part in ("attention", "mlp"):
        (_, rows), of_rows = half(part, "in_rows")
        (_, cols), of_cols = half(part, "in_columns")
        np.testing.assert_allclose(cols, rows, atol=2e-6)  # measured: 3.6e-7
        for a, b in zip(jax.tree.leaves(of_rows), jax.tree.leaves(of_cols), strict=True):
            # measured: 5e-7
            assert np.linalg.norm(np.asarray(a) - b) <= 2e-6 * np.linalg.norm(a)
