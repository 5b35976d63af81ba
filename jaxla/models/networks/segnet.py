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
from jaxla.models.networks.base import BackboneOptions, check_smallest_size
from jaxla.models.ops.images import crop, pad_to_multiple, require_images, three_channels
from jaxla.models.ops.layers import convolution_units, logits_layer
from jaxla.models.ops.pooling import unpool

MULTIPLE = 32  # images are padded to multiples of this side


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
    """A VGG encoder and a decoder that mirrors it.

    Args:
        outputs: K, channels of the logits.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
    """

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

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Return logits [B, H, W, K] float32; H and W are at least 32.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] already ImageNet-normalised.
            present: [B] bool, the images that BatchNorm's training statistics are computed from. Default: all.

        Raises:
            ValueError: `images` has another shape, is not floating point, or is too small.
        """
        require_images(images, min_size=MULTIPLE, channels=(1, 3))
        pools = self.backbone.pooled(pad_to_multiple(three_channels(images), MULTIPLE), present)
        x = pools[-1].values
        for stage, pooled in zip(reversed(self.up), reversed(pools), strict=True):
            x = unpool(x, pooled.indices)
            for unit in stage:
                x = unit(x, present)
        return crop(self.logits(x), images.shape[1:3], MULTIPLE)
