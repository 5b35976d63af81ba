"""All backbones by name."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxla.models.backbones import dinov2, dinov3, resnet, vgg
from jaxla.models.backbones.resnet import ResNet
from jaxla.models.backbones.vgg import VGG
from jaxla.models.backbones.vision_transformer import VisionTransformer

TRANSFORMERS = dinov2.VARIANTS | dinov3.VARIANTS
VARIANTS = TRANSFORMERS | resnet.VARIANTS | vgg.VARIANTS

Backbone = VisionTransformer | ResNet | VGG


def build_backbone(arch: str, *, dtype: jnp.dtype = jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> Backbone:
    """Return a backbone with random parameters.

    Args:
        dtype: dtype of the computation.
        remat: recompute a transformer's blocks in the backward pass instead of storing their activations.
    """
    if arch in TRANSFORMERS:
        return VisionTransformer(TRANSFORMERS[arch], dtype=dtype, remat=remat, rngs=rngs)
    network = ResNet if arch in resnet.VARIANTS else VGG
    return network(VARIANTS[arch], dtype=dtype, rngs=rngs)
