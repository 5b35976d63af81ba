"""Paper 1's network: a vision transformer whose patch tokens form a map that is decoded to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import option
from jaxla.models.backbones.vision_transformer import VisionTransformer
from jaxla.models.networks.base import TransformerOptions, check_widths
from jaxla.models.ops.images import require_images, three_channels
from jaxla.models.ops.layers import LECUN_NORMAL, ConvolutionUnit, convolution, logits_layer
from jaxla.models.ops.resizing import resize, upsample_2x


@dataclass(frozen=True)
class TransformerSegmenterOptions(TransformerOptions):
    """Options of paper 1's network.

    Args:
        decoder: `convolutional` (paper 1), or `linear`: DINOv2's 1x1 convolution with bilinear upsampling.
        decoder_widths: Channels of the token classifier, then of each x2 stage of the convolutional decoder.
    """

    decoder: Literal["convolutional", "linear"] = "convolutional"
    decoder_widths: tuple[int, ...] = (512, 256, 128, 64, 32)

    def resolve(self) -> Self:
        check_widths(option("model.decoder_widths"), self.decoder_widths)
        return super().resolve()

    def unread(self) -> set[str]:
        return {"decoder_widths"} if self.decoder == "linear" else set()

    def build(
        self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VisionTransformer
    ) -> TransformerSegmenter:
        width = backbone.variant.width
        if self.decoder == "linear":
            return TransformerSegmenter(backbone, LinearDecoder(width, outputs, dtype=dtype, rngs=rngs))
        decoder = ConvolutionalDecoder(width, self.decoder_widths, outputs, dtype=dtype, rngs=rngs)
        return TransformerSegmenter(backbone, decoder)


class TransformerSegmenter(nnx.Module):
    """A vision transformer and a decoder of its patch tokens, arranged as a map; the class token is dropped."""

    feature_description = "patch tokens after the final norm"
    reads_images = False
    smaller_features = ()

    def __init__(self, backbone: VisionTransformer, decoder: nnx.Module) -> None:
        self.backbone = backbone
        self.decoder = decoder

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Return logits [B, H, W, K] float32; H and W are multiples of the patch size.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] already ImageNet-normalised.
            present: [B] bool, the images that BatchNorm's training statistics are computed from. Default: all.
        """
        require_images(images, channels=(1, 3))
        features = self.features(images)
        inputs = (features, images) if self.reads_images else features
        return self.decoder(inputs, images.shape[1:3], present)

    def features(self, images: jax.Array) -> jax.Array:
        """Return the patch tokens [B, h, w, C] of images [B, H, W, 1 or 3], in the dtype of the computation."""
        return self.backbone(three_channels(images)).patches

    def on_features(self, size: tuple[int, int]) -> FeatureSegmenter:
        """Return the network without its backbone, for precomputed features of images with H, W = `size`."""
        return FeatureSegmenter(self.decoder, size)


class FeatureSegmenter(nnx.Module):
    """A `TransformerSegmenter` without its backbone, called with features, or (features, images) if `reads_images`."""

    def __init__(self, decoder: nnx.Module, size: tuple[int, int]) -> None:
        self.decoder = decoder
        self.size = size

    def __call__(self, inputs: jax.Array | tuple[jax.Array, jax.Array], present: jax.Array | None = None) -> jax.Array:
        """Map features [B, …, h, w, C] to logits [B, H, W, K]; BatchNorm's statistics use the rows `present`."""
        return self.decoder(inputs, self.size, present)


class LinearDecoder(nnx.Module):
    """A 1×1 convolution and bilinear upsampling: DINOv2's linear segmentation head."""

    def __init__(self, width: int, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.classifier = nnx.Linear(width, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, size: tuple[int, int], present: jax.Array | None = None) -> jax.Array:
        """Map tokens [B, h, w, C] to logits [B, H, W, K] float32."""
        return resize(self.classifier(tokens).astype(jnp.float32), size)


class ConvolutionalDecoder(nnx.Module):
    """Paper 1's decoder: a token classifier, a 7×7 convolution, then ×2 stages up to about the image's size.

    The paper specifies the token classifier (a 1×1 convolution that sets the number of channels) and several stages of
    convolution and upsampling. Widths, kernels and the final resizing are this package's choice (docs/paper1.md).

    Args:
        width: C, channels of the tokens.
        widths: channels after the token classifier, then after each ×2 stage.
        outputs: K, channels of the logits.
    """

    def __init__(
        self, width: int, widths: Sequence[int], outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.token_classifier = nnx.Linear(width, widths[0], dtype=dtype, rngs=rngs)
        self.mix = convolution(widths[0], widths[0], 7, bias=True, kernel_init=LECUN_NORMAL, dtype=dtype, rngs=rngs)
        unit = partial(ConvolutionUnit, kernel_init=LECUN_NORMAL, dtype=dtype, rngs=rngs)
        self.stages = nnx.List([unit(i, o) for i, o in pairwise(widths)])
        self.logits = logits_layer(widths[-1], outputs, 3, dtype, rngs)

    def __call__(self, tokens: jax.Array, size: tuple[int, int], present: jax.Array | None = None) -> jax.Array:
        """Map tokens [B, h, w, C] to logits [B, H, W, K] float32; BatchNorm's statistics use the rows `present`."""
        x = self.mix(jax.nn.selu(self.token_classifier(tokens)))
        for stage in self.stages:
            x = stage(upsample_2x(x), present)
        return self.logits(resize(x, size))
