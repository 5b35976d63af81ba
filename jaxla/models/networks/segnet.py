"""SegNet (Badrinarayanan, Kendall, Cipolla 2017): a VGG-16 encoder and a decoder that mirrors it.

The decoder unpools each map: a value goes to the pixel where the encoder's pooling found its maximum, with zeros around
it. The encoder passes only these indices to the decoder, no features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.backbones.vgg import VARIANTS, VGG
from jaxla.models.networks.base import BackboneOptions, PaddedNetwork, check_smallest_size
from jaxla.models.ops.layers import convolution_units, logits_layer
from jaxla.models.ops.pooling import unpool


@dataclass(frozen=True)
class SegNetOptions(BackboneOptions):
    """Options of SegNet.

    Args:
        arch: Architecture of the encoder.
        backbone: Keep the encoder `frozen` as loaded, or train it too (`finetuned`).
    """

    ARCHITECTURES: ClassVar[Collection[str]] = VARIANTS
    KIND: ClassVar[str] = "VGG"

    arch: str = "vgg16_bn"

    def check_size(self, option_name: str, size: int) -> None:
        check_smallest_size(option_name, size, SegNet.multiple, self.arch)

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VGG) -> SegNet:
        return SegNet(backbone, outputs, dtype=dtype, rngs=rngs)


class SegNet(PaddedNetwork):
    """A VGG encoder and a decoder that mirrors it."""

    multiple = 32

    def __init__(self, backbone: VGG, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.backbone = backbone
        encoder = backbone.variant.stages
        # A decoder stage ends with the width of the next finer encoder stage; the finest is followed by the logits.
        finer = [stage[-1] for stage in encoder[:-1]]
        stages = [(*stage[1:], last) for last, stage in zip(finer, encoder[1:], strict=True)]
        self.up = nnx.List(
            [
                convolution_units(stage[-1], widths, dtype=dtype, rngs=rngs)
                for stage, widths in zip(encoder, [encoder[0][1:], *stages], strict=True)
            ]
        )
        self.logits = logits_layer(encoder[0][0], outputs, 3, dtype, rngs)

    def padded_logits(self, images: jax.Array, present: jax.Array | None) -> jax.Array:
        pools = self.backbone.pooled(images, present)
        x = pools[-1].values
        for stage, pooled in zip(reversed(self.up), reversed(pools), strict=True):
            x = unpool(x, pooled.indices)
            for unit in stage:
                x = unit(x, present)
        return self.logits(x)
