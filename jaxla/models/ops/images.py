"""What networks ask of their images, and how those come to have it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def require_images(
    images: jax.Array,
    patch: int | Sequence[int] = 1,
    *,
    least: int | Sequence[int] = 1,
    channels: tuple[int, ...] = (3,),
    axes: int = 2,
) -> None:
    """Raise a ValueError unless `images` is [B, H, W, C], of floating point, and of sides that a network takes.

    Args:
        patch: of which the sides must be multiples, along each axis.
        least: of the sides.
        channels: which C it may have.
        axes: 3 where it must be [B, D, H, W, C].
    """
    sides = ", ".join("DHW"[3 - axes :])
    expected = " or ".join(f"[B, {sides}, {count}]" for count in channels)
    if not isinstance(getattr(images, "dtype", None), np.dtype):  # PyTorch's tensors have one of their own
        raise ValueError(f"images of type {type(images).__name__}: expected a NumPy or JAX array {expected}")
    if images.ndim != axes + 2 or images.shape[-1] not in channels:
        hint = "; channels come last here" if images.ndim == axes + 2 and images.shape[1] in (1, 3) else ""
        raise ValueError(f"images of shape {tuple(images.shape)}: expected {expected}{hint}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        grey = "grey values in 0..1" + " or " * (3 in channels)
        normalised = "normalised as ImageNet's are" if 3 in channels else ""
        raise ValueError(f"images of {images.dtype}: expected floating point, {grey * (1 in channels)}{normalised}")
    if 0 in images.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}: there is no pixel in them")
    size, patches, fewest = images.shape[1:-1], _of_axes(patch, axes), _of_axes(least, axes)
    if any(side % multiple for side, multiple in zip(size, patches, strict=True)):
        fitting = [max(round(side / multiple), 1) * multiple for side, multiple in zip(size, patches, strict=True)]
        multiples = patches[0] if len(set(patches)) == 1 else _by(patches)
        raise ValueError(
            f"images of {_by(size)} pixels: sides must be multiples of {multiples}, such as {_by(fitting)}"
        )
    if any(side < fewest_of_side for side, fewest_of_side in zip(size, fewest, strict=True)):
        raise ValueError(f"images of {_by(size)} pixels: at least {_by(fewest)} are needed, one of the last map")


def three_channels(images: jax.Array) -> jax.Array:
    """Grey values in 0..1 [B, H, W, 1] -> ImageNet-normalised [B, H, W, 3]; three channels are returned as given."""
    if images.shape[-1] == 3:
        return images
    return (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)


def pad_to_multiple(images: jax.Array, multiple: int | Sequence[int]) -> jax.Array:
    """[B, H, W, C], or with D -> sides the next multiples, the image in the middle, its edge repeated around it."""
    size = images.shape[1:-1]
    margins = [_margins(side, of_side) for side, of_side in zip(size, _of_axes(multiple, len(size)), strict=True)]
    return jnp.pad(images, ((0, 0), *margins, (0, 0)), mode="edge")


def crop(x: jax.Array, size: Sequence[int], multiple: int | Sequence[int]) -> jax.Array:
    """What `pad_to_multiple` added to images of H, W = `size` taken away: [B, H', W', K] -> [B, H, W, K]."""
    for axis, (side, of_side) in enumerate(zip(size, _of_axes(multiple, len(size)), strict=True), start=1):
        first = _margins(side, of_side)[0]
        x = jax.lax.slice_in_dim(x, first, first + side, axis=axis)
    return x


def _margins(side: int, multiple: int) -> tuple[int, int]:
    lacking = -side % multiple
    return lacking // 2, lacking - lacking // 2


def _of_axes(number: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (number,) * axes if isinstance(number, int) else tuple(number)


def _by(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))
