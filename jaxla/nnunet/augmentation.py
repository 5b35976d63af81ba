"""nnU-Net's augmentation, in the compiled training step; patches are read larger than the network's input.

Each change is drawn for each patch separately, with nnU-Net's probabilities and ranges. Reference code: nnunetv2 2.8.1,
`nnUNetTrainer.get_training_transforms`, and batchgeneratorsv2 0.3.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxla.nnunet.preprocessing import OUTSIDE
from jaxla.nnunet.resampling import ANISOTROPY_THRESHOLD

SCALE_RANGE, NOISE_RANGE, BLUR_RANGE = (0.7, 1.4), (0.0, 0.1), (0.5, 1.0)  # noise and blur: standard deviations
FACTOR_RANGE, RESOLUTION_RANGE, EXPONENT_RANGE = (0.75, 1.25), (0.5, 1.0), (0.7, 1.5)
# As in nnU-Net: patches are read 1 / 0.85 times larger, which is less than the largest scale needs.
INITIAL_SCALE = 0.85
KERNEL_WIDTH = 7  # width of the largest blur kernel in voxels
EPSILON = 1e-7

Arrays = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class PatchAugmentation:
    """Random changes of training patches.

    Args:
        nnunet: Augment patches as nnU-Net does.
    """

    nnunet: bool = True


class Probabilities(NamedTuple):
    """The probability of each change, separately for rotation and scaling, and for mirroring along each axis."""

    spatial: float = 0.2
    noise: float = 0.1
    blur: float = 0.2 * 0.5
    brightness: float = 0.15
    contrast: float = 0.15
    low_resolution: float = 0.25 * 0.5
    inverted_gamma: float = 0.1
    gamma: float = 0.3
    mirror: float = 0.5


NNUNET_PROBABILITIES = Probabilities()


class RotationRange(NamedTuple):
    """The range of random rotations of patches."""

    degrees: float  # largest angle, in either direction
    in_plane: bool  # one angle for all slices of a 3D patch, because there are few; otherwise one for each axis


def rotation_range(patch_size: Sequence[int]) -> RotationRange:
    """Return the range of rotations for patches [D, H, W] or [H, W]."""
    if len(patch_size) == 2:
        return RotationRange(15.0 if max(patch_size) / min(patch_size) > 1.5 else 180.0, False)
    if max(patch_size) / patch_size[0] > ANISOTROPY_THRESHOLD:
        return RotationRange(180.0, True)
    return RotationRange(30.0, False)


def initial_patch_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the number of voxels to read along each axis, so that a rotated patch is still filled."""
    degrees, in_plane = rotation_range(patch_size)
    angle = math.radians(min(90.0, degrees))
    size = np.array(patch_size, float)
    planes = [(0, 1)] if len(size) == 2 else [(1, 2), (0, 2), (0, 1)]
    rotated = [size]
    for a, b in planes:
        corner = size.copy()
        sign = -1 if (a, b) == (0, 2) else 1  # the direction in which nnU-Net rotates its single corner
        corner[a] = size[a] * math.cos(angle) + sign * size[b] * math.sin(angle)
        corner[b] = size[b] * math.cos(angle) - sign * size[a] * math.sin(angle)
        rotated.append(np.abs(corner))
    largest = (np.max(rotated, 0) / INITIAL_SCALE).astype(int)
    if in_plane:
        largest[0] = patch_size[0]
    return tuple(largest.tolist())


def make_augment(
    patch_size: Sequence[int], max_class: int, keep_zeros: bool, probabilities: Probabilities = NNUNET_PROBABILITIES
) -> Callable[[jax.Array, jax.Array, jax.Array], Arrays]:
    """Return `(key, images, masks) -> images, masks`: [B, …, 1] and [B, …], from the initial size to `patch_size`.

    Args:
        patch_size: [D, H, W] or [H, W].
        max_class: highest class index in a mask.
        keep_zeros: set voxels that are zero in the scan back to zero at the end.
    """
    augment_patch = partial(_augment_patch, tuple(patch_size), max_class, keep_zeros, probabilities)

    def augment(key: jax.Array, images: jax.Array, masks: jax.Array) -> Arrays:
        images, masks = jax.vmap(augment_patch)(jax.random.split(key, len(images)), images[..., 0], masks)
        return images[..., None], masks

    return augment


