"""Every variant of attention against PyTorch's, and the variants that each kind of device runs."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxla.hardware import prefers_bfloat16, supports_cudnn_attention
from jaxla.models.ops.attention import attention, cudnn_attention, padded_attention, per_head_attention
from tests.gpu import pretend_gpu

batched = partial(jax.nn.dot_product_attention, implementation="xla")
padded = partial(padded_attention, implementation="xla")


def value_and_gradients(variant, weight, *qkv):
    value, vjp = jax.vjp(variant, *qkv)
    return value, vjp(weight)


@pytest.mark.parametrize("variant", [per_head_attention, batched, padded])
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 26, 3, 16), (1, 101, 2, 64), (3, 1, 1, 8)])
def test_values_and_gradients_equal_pytorch(variant, batch, tokens, heads, width):
    rng = np.random.default_rng(0)
    *qkv, weight = (rng.standard_normal((batch, tokens, heads, width), dtype=np.float32) for _ in range(4))
    with jax.default_matmul_precision("highest"):
        ours, gradients = jax.jit(value_and_gradients, static_argnums=0)(variant, weight, *qkv)

    leaves = [torch.from_numpy(x).requires_grad_() for x in qkv]
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    theirs.backward(torch.from_numpy(weight))

    np.testing.assert_allclose(ours, theirs.detach(), atol=2e-6)  # measured: 5e-7
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=5e-6)  # measured: 1.6e-6


@pytest.mark.parametrize("variant", [per_head_attention, batched])
def test_equal_keys_give_the_mean_of_the_values(variant):
    v = np.random.default_rng(0).standard_normal((1, 5, 2, 4), dtype=np.float32)
    out = variant(v, np.ones_like(v), v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


def test_the_variant_depends_on_device_and_dtype(monkeypatch):
    def primitives(dtype):
        qkv = [jax.ShapeDtypeStruct((2, 26, 3, 64), dtype)] * 3
        return str(jax.make_jaxpr(lambda *qkv: attention(*qkv))(*qkv))  # a new function, which JAX has not traced yet

    assert " scan" in primitives(jnp.float32)  # the loop over heads
    pretend_gpu(monkeypatch)
    assert "dot_product_attention_fwd" in primitives(jnp.bfloat16)
    assert "dot_product_attention_fwd" not in primitives(jnp.float32)
    assert " scan" not in primitives(jnp.float32)


@pytest.mark.parametrize("tokens", [144, 145])
def test_cudnn_attention_has_a_gradient_for_any_number_of_tokens(monkeypatch, tokens):
    """Traced as on a GPU with cuDNN, and not run."""
    pretend_gpu(monkeypatch)
    qkv = [jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16)] * 3

    def traced_gradient(variant):
        return str(jax.make_jaxpr(jax.grad(lambda *qkv: variant(*qkv).sum().astype(jnp.float32)))(*qkv))

    assert "dot_product_attention_bwd" in traced_gradient(cudnn_attention)
    forward = str(jax.make_jaxpr(cudnn_attention)(*qkv))
    assert "dot_product_attention_fwd" in forward
    assert " pad" not in forward
    # JAX itself refuses odd numbers of tokens; once it does not, this fails and `cudnn_attention` can be deleted
    with nullcontext() if tokens % 2 == 0 else pytest.raises(NotImplementedError, match="145"):
        traced_gradient(partial(jax.nn.dot_product_attention, implementation="cudnn"))


def make_device(platform, version="", **attributes):
    return SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version), **attributes)


@pytest.mark.parametrize(
    ("device", "bfloat16", "cudnn"),
    [
        (make_device("cpu", "cpu"), False, False),
        (make_device("gpu", "PJRT C API\ncuda 12090", compute_capability="7.5"), False, False),  # T4
        (make_device("gpu", "PJRT C API\ncuda 12090", compute_capability="8.0"), True, True),  # A100
        (make_device("gpu", "PJRT C API\ncuda 13000", compute_capability="12.0"), True, True),
        (make_device("gpu", "PJRT C API\nrocm 60443483", compute_capability="gfx942"), True, False),
        (make_device("tpu", "TFRT TPU v5 lite"), True, False),
    ],
    ids=["CPU", "Turing", "Ampere", "Blackwell", "AMD", "TPU"],
)
def test_capabilities_of_devices_are_recognised(device, bfloat16, cudnn):
    assert (prefers_bfloat16(device), supports_cudnn_attention(device)) == (bfloat16, cudnn)
