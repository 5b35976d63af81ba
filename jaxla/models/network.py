"""A method's network: backbone and decoder, image in, logits out."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import Model
from jaxla.models.backbones import TRANSFORMERS, architecture
from jaxla.models.decoders import ConvolutionalDecoder, LinearDecoder
from jaxla.models.vision_transformer import VisionTransformer
from jaxla.models.weights import compute_dtype, load_into, weights_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class TransformerSegmenter(nnx.Module):
    """Paper 1's network: the backbone's patch tokens as a map, decoded to logits; the class token is dropped."""

    def __init__(self, backbone: VisionTransformer, decoder: LinearDecoder | ConvolutionalDecoder) -> None:
        self.backbone = backbone
        self.decoder = decoder

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Logits [B, H, W, K] float32.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] already ImageNet-normalised; H, W multiples of
                the patch size.
            present: [B] bool, which of them BatchNorm's statistics are of while it trains; by default all.
        """
        return self.decoder(self.features(images), images.shape[1:3], present)

    def features(self, images: jax.Array) -> jax.Array:
        """What the decoder reads of images [B, H, W, 1 or 3]: patch tokens [B, h, w, C] in the computation's dtype."""
        if images.shape[-1] == 1:
            images = (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)
        return self.backbone(images).patches

    def on_features(self, size: tuple[int, int]) -> FeatureSegmenter:
        """The rest of this network, for features of images of H, W = `size` that were computed before."""
        return FeatureSegmenter(self.decoder, size)


class FeatureSegmenter(nnx.Module):
    """Features [B, h, w, C] to logits [B, H, W, K] float32: a `TransformerSegmenter` without its backbone."""

    def __init__(self, decoder: LinearDecoder | ConvolutionalDecoder, size: tuple[int, int]) -> None:
        self.decoder = decoder
        self.size = size

    def __call__(self, features: jax.Array, present: jax.Array | None = None) -> jax.Array:
        return self.decoder(features, self.size, present)


def build_network(model: Model, classes: int, seed: int, cache_dir: Path | None = None) -> TransformerSegmenter:
    """The network of a method, in evaluation mode; its random parameters follow from `seed`.

    Args:
        classes: K, channels of the logits: 1 for one structure (sigmoid), else background and structures (softmax).
        cache_dir: where `weights/<arch>.safetensors` is looked for if the model names no file.

    Raises:
        InputError: the backbone's weights are missing or do not fit; see `weights.load_into`.
    """
    dtype = compute_dtype()
    arch = architecture("--model.arch", model.arch)
    backbone_key, decoder_key = jax.random.split(jax.random.key(seed))

    def untrained() -> VisionTransformer:
        remat = model.backbone == "finetuned"
        return VisionTransformer(TRANSFORMERS[arch], dtype=dtype, remat=remat, rngs=nnx.Rngs(backbone_key))

    if model.weights == "random":
        backbone = nnx.jit(untrained)()
    else:
        path = weights_file(arch, model.weights, cache_dir)
        backbone = load_into(nnx.eval_shape(untrained), path, arch)
    network = TransformerSegmenter(
        backbone, _build_decoder(model, backbone.variant.width, classes, nnx.Rngs(decoder_key))
    )
    network.eval()
    return network


def _build_decoder(model: Model, width: int, classes: int, rngs: nnx.Rngs) -> LinearDecoder | ConvolutionalDecoder:
    dtype = compute_dtype()
    if model.decoder == "linear":
        return LinearDecoder(width, classes, dtype=dtype, rngs=rngs)
    return ConvolutionalDecoder(width, model.decoder_widths, classes, dtype=dtype, rngs=rngs)