def _augment_patch(
    patch_size: tuple[int, ...],
    max_class: int,
    keep_zeros: bool,
    probabilities: Probabilities,
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
) -> Arrays:
    keys = iter(jax.random.split(key, 32))

    def draw_event(probability: float) -> jax.Array:
        return jax.random.bernoulli(next(keys), probability)

    def draw(low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    def draw_factor(low: float, high: float) -> jax.Array:  # as often below 1 as above
        return jnp.where(draw_event(0.5), draw(low, 1.0), draw(1.0, high))

    degrees, in_plane = rotation_range(patch_size)
    is_rotated, is_scaled = draw_event(probabilities.spatial), draw_event(probabilities.spatial)
    angles = jnp.where(is_rotated, jnp.deg2rad(draw(-degrees, degrees, (len(patch_size) - in_plane,))), 0.0)
    scale = jnp.where(is_scaled, draw(*SCALE_RANGE), 1.0)
    transform = partial(
        rotate_and_scale, size=patch_size[in_plane:], max_class=max_class, is_applied=is_rotated | is_scaled
    )
    if in_plane:
        image, mask = jax.vmap(lambda image, mask: transform(image, mask, angles, scale))(image, mask)
    else:
        image, mask = transform(image, mask, angles, scale)

    def choose(probability: float, changed: jax.Array) -> jax.Array:
        return jnp.where(draw_event(probability), changed, image)

    p = probabilities
    image = choose(p.noise, image + draw(*NOISE_RANGE) * jax.random.normal(next(keys), image.shape))
    image = choose(p.blur, blur(image, draw(*BLUR_RANGE, (image.ndim,))))
    image = choose(p.brightness, image * draw_factor(*FACTOR_RANGE))
    image = choose(p.contrast, change_contrast(image, draw_factor(*FACTOR_RANGE)))
    resolution = jnp.full(image.ndim, draw(*RESOLUTION_RANGE))
    resolution = resolution.at[0].set(1.0) if in_plane else resolution
    image = choose(p.low_resolution, lower_resolution(image, resolution))
    image = choose(p.inverted_gamma, -change_gamma(-image, draw_factor(*EXPONENT_RANGE)))
    image = choose(p.gamma, change_gamma(image, draw_factor(*EXPONENT_RANGE)))
    for axis in range(image.ndim):
        is_mirrored = draw_event(p.mirror)
        image, mask = (jnp.where(is_mirrored, jnp.flip(x, axis), x) for x in (image, mask))
    if keep_zeros:
        image = jnp.where(mask == OUTSIDE, 0, image)
    return image, jnp.maximum(mask, 0)


def rotate_and_scale(
    image: jax.Array,
    mask: jax.Array,
    angles: jax.Array,
    scale: jax.Array,
    *,
    size: Sequence[int],
    max_class: int,
    is_applied: jax.Array,
) -> Arrays:
    """Rotate and scale a patch and return its centre: linear for images; for masks, the class with the largest weight.

    Args:
        angles: radians about each axis; in 2D only the last one is used.
        scale: above 1, the centre shows more of the patch at a smaller size.
        size: size of the centre.
        is_applied: return the centre unchanged if False.
    """
    positions = jnp.moveaxis(jnp.indices(size, dtype=jnp.float32), 0, -1) - (jnp.array(size) - 1) / 2  # from the centre
    positions = jnp.matmul(positions, (_rotation(angles) * scale).T, precision="highest")  # GPUs default to TF32
    shape = jnp.array(image.shape)
    unchanged_centre = shape // 2 - jnp.array(size) // 2 + (jnp.array(size) - 1) / 2
    positions += jnp.where(is_applied, (shape - 1) / 2, unchanged_centre)

    def read_voxels(index: jax.Array) -> Arrays:
        """Return image and mask at `index`; 0 and OUTSIDE beyond the patch."""
        is_inside = ((index >= 0) & (index < shape)).all(-1)
        clipped = tuple(jnp.moveaxis(jnp.clip(index, 0, shape - 1), -1, 0))
        return jnp.where(is_inside, image[clipped], 0), jnp.where(is_inside, mask[clipped], OUTSIDE)

    lower = jnp.floor(positions)
    upper_weight = positions - lower
    values = jnp.zeros(size, image.dtype)
    classes = jnp.arange(OUTSIDE, max_class + 1).reshape(-1, *(1 for _ in size))
    class_weights = jnp.zeros((len(classes), *size), jnp.float32)
    for corner in product((0, 1), repeat=len(size)):
        weight = jnp.where(jnp.array(corner) == 1, upper_weight, 1 - upper_weight).prod(-1)
        value, label = read_voxels(lower.astype(jnp.int32) + jnp.array(corner))
        values += weight * value
        class_weights += weight * (label == classes)
    # compared in float16, as in nnU-Net: smaller differences are ties, and a tie goes to the nearest voxel's class
    class_weights = (1000 * class_weights).astype(jnp.float16)
    _, nearest = read_voxels(jnp.round(positions).astype(jnp.int32))
    nearest_weight = jnp.where(nearest == classes, class_weights, 0).max(0)
    is_tied = nearest_weight == class_weights.max(0)
    winner = jnp.where(is_tied, nearest, jnp.argmax(class_weights, axis=0) + OUTSIDE)
    return values, winner.astype(mask.dtype)


def _rotation(angles: jax.Array) -> jax.Array:
    """Return the matrix that rotates about the first axis, then the second, then the third; in 2D by the last angle."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if len(angles) == 2:
        return jnp.array([[cos[1], -sin[1]], [sin[1], cos[1]]])
    first = jnp.array([[1, 0, 0], [0, cos[0], -sin[0]], [0, sin[0], cos[0]]])
    second = jnp.array([[cos[1], 0, sin[1]], [0, 1, 0], [-sin[1], 0, cos[1]]])
    third = jnp.array([[cos[2], -sin[2], 0], [sin[2], cos[2], 0], [0, 0, 1]])
    return third @ second @ first


def blur(image: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Blur by a Gaussian along each axis; its kernel has the odd width nearest to 6 standard deviations plus 0.5."""
    reach = KERNEL_WIDTH // 2
    for axis in range(image.ndim):
        exact = 6 * sigmas[axis] + 0.5
        rounded = jnp.round(exact)
        width = jnp.where(rounded % 2 == 1, rounded, jnp.where(exact >= rounded, rounded + 1, rounded - 1))
        steps = jnp.arange(-reach, reach + 1)
        kernel = jnp.where(jnp.abs(steps) <= width // 2, jnp.exp(-0.5 * jnp.square(steps / sigmas[axis])), 0)
        kernel /= kernel.sum()
        padded = jnp.pad(image, [(reach, reach) if i == axis else (0, 0) for i in range(image.ndim)], mode="reflect")
        parts = (jax.lax.slice_in_dim(padded, i, i + image.shape[axis], axis=axis) for i in range(KERNEL_WIDTH))
        image = sum(weight * part for weight, part in zip(kernel, parts, strict=True))
    return image


def change_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scale grey values around their mean, clipped to their original range."""
    mean = image.mean()
    return jnp.clip((image - mean) * factor + mean, image.min(), image.max())


def lower_resolution(image: jax.Array, resolution: jax.Array) -> jax.Array:
    """Downsample to `resolution` times as many voxels along each axis (nearest-neighbour), then upsample linearly.

    Args:
        resolution: fraction of the voxels along each axis, at most 1.
    """
    for axis, side in enumerate(image.shape):
        count = jnp.round(side * resolution[axis])
        positions = jnp.clip((jnp.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
        lower = jnp.floor(positions)
        sampled = [jnp.floor((jnp.minimum(lower + step, count - 1) + 0.5) * side / count) for step in (0, 1)]
        before, after = (jnp.take(image, jnp.clip(i, 0, side - 1).astype(jnp.int32), axis=axis) for i in sampled)
        weight = (positions - lower).reshape([-1 if i == axis else 1 for i in range(image.ndim)])
        image = (1 - weight) * before + weight * after
    return image


def change_gamma(image: jax.Array, exponent: jax.Array) -> jax.Array:
    """Raise grey values, scaled to 0..1, to a power; keep their mean and standard deviation."""
    mean, deviation, lowest = image.mean(), image.std(ddof=1), image.min()
    span = image.max() - lowest
    changed = ((image - lowest) / jnp.maximum(span, EPSILON)) ** exponent * span + lowest
    return (changed - changed.mean()) * (deviation / jnp.maximum(changed.std(ddof=1), EPSILON)) + mean
