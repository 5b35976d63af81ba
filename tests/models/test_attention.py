"""Attention against PyTorch's, on the formulation that each device takes."""

import jax
import numpy as np
import pytest
import torch

from jaxla.models.attention import _one_head_at_a_time, attention


@pytest.mark.parametrize("formulation", [attention, _one_head_at_a_time])
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 26, 3, 16), (1, 101, 2, 64), (3, 1, 1, 8)])
def test_values_and_gradients_equal_pytorch(formulation, batch, tokens, heads, width):
    rng = np.random.default_rng(0)
    *qkv, weight = (rng.standard_normal((batch, tokens, heads, width), dtype=np.float32) for _ in range(4))
    with jax.default_matmul_precision("highest"):
        ours, pull = jax.vjp(formulation, *qkv)
        gradients = pull(weight)

    leaves = [torch.from_numpy(x).requires_grad_() for x in qkv]
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    theirs.backward(torch.from_numpy(weight))

    np.testing.assert_allclose(ours, theirs.detach(), atol=5e-6)  # measured: 5e-7
    for mine, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(mine, leaf.grad, atol=1e-5)  # measured: 1.6e-6


def test_every_query_takes_a_mean_of_values():
    """Equal keys: each output is the plain mean of the head's values."""
    v = np.random.default_rng(0).standard_normal((1, 5, 2, 4), dtype=np.float32)
    out = attention(v, np.ones_like(v), v)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)
