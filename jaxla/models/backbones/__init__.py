"""Every backbone by its name."""

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


def architecture(option: str, name: str) -> str:
    """The vision transformer that an option's value names, in this package's spelling.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    name = dinov3.HUB_SPELLINGS.get(name, name)
    if name in VARIANTS and name not in TRANSFORMERS:
        raise InputError(f"{option}={name} is no vision transformer. Known: {', '.join(TRANSFORMERS)}")
    lookup(option, name, TRANSFORMERS)
    return name


def build_backbone(arch: str, *, dtype: jnp.dtype = jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> Backbone:
    """A backbone with random parameters.

    Args:
        dtype: of the computation.
        remat: whether a transformer's gradient computes its blocks again instead of keeping what they made.
    """
    if arch in TRANSFORMERS:
        return VisionTransformer(TRANSFORMERS[arch], dtype=dtype, remat=remat, rngs=rngs)
    network = ResNet if arch in resnet.VARIANTS else VGG
    return network(VARIANTS[arch], dtype=dtype, rngs=rngs)
