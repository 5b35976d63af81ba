"""Max-pooling and unpooling of 2×2 pixels, as in SegNet, and overlapping max-pooling of 3×3 pixels, as in ResNet.

Among equal values the first is the maximum, as in PyTorch, so the gradient goes to one pixel. The gradients are written
out: XLA's gradient of overlapping pooling takes ten times as long on CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pooled(NamedTuple):
    """The maximum of each block of 2×2 pixels."""

    values: jax.Array  # [B, H/2, W/2, C]
    indices: jax.Array  # [B, H/2, W/2, C] int8, position of the maximum in its block: 0 and 1 are above 2 and 3


def max_pool(x: jax.Array) -> jax.Array:
    """Return the maximum of each block of 2×2 pixels: [B, H, W, C] -> [B, H/2, W/2, C], H and W even."""
    return max_pool_with_indices(x).values


@jax.custom_vjp
def max_pool_with_indices(x: jax.Array) -> Pooled:
    """Return the maximum of each block of 2×2 pixels of [B, H, W, C], and its position; H and W are even."""
    return _max_with_index([x[:, i::2, j::2] for i in range(2) for j in range(2)])


@jax.custom_vjp
def unpool(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Put each value at its index in a block of 2×2 pixels, and zeros elsewhere: [B, h, w, C] -> [B, 2h, 2w, C]."""
    return _interleave([jnp.where(indices == index, x, 0) for index in range(4)])


def gather(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Return the pixel with the given index in each block of 2×2 pixels; the transpose of `unpool`."""
    gathered = x[:, ::2, ::2]
    for index in (1, 2, 3):
        gathered = jnp.where(indices == index, x[:, index // 2 :: 2, index % 2 :: 2], gathered)
    return gathered


def _max_with_index(candidates: list[jax.Array]) -> Pooled:
    values, indices = candidates[0], jnp.zeros((), jnp.int8)
    for index, candidate in enumerate(candidates[1:], 1):
        indices = jnp.where(candidate > values, jnp.int8(index), indices)
        values = jnp.maximum(values, candidate)
    return Pooled(values, indices)


def _interleave(four: list[jax.Array]) -> jax.Array:
    """Place four arrays [B, h, w, C] on the four pixels of each 2×2 block: [B, 2h, 2w, C], upper row first."""
    batch, height, width, channels = four[0].shape
    rows = [jnp.stack(four[i : i + 2], axis=3) for i in (0, 2)]  # [B, h, w, 2, C]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _pool_forward(x: jax.Array) -> tuple[Pooled, jax.Array]:
    pooled = max_pool_with_indices(x)
    return pooled, pooled.indices


max_pool_with_indices.defvjp(_pool_forward, lambda indices, gradients: (unpool(gradients.values, indices),))
unpool.defvjp(
    lambda x, indices: (unpool(x, indices), indices),
    lambda indices, gradient: (gather(gradient, indices), None),
)


def max_pool_overlapping(x: jax.Array) -> jax.Array:
    """Return the maximum of 3×3 pixels around every second pixel: [B, H, W, C] -> [B, H/2, W/2, C], rounded up."""
    height, width = x.shape[1:3]
    return _overlapping(jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=-jnp.inf))


@jax.custom_vjp
def _overlapping(x: jax.Array) -> jax.Array:
    return _overlapping_forward(x)[0]


def _overlapping_forward(x: jax.Array) -> Pooled:
    """Return the maximum, and its index among the nine pixels, row by row from 0."""
    # outside the image no pixel is the maximum
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    height, width = (side - 1 for side in x.shape[1:3])
    return _max_with_index([x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)])


def _overlapping_backward(indices: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    grads = [jnp.where(indices == index, gradient, 0) for index in range(9)]
    # An even pixel is the centre of one 3×3 square; an odd pixel also belongs to the next square.
    above = [grads[4], grads[5] + _shift(grads[3], 2)]
    below = [grads[7] + _shift(grads[1], 1), grads[8] + _shift(grads[6], 2) + _shift(grads[2] + _shift(grads[0], 2), 1)]
    return (_interleave(above + below),)


def _shift(x: jax.Array, axis: int) -> jax.Array:
    """Return each pixel's neighbour below (axis 1) or to the right (axis 2), zero beyond the last."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(-1, 1, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])


_overlapping.defvjp(_overlapping_forward, _overlapping_backward)
