"""Paper 2's network: features of several blocks, fused with learned weights; the decoder also reads the image.

*Multi-scale feature fusion with image-driven spatial integration* (arXiv 2502.06615). The paper specifies the frozen
backbone, one learnable scalar per block, normalised by a softmax, a decoder like a U-Net's, and that the decoder reads
the image. All else is this package's choice (docs/paper2.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import softmax

from jaxla.config import InputError, option
from jaxla.hardware import fusion_variant
from jaxla.models.backbones import TRANSFORMERS
from jaxla.models.backbones.vision_transformer import VisionTransformer
from jaxla.models.networks.base import TransformerOptions, check_widths
from jaxla.models.networks.transformer_segmenter import TransformerSegmenter
from jaxla.models.networks.unet import DoubleConvolution
from jaxla.models.ops.images import three_channels
from jaxla.models.ops.layers import ConvolutionUnit, logits_layer
from jaxla.models.ops.resizing import resize, upsample_2x

STEM_WIDTH = 16  # channels that a stage computes from the image


@dataclass(frozen=True)
class FusionOptions(TransformerOptions):
    """Options of paper 2's network.

    Args:
        decoder_widths: Channels of the decoder's first level, then of each x2 stage.
        blocks: Backbone blocks to fuse; 0 is the first, -1 the last. Default: all.
        block_weights: Weights of the blocks: learned `per_level` of the decoder, `shared` by all levels, or `uniform`.
        image_stages: Decoder stages that also read the image: `all`, the `last`, or `none`.
    """

    decoder_widths: tuple[int, ...] = (512, 256, 128, 64, 32)
    blocks: tuple[int, ...] = ()
    block_weights: Literal["per_level", "shared", "uniform"] = "per_level"
    image_stages: Literal["all", "last", "none"] = "all"

    def resolve(self) -> Self:
        resolved = super().resolve()
        resolved.block_numbers()
        check_widths(option("model.decoder_widths"), self.decoder_widths)
        if len(self.decoder_widths) < 2:
            problem = "needs the width of the first level and of at least one stage"
            fix = "Use [64,32], for example."
            raise InputError(option("model.decoder_widths", list(self.decoder_widths)), problem, fix)
        return resolved

    def block_numbers(self) -> tuple[int, ...]:
        """Return `blocks` counted from 0, in ascending order; raise an InputError if one is unknown or listed twice."""
        depth = TRANSFORMERS[self.arch].depth
        numbers = tuple(block + depth if block < 0 else block for block in self.blocks) or tuple(range(depth))
        where = option("model.blocks", list(self.blocks))
        for given, block in zip(self.blocks, numbers, strict=False):
            if not 0 <= block < depth:
                problem = f"{self.arch} has no block {given}"
                raise InputError(where, problem, f"Use 0 to {depth - 1}, or -1 (the last) to -{depth}.")
            if numbers.count(block) > 1:
                raise InputError(where, f"block {block} of {self.arch} is listed twice", "List each block once.")
        return tuple(sorted(numbers))

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VisionTransformer) -> FusionSegmenter:
        blocks = self.block_numbers()
        decoder = FusionDecoder(
            backbone.variant.width, len(blocks), self.decoder_widths, outputs, weights=self.block_weights,
            image=self.image_stages, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        return FusionSegmenter(backbone, blocks, decoder)


class FusionSegmenter(TransformerSegmenter):
    """A vision transformer, and a decoder that reads the image and the patch tokens of several blocks as maps."""

    def __init__(self, backbone: VisionTransformer, blocks: Sequence[int], decoder: FusionDecoder) -> None:
        super().__init__(backbone, decoder)
        self.blocks = tuple(blocks)
        self.feature_description = f"patch tokens of blocks {', '.join(map(str, self.blocks))} after the final norm"
        self.reads_images = decoder.reads_images
        self.smaller_features = (f"fewer {option('model.blocks')}",) if len(self.blocks) > 1 else ()

    def features(self, images: jax.Array) -> jax.Array:
        """Return the chosen blocks' patch tokens [B, blocks, h, w, C] of images, in the dtype of the computation.

        The final norm is applied to each block's tokens, because their scales differ between blocks.
        """
        return jnp.stack(self.backbone.intermediate(three_channels(images), self.blocks, norm=True), axis=1)

    def block_weights(self) -> dict[str, Any]:
        """Return the weight of each block at each level of the decoder, coarsest first, as plain Python values."""
        fusion = self.decoder.fusion
        # uses NumPy, because the network may be on a device outside the mesh that JAX computes on
        scalars = np.asarray(fusion.scalars.get_value()) if hasattr(fusion, "scalars") else np.zeros(fusion.shape)
        levels = np.broadcast_to(softmax(scalars, axis=1), fusion.shape)
        return {"blocks": list(self.blocks), "levels": levels.tolist()}


class FusionDecoder(nnx.Module):
    """Project the fused features of the coarsest level, then apply ×2 stages up to about the image's size.

    Args:
        width: C, channels of the features.
        blocks: number of blocks whose features are fused.
        widths, weights, image: the options `decoder_widths`, `block_weights` and `image_stages`.
        outputs: K, channels of the logits.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        widths: Sequence[int],
        outputs: int,
        *,
        weights: str = "per_level",
        image: str = "all",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        last = len(widths) - 2
        image_stages = {"all": range(last + 1), "last": [last], "none": []}[image]
        self.reads_images = bool(image_stages)
        self.fusion = Fusion(len(widths), blocks, weights)
        self.project = nnx.Linear(width, widths[0], dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(width, i, o, index in image_stages, dtype=dtype, rngs=rngs)
                for index, (i, o) in enumerate(pairwise(widths))
            ]
        )
        self.logits = logits_layer(widths[-1], outputs, 3, dtype, rngs)

    def __call__(
        self, inputs: jax.Array | tuple[jax.Array, jax.Array], size: tuple[int, int], present: jax.Array | None = None
    ) -> jax.Array:
        """Return logits [B, H, W, K] float32, with H, W = `size`, from features [B, blocks, h, w, C].

        Args:
            inputs: the features, or (features, images [B, H, W, 1 or 3]) if the decoder reads images.
            present: [B] bool, the images that BatchNorm's training statistics are computed from. Default: all.

        Raises:
            ValueError: the decoder reads images, but none are passed.
        """
        if self.reads_images and not isinstance(inputs, tuple):
            raise ValueError("the decoder also reads the images: call it with (features, images)")
        features, images = (inputs[0], three_channels(inputs[1])) if self.reads_images else (inputs, None)
        coarsest, *finer = self.fusion(features)
        x = self.project(coarsest)
        for stage, fused in zip(self.stages, finer, strict=True):
            x = stage(x, fused, images, present)
        return self.logits(resize(x, size))


