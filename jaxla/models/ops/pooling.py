"""Max-pooling over 2×2 pixels, its undoing with the places of the largest (SegNet, Badrinarayanan et al. 2017), and
max-pooling over 3×3 pixels, which overlap (ResNet, He et al. 2016).

Of equal values the first counts, as in PyTorch; so the gradient goes to one pixel. Gradients are written out: XLA's own
for windows that overlap takes ten times as long on CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pooled(NamedTuple):
    """Of each 2×2 pixels the largest.

    Attributes:
        values: [B, H/2, W/2, C].
        places: [B, H/2, W/2, C] int8, which of the four it was: 0 and 1 above, 2 and 3 below.
    """

    values: jax.Array
    places: jax.Array


def max_pool(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C]; H and W are even."""
    return max_pool_with_places(x).values


@jax.custom_vjp
def max_pool_with_places(x: jax.Array) -> Pooled:
    """[B, H, W, C] -> the largest of each 2×2 pixels, and which it was; H and W are even."""
    return _largest([x[:, i::2, j::2] for i in range(2) for j in range(2)])


@jax.custom_vjp
def unpool(x: jax.Array, places: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, 2h, 2w, C], each value where its maximum was, zeros elsewhere."""
    return _interleave([jnp.where(places == place, x, 0) for place in range(4)])


def pick(x: jax.Array, places: jax.Array) -> jax.Array:
    """The transposed of `unpool`: [B, 2h, 2w, C] -> [B, h, w, C], of each 2×2 pixels the one in that place."""
    picked = x[:, ::2, ::2]
    for place in (1, 2, 3):
        picked = jnp.where(places == place, x[:, place // 2 :: 2, place % 2 :: 2], picked)
    return picked


def _largest(windows: list[jax.Array]) -> Pooled:
    values, places = windows[0], jnp.zeros((), jnp.int8)
    for place, other in enumerate(windows[1:], 1):
        places = jnp.where(other > values, jnp.int8(place), places)
        values = jnp.maximum(values, other)
    return Pooled(values, places)


def _interleave(four: list[jax.Array]) -> jax.Array:
    """Four of [B, h, w, C] -> [B, 2h, 2w, C], of each 2×2 pixels the first two above, the others below."""
    batch, height, width, channels = four[0].shape
    rows = [jnp.stack(four[i : i + 2], axis=3) for i in (0, 2)]  # [B, h, w, 2, C]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _pool_forward(x: jax.Array) -> tuple[Pooled, jax.Array]:
    pooled = max_pool_with_places(x)
    return pooled, pooled.places


max_pool_with_places.defvjp(_pool_forward, lambda places, gradients: (unpool(gradients.values, places),))
unpool.defvjp(lambda x, places: (unpool(x, places), places), lambda places, gradient: (pick(gradient, places), None))


# --- overlapping windows ---------------------------------------------------------------------------------------------


def max_pool_overlapping(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], sides rounded up: the largest of 3×3 pixels around every second one."""
    height, width = x.shape[1:3]
    return _overlapping(jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=-jnp.inf))


@jax.custom_vjp
def _overlapping(x: jax.Array) -> jax.Array:
    return _overlapping_forward(x)[0]


def _overlapping_forward(x: jax.Array) -> Pooled:
    """The largest, and which of its window's nine it was, row by row from 0."""
    # what lies outside the image is never the largest
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    height, width = (side - 1 for side in x.shape[1:3])
    return _largest([x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)])


def _overlapping_backward(places: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    at = [jnp.where(places == place, gradient, 0) for place in range(9)]
    # An even pixel is the middle of one window; an odd one belongs to the next window too.
    above = [at[4], at[5] + _next(at[3], 2)]
    below = [at[7] + _next(at[1], 1), at[8] + _next(at[6], 2) + _next(at[2] + _next(at[0], 2), 1)]
    return (_interleave(above + below),)


def _next(x: jax.Array, axis: int) -> jax.Array:
    """Each window's neighbour below (axis 1) or to the right (axis 2); zeros beyond the last."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(-1, 1, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])


_overlapping.defvjp(_overlapping_forward, _overlapping_backward)
