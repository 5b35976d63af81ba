"""All backbones by name."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, lookup
from jaxla.models.backbones import dinov2, dinov3, resnet, vgg
from jaxla.models.backbones.resnet import ResNet
from jaxla.models.backbones.vgg import VGG
from jaxla.models.backbones.vision_transformer import VisionTransformer

TRANSFORMERS = dinov2.VARIANTS | dinov3.VARIANTS
VARIANTS = TRANSFORMERS | resnet.VARIANTS | vgg.VARIANTS

Backbone = VisionTransformer | ResNet | VGG


def transformer_name(where: str, name: str) -> str:
    """Return the name of a vision transformer in this package's spelling.

    Args:
        where: the option that holds the name, for the error.
        name: may have DINOv3's hub spelling.

    Raises:
        InputError: no vision transformer has this name.
    """
    name = dinov3.HUB_SPELLINGS.get(name, name)
    if name in VARIANTS and name not in TRANSFORMERS:
        raise InputError(f"{where}={name}", "not a vision transformer", f"Use one of {', '.join(TRANSFORMERS)}.")
    lookup(where, name, TRANSFORMERS)
    return name


def build_backbone(arch: str, *, dtype: jnp.dtype = jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> Backbone:
    """Return a backbone with random parameters.

    Args:
        dtype: of the computation.
        remat: recompute a transformer's blocks in the backward pass instead of storing their activations.
    """
    if arch in TRANSFORMERS:
        return VisionTransformer(TRANSFORMERS[arch], dtype=dtype, remat=remat, rngs=rngs)
    network = ResNet if arch in resnet.VARIANTS else VGG
    return network(VARIANTS[arch], dtype=dtype, rngs=rngs)
