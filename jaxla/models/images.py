"""What every backbone asks of its images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def require_images(images: jax.Array, patch: int = 1) -> None:
    """Raise a ValueError unless `images` is [B, H, W, 3], of floating point, H and W multiples of `patch`."""
    if not isinstance(getattr(images, "dtype", None), np.dtype):  # PyTorch's tensors have one of their own
        raise ValueError(f"images of type {type(images).__name__}: expected a NumPy or JAX array [B, H, W, 3]")
    if images.ndim != 4 or images.shape[-1] != 3:
        hint = "; channels come last here" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise ValueError(f"images of shape {tuple(images.shape)}: expected [B, H, W, 3]{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images of {images.dtype}: expected floating point, normalised as ImageNet's are")
    if 0 in images.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}: there is no pixel in them")
    height, width = images.shape[1:3]
    if height % patch or width % patch:
        fitting = "×".join(str(max(round(side / patch), 1) * patch) for side in (height, width))
        raise ValueError(f"images of {height}×{width} pixels: sides must be multiples of {patch}, such as {fitting}")
