"""A U-Net whose way down is a ResNet (He et al. 2016), pretrained or not.

The way up is that of `segmentation_models_pytorch`, which most of the field means by the name: each stage doubles the
map (nearest neighbour), joins the encoder's features of that size, and has two 3×3 convolutions, BatchNorm and ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, Model
from jaxla.models.backbones.resnet import EXPANSION, VARIANTS, WIDTH, ResNet
from jaxla.models.family import Family
from jaxla.models.networks.unet import DoubleConvolution
from jaxla.models.ops.images import crop, pad_to_multiple, require_images, three_channels
from jaxla.models.ops.layers import logits_layer

# Channels of the encoder's features that the stages join, at 1/16, 1/8, 1/4 and 1/2 of the image; the last joins none.
SKIPS = (4 * EXPANSION * WIDTH, 2 * EXPANSION * WIDTH, EXPANSION * WIDTH, WIDTH, 0)
MULTIPLE = 32  # of which the sides must be; other images are padded


class ResNetUNet(nnx.Module):
    """Images to logits.

    Args:
        widths: channels of each of the five stages of the way up, coarsest first.
        outputs: K, channels of the logits.
        dtype: of the computation; parameters, statistics and logits are float32.
    """

    def __init__(
        self,
        backbone: ResNet,
        widths: Sequence[int],
        outputs: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.backbone = backbone
        inputs = (8 * EXPANSION * WIDTH, *widths)
        self.up = nnx.List(
            [
                DoubleConvolution(below + skip, width, dtype, rngs)
                for (below, width), skip in zip(pairwise(inputs), SKIPS, strict=True)
            ]
        )
        self.logits = logits_layer(widths[-1], outputs, 3, dtype, rngs)

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Logits [B, H, W, K] float32, for any H and W of at least 32.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] already ImageNet-normalised.
            present: [B] bool, which of them BatchNorm's statistics are of while it trains; by default all.

        Raises:
            ValueError: `images` is of another shape, not of floating point, or too small.
        """
        require_images(images, min_size=MULTIPLE, channels=(1, 3))
        features = self.backbone.pyramid(pad_to_multiple(three_channels(images), MULTIPLE), present)
        half, _, quarter, eighth, sixteenth, x = features
        for stage, skip in zip(self.up, (sixteenth, eighth, quarter, half, None), strict=True):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = stage(x if skip is None else jnp.concatenate([x, skip], axis=-1), present)
        return crop(self.logits(x), images.shape[1:3], MULTIPLE)


def _check(model: Model) -> None:
    if len(model.decoder_widths) != len(SKIPS):
        raise InputError(
            f"option --model.decoder_widths={list(model.decoder_widths)}: a U-Net on {model.arch} has {len(SKIPS)} "
            "stages; give as many widths"
        )


FAMILY = Family(
    "ResNet",
    VARIANTS,
    options=("weights", "backbone", "decoder_widths"),
    multiple=lambda model: MULTIPLE,
    check=_check,
    build=lambda backbone, model, classes, dtype, rngs: ResNetUNet(
        backbone, model.decoder_widths, classes, dtype=dtype, rngs=rngs
    ),
)
