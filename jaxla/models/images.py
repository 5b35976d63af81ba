"""What networks ask of their images, and how those come to have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def require_images(images: jax.Array, patch: int = 1, *, least: int = 1, channels: tuple[int, ...] = (3,)) -> None:
    """Raise a ValueError unless `images` is [B, H, W, C], of floating point, and of sides that a network takes.

    Args:
        patch: of which H and W must be multiples.
        least: of H and W.
        channels: which C it may have.
    """
    expected = " or ".join(f"[B, H, W, {count}]" for count in channels)
    if not isinstance(getattr(images, "dtype", None), np.dtype):  # PyTorch's tensors have one of their own
        raise ValueError(f"images of type {type(images).__name__}: expected a NumPy or JAX array {expected}")
    if images.ndim != 4 or images.shape[-1] not in channels:
        hint = "; channels come last here" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise ValueError(f"images of shape {tuple(images.shape)}: expected {expected}{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        grey = "grey values in 0..1" + " or " * (3 in channels)
        normalised = "normalised as ImageNet's are" if 3 in channels else ""
        raise ValueError(f"images of {images.dtype}: expected floating point, {grey * (1 in channels)}{normalised}")
    if 0 in images.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}: there is no pixel in them")
    height, width = images.shape[1:3]
    if height % patch or width % patch:
        fitting = "×".join(str(max(round(side / patch), 1) * patch) for side in (height, width))
        raise ValueError(f"images of {height}×{width} pixels: sides must be multiples of {patch}, such as {fitting}")
    if min(height, width) < least:
        raise ValueError(f"images of {height}×{width} pixels: at least {least}×{least} are needed, one of the last map")


def three_channels(images: jax.Array) -> jax.Array:
    """Grey values in 0..1 [B, H, W, 1] -> ImageNet-normalised [B, H, W, 3]; three channels are returned as given."""
    if images.shape[-1] == 3:
        return images
    return (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)


def pad_to_multiple(images: jax.Array, multiple: int) -> jax.Array:
    """[B, H, W, C] -> H and W the next multiples, the image in the middle, its edge repeated around it."""
    before, after = zip(*(_margins(side, multiple) for side in images.shape[1:3]), strict=True)
    return jnp.pad(images, ((0, 0), *zip(before, after, strict=True), (0, 0)), mode="edge")


def crop(x: jax.Array, size: tuple[int, int], multiple: int) -> jax.Array:
    """What `pad_to_multiple` added to images of H, W = `size` taken away: [B, H', W', K] -> [B, H, W, K]."""
    top, left = (_margins(side, multiple)[0] for side in size)
    return x[:, top : top + size[0], left : left + size[1]]


def _margins(side: int, multiple: int) -> tuple[int, int]:
    lacking = -side % multiple
    return lacking // 2, lacking - lacking // 2
