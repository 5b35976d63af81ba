"""Resize maps [B, h, w, C] as PyTorch does, faster on CPU than with matrix products."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resize [B, h, w, C] bilinearly, with half-pixel centres and without antialiasing.

    Gives the same result as PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    for axis, pixels in zip((1, 2), size, strict=True):
        groups = math.gcd(x.shape[axis], pixels)
        if x.shape[axis] // groups == pixels // groups + 1:
            x = _shrink(x, axis, pixels, groups)
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear", antialias=False)


def _shrink(x: jax.Array, axis: int, pixels: int, groups: int) -> jax.Array:
    """Resize an axis by (q + 1) : q, such as 512 to 448: each group of q + 1 pixels becomes q means of neighbours.

    A matrix product would take 20 % of a training step of paper 1's decoder on CPU.
    """
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    position = (np.arange(pixels, dtype=np.float32) + 0.5) * np.float32(x.shape[axis] / pixels) - 0.5
    weight = (position - np.floor(position)).reshape(groups, -1, *(1 for _ in after)).astype(x.dtype)
    x = x.reshape(*before, groups, -1, *after)
    q = x.shape[axis + 1] - 1
    left, right = (jax.lax.slice_in_dim(x, start, start + q, axis=axis + 1) for start in (0, 1))
    return ((1 - weight) * left + weight * right).reshape(*before, pixels, *after)


@jax.custom_vjp
def upsample_2x(x: jax.Array) -> jax.Array:
    """Resize [B, h, w, C] to [B, 2h, 2w, C], as `resize` does.

    Along each axis a new pixel is ¾ of the pixel that contains it and ¼ of the nearest neighbour. These sums, with
    their gradient written out, are three to four times as fast on CPU as the matrix products of `jax.image.resize`.
    """
    return _upsample_axis(_upsample_axis(x, 1), 2)


def _upsample_axis(x: jax.Array, axis: int) -> jax.Array:
    before, after = _neighbours(x, axis, edges=(x, x))
    upsampled = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return upsampled.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])


def _upsample_axis_transposed(gradient: jax.Array, axis: int) -> jax.Array:
    shape = gradient.shape
    pairs = gradient.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    # at the edges a pixel is its own neighbour
    from_before, _ = _neighbours(second, axis, edges=(first, first))
    _, from_after = _neighbours(first, axis, edges=(second, second))
    return 0.75 * (first + second) + 0.25 * (from_before + from_after)


def _neighbours(x: jax.Array, axis: int, edges: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the neighbours before and after each pixel.

    The first pixel of `edges[0]` stands before the image, and the last pixel of `edges[1]` after it.
    """
    n = x.shape[axis]
    first, last = jax.lax.slice_in_dim(edges[0], 0, 1, axis=axis), jax.lax.slice_in_dim(edges[1], n - 1, n, axis=axis)
    before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, n - 1, axis=axis)], axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, n, axis=axis), last], axis)
    return before, after


upsample_2x.defvjp(
    lambda x: (upsample_2x(x), None),
    lambda _, gradient: (_upsample_axis_transposed(_upsample_axis_transposed(gradient, 2), 1),),
)
