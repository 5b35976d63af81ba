"""VGG-16 with BatchNorm (Simonyan, Zisserman 2015) as an encoder: the features after each of its five max-pools.

Reference code: torchvision 0.29, `models/vgg.py`, `vgg16_bn`. The classifier is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.ops.images import require_images
from jaxla.models.ops.layers import units_in_turn
from jaxla.models.ops.pooling import Pooled, max_pool_with_places


@dataclass(frozen=True)
class Variant:
    """One row of the table of architectures.

    Attributes:
        stages: channels of each convolution of each of the five stages; a max-pool ends a stage.
        licence: of the released weights.
    """

    stages: tuple[tuple[int, ...], ...]
    licence: str = "BSD-3-Clause"


VARIANTS = {"vgg16_bn": Variant(stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3))}


class VGG(nnx.Module):
    """Images [B, H, W, 3], ImageNet-normalised, to features; in evaluation mode until `train()`.

    Args:
        variant: row of `VARIANTS`.
        dtype: of the computation; parameters and statistics stay float32.
    """

    def __init__(self, variant: Variant, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.variant = variant
        stages, inputs = [], 3
        for widths in variant.stages:
            stages.append(units_in_turn(inputs, widths, dtype=dtype, rngs=rngs))
            inputs = widths[-1]
        self.stages = nnx.List(stages)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The last stage's features [B, H/32, W/32, 512]; sides round down.

        Raises:
            ValueError: `images` is not [B, H, W, 3] of floating point, or smaller than 32×32.
        """
        return self.intermediate(images)[-1]

    def intermediate(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """The features after each stage's max-pool, [B, h, w, C] each.

        Their sides are 1/2 to 1/32 of the image's, rounded down; C is 64, 128, 256, 512 and 512.

        In training mode BatchNorm's statistics change in place, so the caller jits.

        Raises:
            ValueError: as for calling.
        """
        return tuple(pooled.values for pooled in self.pooled(images))

    def pooled(self, images: jax.Array, present: jax.Array | None = None) -> tuple[Pooled, ...]:
        """The features after each stage's max-pool, and which of its pixels each maximum was.

        Args:
            present: [B] bool, which images BatchNorm's statistics are of while it trains; by default all.

        Raises:
            ValueError: as for calling.
        """
        require_images(images, least=2 ** len(self.stages))
        if self.stages[0][0].norm.use_running_average:  # evaluation
            return _pooled(*nnx.split(self), images)
        return self.run(images, present)

    def run(self, images: jax.Array, present: jax.Array | None = None) -> tuple[Pooled, ...]:
        """`pooled`, for those who jit."""
        pools, x = [], images
        for units in self.stages:
            for unit in units:
                x = unit(x, present)
            even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
            pools.append(max_pool_with_places(even))
            x = pools[-1].values
        return tuple(pools)


# Jitted here rather than by the caller, as every backbone.
@partial(jax.jit, static_argnums=0)
def _pooled(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> tuple[Pooled, ...]:
    return nnx.merge(graph, state).run(images)
