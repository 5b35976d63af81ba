"""Paper 2's network: features of several blocks fused by learned weights, decoded with the image brought back in.

*Multi-scale feature fusion with image-driven spatial integration* (arXiv 2502.06615). Stated are the frozen backbone,
one learnable scalar a block, softmax-normalised, a decoder like a U-Net's, and that the image is brought back in while
decoding; what else stands here is this package's choice (docs/paper2.md).
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
from jaxla.models.networks.unet import DoubleConvolution
from jaxla.models.ops.images import three_channels
from jaxla.models.ops.layers import ConvolutionUnit, logits_layer
from jaxla.models.ops.resizing import double, resize

STEM = 16  # channels that a stage sees of the image


@dataclass(frozen=True)
class FusionOptions(TransformerOptions):
    """Options of paper 2's network.

    Args:
        arch: Architecture of the backbone; `python -m convert_weights --arch=list` lists those with released weights.
        weights: A converted `.safetensors` file, or `random`. Default: `<cache>/weights/<arch>.safetensors`.
        backbone: Keep the backbone `frozen` as loaded, or train it too (`finetuned`).
        decoder_widths: Channels of the decoder's first level, then of each x2 stage.
        blocks: Backbone blocks to fuse; 0 is the first, -1 the last. Default: all.
        block_weights: Weights of the blocks: learned `per_level` of the decoder, `shared` by all levels, or `uniform`.
        image_stages: Decoder stages that read the image again: `all`, the `last`, or `none`.
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
            raise InputError(
                option("model.decoder_widths", list(self.decoder_widths)),
                "needs the width of the first level and of at least one stage",
                "Use [64,32], for example.",
            )
        return resolved

    def block_numbers(self) -> tuple[int, ...]:
        """Return `blocks` counted from 0, in ascending order.

        Raises:
            InputError: a block that the backbone does not have, or that is named twice.
        """
        depth = TRANSFORMERS[self.arch].depth
        numbers = tuple(block + depth if block < 0 else block for block in self.blocks) or tuple(range(depth))
        where = option("model.blocks", list(self.blocks))
        for given, block in zip(self.blocks, numbers, strict=False):
            if not 0 <= block < depth:
                raise InputError(
                    where, f"{self.arch} has no block {given}", f"Use 0 to {depth - 1}, or -1 (the last) to -{depth}."
                )
            if numbers.count(block) > 1:
                raise InputError(where, f"block {block} of {self.arch} is named twice", "Name each block once.")
        return tuple(sorted(numbers))

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VisionTransformer) -> FusionSegmenter:
        blocks = self.block_numbers()
        decoder = nnx.jit(
            lambda rngs: FusionDecoder(
                backbone.variant.width, len(blocks), self.decoder_widths, outputs, weights=self.block_weights,
                image=self.image_stages, dtype=dtype, rngs=rngs,
            )
        )(rngs)  # fmt: skip
        return FusionSegmenter(backbone, blocks, decoder)


class FusionSegmenter(nnx.Module):
    """Patch tokens of some of the backbone's blocks as maps, and the image, decoded to logits."""

    def __init__(self, backbone: VisionTransformer, blocks: Sequence[int], decoder: FusionDecoder) -> None:
        self.backbone = backbone
        self.blocks = tuple(blocks)
        self.decoder = decoder
        self.FEATURES = f"patch tokens of blocks {', '.join(map(str, self.blocks))} after the final norm"
        self.READS_IMAGES = decoder.reads_images
        self.SMALLER_FEATURES = (f"fewer {option('model.blocks')}",) if len(self.blocks) > 1 else ()

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Logits [B, H, W, K] float32.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] already ImageNet-normalised; H, W multiples of
                the patch size.
            present: [B] bool, which of them BatchNorm's statistics are of while it trains; by default all.
        """
        return self.decoder(self.features(images), images, images.shape[1:3], present)

    def features(self, images: jax.Array) -> jax.Array:
        """What the decoder reads of the backbone: [B, blocks, h, w, C] in the computation's dtype.

        Each block's tokens pass the final norm, for their scales differ from block to block.
        """
        return jnp.stack(self.backbone.intermediate(three_channels(images), self.blocks, norm=True), axis=1)

    def on_features(self, size: tuple[int, int]) -> FeatureFusionSegmenter:
        """The rest of this network, for features of images of H, W = `size` that were computed before."""
        return FeatureFusionSegmenter(self.decoder, size)

    def block_weights(self) -> dict[str, Any]:
        """The share of each block in the features of each level of the decoder, coarsest first; ready for JSON."""
        fusion = self.decoder.fusion
        # not by JAX: the network may lie on another device than those of the mesh
        scalars = np.asarray(fusion.scalars.get_value()) if hasattr(fusion, "scalars") else np.zeros(fusion.shape)
        levels = np.broadcast_to(softmax(scalars, axis=1), fusion.shape)
        return {"blocks": list(self.blocks), "levels": levels.tolist()}


class FeatureFusionSegmenter(nnx.Module):
    """A `FusionSegmenter` without its backbone."""

    def __init__(self, decoder: FusionDecoder, size: tuple[int, int]) -> None:
        self.decoder = decoder
        self.size = size

    def __call__(self, inputs: jax.Array | tuple[jax.Array, jax.Array], present: jax.Array | None = None) -> jax.Array:
        """Features [B, blocks, h, w, C], with their images [B, H, W, 1 or 3] where it reads these, to logits.

        Raises:
            ValueError: it reads images, and is given features alone.
        """
        if self.decoder.reads_images and not isinstance(inputs, tuple):
            raise ValueError("the decoder reads the images too: call it with (features, images)")
        features, images = inputs if self.decoder.reads_images else (inputs, None)
        return self.decoder(features, images, self.size, present)


class FusionDecoder(nnx.Module):
    """The first level's features, then ×2 stages up to about the image's size.

    Args:
        width: C, channels of the features.
        blocks: how many blocks' features come in.
        widths: channels of the first level, then after each stage.
        outputs: K, channels of the logits.
        weights: as `FusionOptions.block_weights`.
        image: which stages see the image, as `FusionOptions.image_stages`.
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
        seen = {"all": range(last + 1), "last": [last], "none": []}[image]
        self.reads_images = bool(seen)
        self.fusion = Fusion(len(widths), blocks, weights)
        self.project = nnx.Linear(width, widths[0], dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            [Stage(width, i, o, place in seen, dtype=dtype, rngs=rngs) for place, (i, o) in enumerate(pairwise(widths))]
        )
        self.logits = logits_layer(widths[-1], outputs, 3, dtype, rngs)

    def __call__(
        self,
        features: jax.Array,
        images: jax.Array | None,
        size: tuple[int, int],
        present: jax.Array | None = None,
    ) -> jax.Array:
        """[B, blocks, h, w, C] -> logits [B, H, W, K] float32, H, W = `size`.

        Args:
            images: [B, H, W, 1 or 3]; None where no stage sees them.
            present: [B] bool, which of them BatchNorm's statistics are of while it trains.
        """
        images = three_channels(images) if self.reads_images else None
        first, *others = self.fusion(features)
        x = self.project(first)
        for stage, fused in zip(self.stages, others, strict=True):
            x = stage(x, fused, images, present)
        return self.logits(resize(x, size))


