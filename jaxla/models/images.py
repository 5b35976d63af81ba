"""What every backbone asks of its images."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def require_images(images: jax.Array, patch: int = 1) -> None:
    """Raise a ValueError unless `images` is [B, H, W, 3], of floating point, H and W multiples of `patch`."""
    if images.ndim != 4 or images.shape[-1] != 3:
        hint = "; channels come last here" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise ValueError(f"images of shape {tuple(images.shape)}: expected [B, H, W, 3]{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images of {images.dtype}: expected floating point, normalised as ImageNet's are")
    height, width = images.shape[1:3]
    if not (height and width) or height % patch or width % patch:
        raise ValueError(f"images of {height}×{width} pixels: sides must be multiples of {patch}")
