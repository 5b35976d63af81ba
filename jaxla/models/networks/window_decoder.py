"""Paper 3's decoder, which maps the features of one window to logits (see `jaxla.models.networks.windows`).

Convolutions span three slices. Upsampling doubles the size within the plane and keeps the number of slices, because
features have the volume's resolution along the slices from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.ops.layers import LECUN_NORMAL, convolution_nd
from jaxla.models.ops.norms import GroupNorm
from jaxla.models.ops.resizing import resize, upsample_2x

LEVELS = 4  # levels of features, taken after 1/4, 2/4, 3/4 and all of the backbone's blocks

PlaneSize = tuple[int | jax.Array, int | jax.Array]  # rows and columns of a window that are not padding


class WindowDecoder(nnx.Module):
    """A light decoder, from the features of the deepest level to logits in three ×2 stages.

    Each stage adds the features of the next shallower level. A 1×1×1 convolution projects a level's features, and a
    depth embedding, which depends on a slice's position in the volume, is added. A 3×3×3 convolution, GroupNorm and
    ReLU follow.

    Args:
        width: C, channels of the features.
        widths: channels after the deepest level, then after each ×2 stage.
        outputs: K, channels of the logits.
        depth_places: positions of the depth embedding; 0 for none.
        slicewise: whether each slice is decoded separately, with 1×3×3 convolutions.
    """

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        outputs: int,
        *,
        depth_places: int,
        slicewise: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.slicewise = slicewise
        level_widths = (widths[0], *widths[:-1])  # deepest level first
        self.levels = nnx.List([Level(width, w, depth_places, dtype=dtype, rngs=rngs) for w in level_widths])
        depth = 1 if slicewise else 3
        self.units = nnx.List([Unit(i, o, depth, dtype=dtype, rngs=rngs) for i, o in pairwise((widths[0], *widths))])
        logits_dtype = jnp.promote_types(dtype, jnp.float32)
        self.logits = nnx.Linear(widths[-1], outputs, dtype=logits_dtype, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(
        self,
        features: jax.Array,
        slice_numbers: jax.Array,
        present: jax.Array,
        slices: jax.Array,
        plane_size: PlaneSize | None = None,
    ) -> jax.Array:
        """Return logits [B, d, 8h, 8w, K] float32 from features [B, d, 4, h, w, C].

        Args:
            slice_numbers: [B, d], the index of each slice in its volume.
            present: [B, d] bool, False for padding, which does not change the logits of other slices.
            slices: [B], the number of slices of each volume.
            plane_size: numbers of rows and columns that belong to the window, which come first. The others repeat the
                last one and do not change the logits of the window. Default: all.
        """
        leading_axes = features.shape[:2]
        # position of each slice's centre along the depth, in 0..1
        position = (slice_numbers + 0.5) / jnp.maximum(slices, 1)[:, None]
        if self.slicewise:
            features, position, present = (x.reshape(-1, 1, *x.shape[2:]) for x in (features, position, present))
        x = None
        for i, (level, unit) in enumerate(zip(self.levels, self.units, strict=True)):
            projected = level(features[:, :, LEVELS - 1 - i], position)
            if x is None:
                x = projected
            else:
                if plane_size is not None:
                    x = _repeat_last(x, *(side << (i - 1) for side in plane_size))
                x = map_slices(upsample_2x, x)
                x = x + map_slices(lambda y, size=x.shape[2:4]: resize(y, size), projected)
            x = unit(x, present, plane_size and tuple(side << i for side in plane_size))
        logits = self.logits(x)
        return logits.reshape(*leading_axes, *logits.shape[2:])


class Level(nnx.Module):
    """Project the features of one level; add its depth embedding, interpolated from `depth_places` positions."""

    def __init__(self, width: int, outputs: int, depth_places: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.project = nnx.Linear(width, outputs, dtype=dtype, rngs=rngs)
        self.depth_places = depth_places
        if depth_places:
            self.depth = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (depth_places, outputs)))

    def __call__(self, features: jax.Array, position: jax.Array) -> jax.Array:
        """Return [B, d, h, w, outputs] from features [B, d, h, w, C] at positions [B, d] in 0..1 along the depth."""
        x = self.project(features)
        if not self.depth_places:
            return x
        index = jnp.clip(position * self.depth_places - 0.5, 0, self.depth_places - 1)
        lower = jnp.floor(index).astype(jnp.int32)
        fraction = (index - lower)[..., None]
        depth = self.depth[...]
        embedding = (1 - fraction) * depth[lower] + fraction * depth[jnp.minimum(lower + 1, self.depth_places - 1)]
        return x + embedding[:, :, None, None].astype(x.dtype)


class Unit(nnx.Module):
    """A convolution over 3×3 pixels and `depth` slices, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.convolution = convolution_nd(inputs, outputs, (depth, 3, 3), (1, 1, 1), dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(outputs, dtype=dtype)

    def __call__(self, x: jax.Array, present: jax.Array, plane_size: PlaneSize | None) -> jax.Array:
        """Return [B, d, h, w, K] from x [B, d, h, w, C]; the convolution treats padding as zeros."""
        present = present[:, :, None, None]
        if plane_size is not None:
            rows, columns = (jnp.arange(n) < size for n, size in zip(x.shape[2:4], plane_size, strict=True))
            present = present & rows[:, None] & columns
        x = jnp.where(present[..., None], x, 0)
        return jax.nn.relu(self.norm(self.convolution(x), present))


def map_slices(function: Callable[[jax.Array], jax.Array], volumes: jax.Array) -> jax.Array:
    """Apply a function of slices [B, …] to volumes of slices [B, D, …]."""
    results = function(volumes.reshape(-1, *volumes.shape[2:]))
    return results.reshape(*volumes.shape[:2], *results.shape[1:])


def _repeat_last(x: jax.Array, *plane_size: int | jax.Array) -> jax.Array:
    """Replace the padding of rows and columns of x [B, d, h, w, C] by the last row and column before it."""
    for axis, count in enumerate(plane_size, start=2):
        x = jnp.take(x, jnp.minimum(jnp.arange(x.shape[axis]), count - 1), axis=axis, mode="clip")
    return x
