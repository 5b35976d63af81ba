"""Random augmentation of training slices and volumes, run on the device as part of the compiled step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jaxla.config import Augmentation

ELASTIC_POINTS = 6  # points per side at which displacements are drawn; they are interpolated in between


def augment(
    augmentation: Augmentation, key: jax.Array, images: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augment each row of images [B, H, W, C] in 0..1 and masks [B, H, W] at random; return both.

    Rows may be volumes, [B, D, H, W, C] and [B, D, H, W]; all slices of a volume, and all channels, change equally.

    An image and its mask move together. Images are interpolated bilinearly, masks by nearest neighbour, and pixels
    from outside the image are 0 in both.
    """
    keys = jax.random.split(key, images.shape[0])
    return jax.vmap(partial(_augment_row, augmentation))(keys, images, masks)


def _augment_row(
    augmentation: Augmentation, key: jax.Array, image: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augment one slice or volume."""
    move_key, flip_key, intensity_key = jax.random.split(key, 3)
    move = partial(_move_slice, augmentation, move_key, flip_key)
    image, mask = (jax.vmap(move) if mask.ndim > 2 else move)(image, mask)
    if augmentation.intensity:
        image = _change_intensity(augmentation.intensity, intensity_key, image)
    return image, mask


def _move_slice(
    augmentation: Augmentation, move_key: jax.Array, flip_key: jax.Array, image: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rotate, scale, deform and flip a slice and its mask."""
    if augmentation.rotation or augmentation.scale or augmentation.elastic:
        sources = _draw_sources(augmentation, move_key, mask.shape)
        image = jax.vmap(lambda channel: map_coordinates(channel, sources, order=1, mode="constant"), -1, -1)(image)
        mask = map_coordinates(mask, sources, order=0, mode="constant")
    if augmentation.flips:
        for axis, flip in enumerate(jax.random.bernoulli(flip_key, shape=(2,))):
            image, mask = (jnp.where(flip, jnp.flip(x, axis), x) for x in (image, mask))
    return image, mask


def _draw_sources(augmentation: Augmentation, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Draw the row and column that each pixel is taken from, [2, H, W]."""
    rotation_key, scale_key, elastic_key = jax.random.split(key, 3)
    centre = (jnp.array(shape, jnp.float32) - 1) / 2
    from_centre = jnp.moveaxis(jnp.indices(shape).astype(jnp.float32), 0, -1) - centre  # [H, W, 2]
    angle = jnp.deg2rad(augmentation.rotation) * jax.random.uniform(rotation_key, minval=-1.0)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    sources = from_centre @ rotation / _draw_factor(augmentation.scale, scale_key) + centre
    if augmentation.elastic:
        shifts = jax.random.normal(elastic_key, (ELASTIC_POINTS, ELASTIC_POINTS, 2)) * (augmentation.elastic / 100)
        sources += jax.image.resize(shifts, (*shape, 2), "cubic") * jnp.array(shape, jnp.float32)
    return jnp.moveaxis(sources, -1, 0)


def _change_intensity(max_change: float, key: jax.Array, image: jax.Array) -> jax.Array:
    """Change brightness, contrast and gamma."""
    brightness_key, contrast_key, gamma_key = jax.random.split(key, 3)
    mean = image.mean()
    image = (image - mean) * _draw_factor(max_change, contrast_key) + mean
    image += max_change * jax.random.uniform(brightness_key, minval=-1.0)
    return jnp.clip(image, 0, 1) ** _draw_factor(max_change, gamma_key)


def _draw_factor(max_change: float, key: jax.Array) -> jax.Array:
    """Draw a factor from 1 / (1 + max_change) to 1 + max_change, above and below 1 with equal probability."""
    return (1 + max_change) ** jax.random.uniform(key, minval=-1.0)
