"""VGG-16 with BatchNorm (Simonyan and Zisserman 2015) as an encoder: the features after each of its five max-pools.

Reference code: torchvision 0.29, `models/vgg.py`, `vgg16_bn`. The classifier is omitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.ops.images import require_images
from jaxla.models.ops.layers import convolution_units
from jaxla.models.ops.pooling import Pooled, max_pool_with_indices


@dataclass(frozen=True)
class Variant:
    """One architecture."""

    stages: tuple[tuple[int, ...], ...]  # channels of each convolution of each stage, which ends with a max-pool
    licence: str = "BSD-3-Clause"  # licence of the released weights


VARIANTS = {"vgg16_bn": Variant(stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3))}


class VGG(nnx.Module):
    """Map ImageNet-normalised images [B, H, W, 3] to features in `dtype`; in evaluation mode until `train()`."""

    def __init__(self, variant: Variant, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.variant = variant
        stages = []
        inputs = 3
        for widths in variant.stages:
            stages.append(convolution_units(inputs, widths, dtype=dtype, rngs=rngs))
            inputs = widths[-1]
        self.stages = nnx.List(stages)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the last stage's features [B, H/32, W/32, 512], sides rounded down.

        Raises:
            ValueError: `images` is not [B, H, W, 3] floating point, or smaller than 32×32.
        """
        return self.intermediate(images)[-1]

    def intermediate(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Return the features [B, h, w, C] after each stage's max-pool.

        Their sides are 1/2 to 1/32 of the image's, rounded down; C is 64, 128, 256, 512 and 512.

        In training mode BatchNorm's statistics change in place, so the caller must apply jit.

        Raises:
            ValueError: `images` is invalid (see `__call__`).
        """
        return tuple(pooled.values for pooled in self.pooled(images))

    def pooled(self, images: jax.Array, present: jax.Array | None = None) -> tuple[Pooled, ...]:
        """Return the features after each stage's max-pool, and the index of the pixel that each maximum came from.

        BatchNorm's training statistics are computed from the images `present`, [B] bool (default: all).

        Raises:
            ValueError: `images` is invalid (see `__call__`).
        """
        require_images(images, min_size=2 ** len(self.stages))
        if self.stages[0][0].norm.use_running_average:  # evaluation
            return _pooled(*nnx.split(self), images)
        return self.run(images, present)

    def run(self, images: jax.Array, present: jax.Array | None = None) -> tuple[Pooled, ...]:
        """Compute `pooled`; the caller must apply jit."""
        pools = []
        x = images
        for units in self.stages:
            for unit in units:
                x = unit(x, present)
            even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
            pools.append(max_pool_with_indices(even))
            x = pools[-1].values
        return tuple(pools)


# Jitted here, so that a call outside of jit runs one compiled program.
@partial(jax.jit, static_argnums=0)
def _pooled(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> tuple[Pooled, ...]:
    return nnx.merge(graph, state).run(images)
