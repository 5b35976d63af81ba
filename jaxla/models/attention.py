"""Multi-head attention on GPU and TPU; `columns.attention` is the CPU's."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D) v for each head.

    Args:
        q, k, v: [B, N, heads, D].

    Returns:
        [B, N, heads, D] in the dtype of `q`.
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v)
