"""Random changes of training slices, on the device and within the compiled step, so that no reader waits for them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxla.config import Augmentation

POINTS = 6  # a side, at which displacements are drawn; between them they are interpolated


def augment(
    augmentation: Augmentation, key: jax.Array, images: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each slice changed in its own way: images [B, H, W, 1] in 0..1 and masks [B, H, W] -> the same.

    Of volumes, [B, D, H, W, 1] and [B, D, H, W], each one is, all of its slices alike.

    An image and its mask are moved together, the image bilinearly and each pixel of the mask from its nearest; what
    comes in from outside is 0 in both.
    """
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(partial(_augment_row, augmentation))(keys, images, masks)


def _augment_row(
    augmentation: Augmentation, key: jax.Array, image: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A slice, or all of a volume."""
    moving, flipping, shading = jax.random.split(key, 3)
    move = partial(_move, augmentation, moving, flipping)
    image, mask = (jax.vmap(move) if mask.ndim > 2 else move)(image, mask)
    if augmentation.intensity:
        image = _shade(augmentation.intensity, shading, image)
    return image, mask


def _move(
    augmentation: Augmentation, moving: jax.Array, flipping: jax.Array, image: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if augmentation.rotation or augmentation.scale or augmentation.elastic:
        places = _sources(augmentation, moving, mask.shape)
        image = map_coordinates(image[..., 0], places, order=1, mode="constant")[..., None]
        mask = map_coordinates(mask, places, order=0, mode="constant")
    if augmentation.flips:
        for axis, flip in enumerate(jax.random.bernoulli(flipping, shape=(2,))):
            image, mask = (jnp.where(flip, jnp.flip(x, axis), x) for x in (image, mask))
    return image, mask


def _sources(augmentation: Augmentation, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Where each pixel comes from: rows and columns [2, H, W]."""
    turning, scaling, bending = jax.random.split(key, 3)
    centre = (jnp.array(shape, jnp.float32) - 1) / 2
    from_centre = jnp.moveaxis(jnp.indices(shape).astype(jnp.float32), 0, -1) - centre  # [H, W, 2]
    angle = jnp.deg2rad(augmentation.rotation) * jax.random.uniform(turning, minval=-1.0)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    places = from_centre @ rotation / _factor(augmentation.scale, scaling) + centre
    if augmentation.elastic:
        drawn = jax.random.normal(bending, (POINTS, POINTS, 2)) * (augmentation.elastic / 100)
        places += jax.image.resize(drawn, (*shape, 2), "cubic") * jnp.array(shape, jnp.float32)
    return jnp.moveaxis(places, -1, 0)


def _shade(most: float, key: jax.Array, image: jax.Array) -> jax.Array:
    brightness, contrast, gamma = jax.random.split(key, 3)
    mean = image.mean()
    image = (image - mean) * _factor(most, contrast) + mean + most * jax.random.uniform(brightness, minval=-1.0)
    return jnp.clip(image, 0, 1) ** _factor(most, gamma)


def _factor(most: float, key: jax.Array) -> jax.Array:
    """From 1 / (1 + most) to 1 + most, as often above 1 as below."""
    return (1 + most) ** jax.random.uniform(key, minval=-1.0)
