"""Every backbone by its name."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxla.config import lookup
from jaxla.models import dinov2, dinov3
from jaxla.models.vision_transformer import VisionTransformer

VARIANTS = dinov2.VARIANTS | dinov3.VARIANTS


def architecture(option: str, name: str) -> str:
    """The architecture that an option's value names, in this package's spelling.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    name = dinov3.HUB_SPELLINGS.get(name, name)
    lookup(option, name, VARIANTS)
    return name


def build_backbone(
    arch: str, *, dtype: jnp.dtype = jnp.float32, remat: bool = False, rngs: nnx.Rngs
) -> VisionTransformer:
    """A backbone with random parameters; see `VisionTransformer` for the arguments."""
    return VisionTransformer(VARIANTS[arch], dtype=dtype, remat=remat, rngs=rngs)
