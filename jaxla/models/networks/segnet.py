"""SegNet (Badrinarayanan, Kendall, Cipolla 2017): VGG-16's convolutions and their mirror image.

On the way up each map is unpooled: a value goes where the maximum was on the way down, zeros around it. No other
feature passes from the encoder to the decoder.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.backbones.vgg import VARIANTS, VGG
from jaxla.models.networks.base import BackboneOptions, check_smallest_size
from jaxla.models.ops.images import crop, pad_to_multiple, require_images, three_channels
from jaxla.models.ops.layers import convolution_units, logits_layer
from jaxla.models.ops.pooling import unpool

MULTIPLE = 32  # of which the sides must be; other images are padded


@dataclass(frozen=True)
class SegNetOptions(BackboneOptions):
    """Options of SegNet.

    Args:
        arch: Architecture of the encoder.
        weights: A converted `.safetensors` file, or `random`. Default: `<cache>/weights/<arch>.safetensors`.
        backbone: Keep the encoder `frozen` as loaded, or train it too (`finetuned`).
    """

    ARCHITECTURES: ClassVar[Collection[str]] = VARIANTS
    KIND: ClassVar[str] = "VGG"

    arch: str = "vgg16_bn"

    def check_size(self, option_name: str, size: int) -> None:
        check_smallest_size(option_name, size, MULTIPLE, self.arch)

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VGG) -> SegNet:
        return SegNet(backbone, outputs, dtype=dtype, rngs=rngs)


class SegNet(nnx.Module):
    """Images to logits.

    Args:
        outputs: K, channels of the logits.
        dtype: of the computation; parameters, statistics and logits are float32.
    """

    def __init__(self, backbone: VGG, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.backbone = backbone
        encoder = backbone.variant.stages
        # a stage ends in the width of the stage above it; the first, in the logits
        above = [stage[-1] for stage in encoder[:-1]]
        stages = [(*stage[1:], last) for last, stage in zip(above, encoder[1:], strict=True)]
        self.up = nnx.List(
            [
                convolution_units(stage[-1], widths, dtype=dtype, rngs=rngs)
                for stage, widths in zip(encoder, [encoder[0][1:], *stages], strict=True)
            ]
        )
        self.logits = logits_layer(encoder[0][0], outputs, 3, dtype, rngs)

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Logits [B, H, W, K] float32, for any H and W of at least 32.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] already ImageNet-normalised.
            present: [B] bool, which of them BatchNorm's statistics are of while it trains; by default all.

        Raises:
            ValueError: `images` is of another shape, not of floating point, or too small.
        """
        require_images(images, min_size=MULTIPLE, channels=(1, 3))
        pools = self.backbone.pooled(pad_to_multiple(three_channels(images), MULTIPLE), present)
        x = pools[-1].values
        for stage, pooled in zip(reversed(self.up), reversed(pools), strict=True):
            x = unpool(x, pooled.indices)
            for unit in stage:
                x = unit(x, present)
        return crop(self.logits(x), images.shape[1:3], MULTIPLE)
