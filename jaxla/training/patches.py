"""Random patches of training slices, cut on the device as part of the compiled step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def cut_patches(
    side: int, foreground_fraction: float, key: jax.Array, images: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cut one patch from each row of images [B, H, W, C] and masks [B, H, W]: [B, side, side, C], [B, side, side].

    All positions within the image are equally likely. From slices with a structure, `foreground_fraction` of the
    patches instead contain one of its pixels, drawn at random.
    """
    keys = jax.random.split(key, len(images))
    return jax.vmap(partial(_cut_patch, side, foreground_fraction))(keys, images, masks)


def _cut_patch(
    side: int, foreground_fraction: float, key: jax.Array, image: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    start_key, pixel_key, choice_key = jax.random.split(key, 3)
    last = jnp.array(mask.shape) - side
    lowest, highest = jnp.zeros_like(last), last
    if foreground_fraction:
        counts = jnp.cumsum(mask.ravel() > 0)
        drawn = jax.random.randint(pixel_key, (), 0, jnp.maximum(counts[-1], 1))
        pixel = jnp.array(jnp.unravel_index(jnp.searchsorted(counts, drawn, side="right"), mask.shape))
        is_chosen = jax.random.bernoulli(choice_key, foreground_fraction) & (counts[-1] > 0)
        lowest = jnp.where(is_chosen, jnp.maximum(pixel - side + 1, 0), lowest)
        highest = jnp.where(is_chosen, jnp.minimum(pixel, last), highest)
    start = jax.random.randint(start_key, (2,), lowest, highest + 1)
    patch = jax.lax.dynamic_slice(image, (*start, 0), (side, side, image.shape[-1]))
    return patch, jax.lax.dynamic_slice(mask, start, (side, side))
