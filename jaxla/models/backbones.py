"""Every backbone by its name."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, lookup
from jaxla.models import dinov2, dinov3, resnet
from jaxla.models.resnet import ResNet
from jaxla.models.vision_transformer import VisionTransformer

TRANSFORMERS = dinov2.VARIANTS | dinov3.VARIANTS
VARIANTS = TRANSFORMERS | resnet.VARIANTS


def architecture(option: str, name: str) -> str:
    """The vision transformer that an option's value names, in this package's spelling.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    name = dinov3.HUB_SPELLINGS.get(name, name)
    if name in resnet.VARIANTS:
        raise InputError(f"{option}={name} is no vision transformer. Known: {', '.join(TRANSFORMERS)}")
    lookup(option, name, TRANSFORMERS)
    return name


def build_backbone(arch: str, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> VisionTransformer | ResNet:
    """A backbone with random parameters; `dtype` is of the computation."""
    network = ResNet if arch in resnet.VARIANTS else VisionTransformer
    return network(VARIANTS[arch], dtype=dtype, rngs=rngs)
