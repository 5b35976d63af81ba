"""A U-Net with a ResNet encoder (He et al. 2016), pretrained or not.

The decoder is that of `segmentation_models_pytorch`, the common implementation: each stage doubles the map (nearest
neighbour), concatenates the encoder's features of that size, and applies two 3×3 convolutions with BatchNorm and ReLU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import option
from jaxla.models.backbones.resnet import EXPANSION, VARIANTS, WIDTH, ResNet
from jaxla.models.networks.base import BackboneOptions, PaddedNetwork, check_smallest_size, check_widths
from jaxla.models.networks.unet import DoubleConvolution
from jaxla.models.ops.layers import logits_layer

# Channels that each decoder stage takes from the encoder, at 1/16, 1/8, 1/4 and 1/2 of its size; the last takes none.
SKIP_WIDTHS = (4 * EXPANSION * WIDTH, 2 * EXPANSION * WIDTH, EXPANSION * WIDTH, WIDTH, 0)


@dataclass(frozen=True)
class ResNetUNetOptions(BackboneOptions):
    """Options of a U-Net with a ResNet encoder.

    Args:
        arch: Architecture of the encoder.
        backbone: Keep the encoder `frozen` as loaded, or train it too (`finetuned`).
        decoder_widths: Channels of the decoder's five x2 stages, coarsest first.
    """

    ARCHITECTURES: ClassVar[Collection[str]] = VARIANTS
    KIND: ClassVar[str] = "ResNet"

    arch: str = "resnet50"
    decoder_widths: tuple[int, ...] = (256, 128, 64, 32, 16)

    def resolve(self) -> Self:
        check_widths(
            option("model.decoder_widths"), self.decoder_widths, len(SKIP_WIDTHS), ", one for each decoder stage"
        )
        return super().resolve()

    def check_size(self, option_name: str, size: int) -> None:
        check_smallest_size(option_name, size, ResNetUNet.multiple, self.arch)

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: ResNet) -> ResNetUNet:
        return ResNetUNet(backbone, self.decoder_widths, outputs, dtype=dtype, rngs=rngs)


class ResNetUNet(PaddedNetwork):
    """A ResNet encoder and a U-Net decoder of five ×2 stages.

    Args:
        widths: channels of each decoder stage, coarsest first.
    """

    multiple = 32

    def __init__(
        self, backbone: ResNet, widths: Sequence[int], outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.backbone = backbone
        inputs = (8 * EXPANSION * WIDTH, *widths)
        self.up = nnx.List(
            [
                DoubleConvolution(coarser + skip, width, dtype, rngs)
                for (coarser, width), skip in zip(pairwise(inputs), SKIP_WIDTHS, strict=True)
            ]
        )
        self.logits = logits_layer(widths[-1], outputs, 3, dtype, rngs)

    def padded_logits(self, images: jax.Array, present: jax.Array | None) -> jax.Array:
        half, _, quarter, eighth, sixteenth, x = self.backbone.pyramid(images, present)
        for stage, skip in zip(self.up, (sixteenth, eighth, quarter, half, None), strict=True):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = stage(x if skip is None else jnp.concatenate([x, skip], axis=-1), present)
        return self.logits(x)
