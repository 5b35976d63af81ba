"""Sliding-window inference: the positions and weights of overlapping tiles, and a network applied to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

STEP_FRACTION = 0.5  # largest distance between two tiles, relative to a tile's side
SIGMA_FRACTION = 1 / 8  # standard deviation of a tile's Gaussian weights, relative to its side


def tile_starts(n: int, side: int) -> list[int]:
    """Return the starts of the tiles along n voxels: evenly spaced, at most half a tile apart."""
    count = int(np.ceil((n - side) / (side * STEP_FRACTION))) + 1
    return [round((n - side) / max(count - 1, 1) * i) for i in range(count)]


def gaussian_weights(size: Sequence[int]) -> np.ndarray:
    """Return the weight of each voxel of a tile, float32 and positive: a Gaussian around the centre."""
    centre = np.zeros(size)
    centre[tuple(side // 2 for side in size)] = 1
    weight = ndimage.gaussian_filter(centre, [side * SIGMA_FRACTION for side in size], mode="constant")
    weight = np.float32(weight / weight.max())
    return np.maximum(weight, weight[weight > 0].min())


def apply_in_tiles(network: Callable[..., jax.Array], side: int, images: jax.Array, *rest: Any) -> jax.Array:
    """Return logits [B, H, W, K] of images [B, H, W, C], float32: the mean over tiles, weighted to their centres.

    The network reads one tile of all images at a time, so it needs the memory of a single tile.

    Args:
        network: `(images, *rest) -> logits`, for images of `side` × `side` pixels; H and W are at least `side`.
    """
    count, height, width, channels = images.shape
    starts = list(product(tile_starts(height, side), tile_starts(width, side)))
    weight = gaussian_weights((side, side))[..., None]
    weights = np.zeros((height, width, 1), np.float32)
    for row, column in starts:
        weights[row : row + side, column : column + side] += weight

    def tile_logits(start: jax.Array) -> jax.Array:
        return network(jax.lax.dynamic_slice(images, (0, *start, 0), (count, side, side, channels)), *rest)

    def add_tile(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        logits, corner = tile_logits(start), (0, *start, 0)
        present = jax.lax.dynamic_slice(total, corner, logits.shape)
        return jax.lax.dynamic_update_slice(total, present + logits * weight, corner), None

    logits = jax.eval_shape(tile_logits, jnp.array(starts[0]))
    total = jnp.zeros((count, height, width, logits.shape[-1]), jnp.float32)
    return jax.lax.scan(add_tile, total, jnp.array(starts))[0] / weights
