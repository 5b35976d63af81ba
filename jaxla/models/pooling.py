"""Max-pooling over 2×2 pixels, and its undoing with the places of the largest (SegNet, Badrinarayanan et al. 2017).

Of equal values the first counts, as in PyTorch; so the gradient goes to one pixel.
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
    values, places = x[:, ::2, ::2], jnp.zeros((), jnp.int8)
    for place in (1, 2, 3):
        other = x[:, place // 2 :: 2, place % 2 :: 2]
        places = jnp.where(other > values, jnp.int8(place), places)
        values = jnp.maximum(values, other)
    return Pooled(values, places)


@jax.custom_vjp
def unpool(x: jax.Array, places: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, 2h, 2w, C], each value where its maximum was, zeros elsewhere."""
    batch, height, width, channels = x.shape
    four = [jnp.where(places == place, x, 0) for place in range(4)]
    rows = [jnp.stack(four[i : i + 2], axis=3) for i in (0, 2)]  # [B, h, w, 2, C]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def pick(x: jax.Array, places: jax.Array) -> jax.Array:
    """The transposed of `unpool`: [B, 2h, 2w, C] -> [B, h, w, C], of each 2×2 pixels the one in that place."""
    picked = x[:, ::2, ::2]
    for place in (1, 2, 3):
        picked = jnp.where(places == place, x[:, place // 2 :: 2, place % 2 :: 2], picked)
    return picked


def _pool_forward(x: jax.Array) -> tuple[Pooled, jax.Array]:
    pooled = max_pool_with_places(x)
    return pooled, pooled.places


max_pool_with_places.defvjp(_pool_forward, lambda places, gradients: (unpool(gradients.values, places),))
unpool.defvjp(lambda x, places: (unpool(x, places), places), lambda places, gradient: (pick(gradient, places), None))
