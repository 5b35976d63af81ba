"""Check, normalise, pad and crop the images of networks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def require_images(
    images: jax.Array,
    multiple: int | Sequence[int] = 1,
    *,
    min_size: int | Sequence[int] = 1,
    channels: tuple[int, ...] = (3,),
    axes: int = 2,
) -> None:
    """Raise a ValueError unless `images` is [B, H, W, C], floating point, and of a size that a network accepts.

    Args:
        multiple: the sides must be multiples of it; one number, or one for each axis.
        min_size: smallest sides; one number, or one for each axis.
        channels: the accepted values of C.
        axes: 3 for volumes [B, D, H, W, C].
    """
    sides = ", ".join("DHW"[3 - axes :])
    expected = " or ".join(f"[B, {sides}, {count}]" for count in channels)
    if not isinstance(getattr(images, "dtype", None), np.dtype):  # PyTorch tensors have another type of dtype
        raise ValueError(f"images of type {type(images).__name__}: expected a NumPy or JAX array {expected}")
    if images.ndim != axes + 2 or images.shape[-1] not in channels:
        hint = "; channels must come last" if images.ndim == axes + 2 and images.shape[1] in (1, 3) else ""
        raise ValueError(f"images of shape {tuple(images.shape)}: expected {expected}{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        grey = "grey values in 0..1" + " or " * (3 in channels)
        normalised = "normalised with ImageNet's mean and deviation" if 3 in channels else ""
        raise ValueError(f"images of {images.dtype}: expected floating point, {grey * (1 in channels)}{normalised}")
    if 0 in images.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}: they contain no pixels")
    size, multiples, min_sizes = images.shape[1:-1], _per_axis(multiple, axes), _per_axis(min_size, axes)
    if any(side % m for side, m in zip(size, multiples, strict=True)):
        nearest = [max(round(side / m), 1) * m for side, m in zip(size, multiples, strict=True)]
        required = multiples[0] if len(set(multiples)) == 1 else _format_size(multiples)
        raise ValueError(
            f"images of {_format_size(size)} pixels: sides must be multiples of {required}, such as "
            f"{_format_size(nearest)}"
        )
    if any(side < smallest for side, smallest in zip(size, min_sizes, strict=True)):
        raise ValueError(f"images of {_format_size(size)} pixels: at least {_format_size(min_sizes)} are needed")


def three_channels(images: jax.Array) -> jax.Array:
    """Turn grey values in 0..1 [B, H, W, 1] into ImageNet-normalised [B, H, W, 3]; return three channels unchanged."""
    if images.shape[-1] == 3:
        return images
    return (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)


def pad_to_multiple(images: jax.Array, multiple: int | Sequence[int]) -> jax.Array:
    """Pad [B, H, W, C] or [B, D, H, W, C] on both sides to the next multiples by repeating the edge."""
    size = images.shape[1:-1]
    margins = [_margins(side, m) for side, m in zip(size, _per_axis(multiple, len(size)), strict=True)]
    return jnp.pad(images, ((0, 0), *margins, (0, 0)), mode="edge")


def crop(x: jax.Array, size: Sequence[int], multiple: int | Sequence[int]) -> jax.Array:
    """Remove the padding that `pad_to_multiple` added to images of H, W = `size`: [B, H', W', K] -> [B, H, W, K]."""
    for axis, (side, m) in enumerate(zip(size, _per_axis(multiple, len(size)), strict=True), start=1):
        start = _margins(side, m)[0]
        x = jax.lax.slice_in_dim(x, start, start + side, axis=axis)
    return x


def _margins(side: int, multiple: int) -> tuple[int, int]:
    missing = -side % multiple
    return missing // 2, missing - missing // 2


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _format_size(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))
