"""Multi-head attention in the variant that is fastest on the device (`jaxla.hardware.attention_variant`)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxla.hardware import attention_variant
from jaxla.mesh import map_over_devices


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return softmax(q kᵀ / √D) v, in the dtype of `q`, for each head of q, k and v [B, N, heads, D]."""
    match attention_variant(q.dtype):
        case "per_head":
            return map_over_devices(per_head_attention)(q, k, v)
        case "cudnn":
            return map_over_devices(cudnn_attention)(q, k, v)
        case "xla":
            return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def per_head_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute attention for one head of one image at a time, so that its scores stay in the processor's cache."""
    batch, tokens, heads, width = q.shape

    def attend(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv  # [N, D]
        scores = (q * width**-0.5) @ k.T
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return (weights @ v) / weights.sum(-1, keepdims=True)  # dividing last saves a pass over the weights

    out = jax.lax.map(attend, tuple(x.swapaxes(1, 2).reshape(-1, tokens, width) for x in (q, k, v)))
    return out.reshape(batch, heads, tokens, width).swapaxes(1, 2)


@jax.custom_vjp
def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute attention with cuDNN, with a gradient also for odd N.

    JAX 0.10 rejects that gradient: cuDNN lacks it for odd N with a bias, and JAX treats a missing bias like a bias.
    """
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _cudnn_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.tree_util.Partial]:
    return jax.vjp(partial(padded_attention, implementation="cudnn"), q, k, v)


cudnn_attention.defvjp(_cudnn_forward, lambda vjp, gradient: vjp(gradient))


def padded_attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """Compute attention of an even number of tokens, by adding a masked token if N is odd."""
    batch, tokens = q.shape[:2]
    if tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    lengths = jnp.full(batch, tokens, jnp.int32)
    padded = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *padded, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )
    return out[:, :tokens]