class Fusion(nnx.Module):
    """Weighted sums of the blocks' features, one for each level of the decoder; the weights of a level sum to 1.

    The weights are the softmax of what is learned: a scalar for each block and level, or for each block alone
    (`shared`), all equal at first; `uniform` ones stay so.
    """

    def __init__(self, levels: int, blocks: int, weights: str) -> None:
        self.shape = (levels, blocks)
        if weights != "uniform":
            self.scalars = nnx.Param(jnp.zeros((1 if weights == "shared" else levels, blocks)))

    def weights(self) -> jax.Array:
        """[levels, blocks] float32."""
        scalars = self.scalars[...] if hasattr(self, "scalars") else jnp.zeros(self.shape)
        return jnp.broadcast_to(jax.nn.softmax(scalars, axis=1), self.shape)

    def __call__(self, features: jax.Array) -> list[jax.Array]:
        """[B, blocks, h, w, C] -> for each level [B, h, w, C] in the same dtype."""
        weigh = weighted_sums if fusion_variant() == "sums" else weighted_product
        return weigh(self.weights(), features)


@jax.jit  # by whose name `multiply_adds` counts it
def weighted_sums(weights: jax.Array, features: jax.Array) -> list[jax.Array]:
    """[levels, blocks] of [B, blocks, h, w, C] -> for each level [B, h, w, C], product by product.

    XLA makes one pass of it, summed in float32.
    """
    # Split, whose gradient is one concatenation: that of a slice is as large as all blocks, for each block anew.
    blocks = [block.squeeze(1) for block in jnp.split(features, features.shape[1], axis=1)]
    return [
        sum(weight * block for weight, block in zip(of_level, blocks, strict=True)).astype(features.dtype)
        for of_level in weights
    ]


def weighted_product(weights: jax.Array, features: jax.Array) -> list[jax.Array]:
    """The same but for rounding, the weights' too: a product of matrices for each image."""
    batch, blocks, *rest = features.shape
    of_each = jnp.broadcast_to(weights.astype(features.dtype), (batch, *weights.shape))
    sums = jnp.einsum("bln,bnx->blx", of_each, features.reshape(batch, blocks, -1))
    return [sums[:, level].reshape(batch, *rest) for level in range(len(weights))]


class Stage(nnx.Module):
    """Twice the size; its own weighted sum added; what a small stem makes of the image beside it; two convolutions."""

    def __init__(
        self, width: int, inputs: int, outputs: int, sees_image: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.project = nnx.Linear(width, inputs, dtype=dtype, rngs=rngs)
        self.stem = ConvolutionUnit(3, STEM, dtype=dtype, rngs=rngs) if sees_image else None
        self.convolutions = DoubleConvolution(inputs + (STEM if sees_image else 0), outputs, dtype, rngs)

    def __call__(
        self, x: jax.Array, fused: jax.Array, images: jax.Array | None, present: jax.Array | None
    ) -> jax.Array:
        """x [B, H, W, inputs], fused [B, h, w, C], images [B, …, …, 3] -> [B, 2H, 2W, outputs]."""
        x = double(x)
        size = x.shape[1:3]
        x = x + resize(self.project(fused), size)
        if self.stem is not None:
            of_this_size = jax.image.resize(images, (len(images), *size, 3), "linear")  # antialiased where it shrinks
            x = jnp.concatenate([x, self.stem(of_this_size, present)], axis=-1)
        return self.convolutions(x, present)