class Fusion(nnx.Module):
    """Weighted sums of the blocks' features, one for each level of the decoder; the weights of a level sum to 1.

    The weights are the softmax of learned scalars, which are equal at first: one per block and level, or one per block
    for all levels (`shared`). `uniform` weights are equal and not learned.
    """

    def __init__(self, levels: int, blocks: int, weights: str) -> None:
        self.shape = (levels, blocks)
        if weights != "uniform":
            self.scalars = nnx.Param(jnp.zeros((1 if weights == "shared" else levels, blocks)))

    def weights(self) -> jax.Array:
        """Return the weights [levels, blocks] float32."""
        scalars = self.scalars[...] if hasattr(self, "scalars") else jnp.zeros(self.shape)
        return jnp.broadcast_to(jax.nn.softmax(scalars, axis=1), self.shape)

    def __call__(self, features: jax.Array) -> list[jax.Array]:
        """Fuse features [B, blocks, h, w, C] to [B, h, w, C] for each level, in the same dtype."""
        weigh = weighted_sums if fusion_variant() == "sums" else weighted_product
        return weigh(self.weights(), features)


@jax.jit  # `multiply_adds` recognises this function by its name
def weighted_sums(weights: jax.Array, features: jax.Array) -> list[jax.Array]:
    """Return [B, h, w, C] for each level, as sums over weights [levels, blocks] times features [B, blocks, h, w, C].

    XLA fuses the sums into one pass, accumulated in float32.
    """
    # The gradient of `split` is one concatenation; that of indexing would be as large as all blocks, for each block.
    blocks = [block.squeeze(1) for block in jnp.split(features, features.shape[1], axis=1)]
    return [
        sum(weight * block for weight, block in zip(level_weights, blocks, strict=True)).astype(features.dtype)
        for level_weights in weights
    ]


def weighted_product(weights: jax.Array, features: jax.Array) -> list[jax.Array]:
    """Compute `weighted_sums` as one matrix product per image. The weights are rounded to the features' dtype."""
    batch, blocks, *rest = features.shape
    batch_weights = jnp.broadcast_to(weights.astype(features.dtype), (batch, *weights.shape))
    sums = jnp.einsum("bln,bnx->blx", batch_weights, features.reshape(batch, blocks, -1))
    return [sums[:, level].reshape(batch, *rest) for level in range(len(weights))]


class Stage(nnx.Module):
    """One ×2 stage: upsample, add the level's fused features, concatenate features of the image, convolve twice."""

    def __init__(
        self, width: int, inputs: int, outputs: int, reads_image: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.project = nnx.Linear(width, inputs, dtype=dtype, rngs=rngs)
        self.stem = ConvolutionUnit(3, STEM_WIDTH, dtype=dtype, rngs=rngs) if reads_image else None
        self.convolutions = DoubleConvolution(inputs + (STEM_WIDTH if reads_image else 0), outputs, dtype, rngs)

    def __call__(
        self, x: jax.Array, fused: jax.Array, images: jax.Array | None, present: jax.Array | None
    ) -> jax.Array:
        """Return [B, 2H, 2W, outputs] from x [B, H, W, inputs], fused features [B, h, w, C] and images [B, …, …, 3]."""
        x = upsample_2x(x)
        size = x.shape[1:3]
        x = x + resize(self.project(fused), size)
        if self.stem is not None:
            resized = jax.image.resize(images, (len(images), *size, 3), "linear")  # antialiased if it shrinks
            x = jnp.concatenate([x, self.stem(resized, present)], axis=-1)
        return self.convolutions(x, present)
