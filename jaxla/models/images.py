"""What every backbone asks of its images."""

from __future__ import annotations

import jax


def require_images(images: jax.Array, patch: int = 1) -> None:
    """Raise a ValueError unless `images` is [B, H, W, 3] and H, W are multiples of `patch`."""
    if images.ndim != 4 or images.shape[-1] != 3:
        hint = "; channels come last here" if images.ndim == 4 and images.shape[1] == 3 else ""
        raise ValueError(f"images of shape {tuple(images.shape)}: expected [B, H, W, 3]{hint}")
    if any(side % patch for side in images.shape[1:3]):
        raise ValueError(f"images of {images.shape[1]}×{images.shape[2]} pixels: sides must be multiples of {patch}")
