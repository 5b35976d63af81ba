"""Multi-head attention on GPU and TPU; `columns.attention` is the CPU's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxla.distributed import map_over_devices
from jaxla.hardware import supports_cudnn_attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D) v for each head.

    Args:
        q, k, v: [B, N, heads, D].

    Returns:
        [B, N, heads, D] in the dtype of `q`.
    """
    if q.dtype == jnp.bfloat16 and all(map(supports_cudnn_attention, jax.devices())):
        return map_over_devices(cudnn_attention)(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


@jax.custom_vjp
def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same by cuDNN.

    JAX 0.10 refuses its gradient where N is odd: cuDNN has none then if there is a bias, and JAX takes a missing bias
    for one.
    """
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _with_gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.tree_util.Partial]:
    return jax.vjp(partial(padded_attention, implementation="cudnn"), q, k, v)


cudnn_attention.defvjp(_with_gradient, lambda pull, gradient: pull(gradient))


def padded_attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """The same; where N is odd, with one token more that no other sees."""
    batch, tokens = q.shape[:2]
    if tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    lengths = jnp.full(batch, tokens, jnp.int32)
    padded = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *padded, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )
    return out[:, :tokens]
