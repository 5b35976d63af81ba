"""A transformer block's layers with one token a column: on CPU, XLA multiplies such matrices faster than rows.

A layer enters columns, [B·N, K] -> [M, B·N], or leaves them, [K, B·N] -> [B·N, M]. Either product reads its left
matrix along columns, which sends XLA to another matrix library than the usual one; and each head's queries, keys and
values lie in rows of their own. On some processors that is faster by a tenth, on others equal; rows alone were seen to
take half as long again where XLA's choice of layouts was unlucky.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.distributed import map_over_devices


def enter(linear: nnx.Linear, x: jax.Array) -> jax.Array:
    """A linear layer of [B, N, K], its result in columns: [M, B·N]."""
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)  # else XLA would undo the transposition
    y = jnp.einsum("km,kn->mn", linear.kernel[...].astype(x.dtype), columns)
    return y if linear.bias is None else y + linear.bias[...].astype(x.dtype)[:, None]


def leave(linear: nnx.Linear, columns: jax.Array, batch: int) -> jax.Array:
    """A linear layer of columns [K, B·N], its result one token a row: [B, N, M]."""
    y = jnp.einsum("kn,km->nm", columns, linear.kernel[...].astype(columns.dtype))
    y = y if linear.bias is None else y + linear.bias[...].astype(columns.dtype)
    return y.reshape(batch, -1, y.shape[-1])


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(qᵀk / √D) for each head, as weights of the columns of `v`; all [B, heads, D, N].

    One head of one image at a time: so its scores stay in the processor's cache.
    """
    return map_over_devices(_attention)(q, k, v)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    shape = q.shape

    def head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv
        scores = jnp.einsum("dn,dm->nm", q * shape[2] ** -0.5, k)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        # dividing late spares a pass over the weights; rows, transposed after, are faster than columns at once
        return (jnp.einsum("nm,dm->nd", weights, v) / weights.sum(-1, keepdims=True)).T

    return jax.lax.map(head, tuple(x.reshape(-1, *shape[2:]) for x in (q, k, v))).reshape(shape)
