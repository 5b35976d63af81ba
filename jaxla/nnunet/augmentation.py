"""nnU-Net's augmentation, on the device and within the compiled step: patches are read larger than they are seen.

Each change is drawn for each patch of its own, with nnU-Net's probabilities and ranges. Reference code: nnunetv2 2.8.1,
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

from jaxla.nnunet.planner import ANISOTROPIC
from jaxla.nnunet.preprocessing import OUTSIDE

# from where to where each change goes
SCALE, NOISE_DEVIATION, BLUR_VOXELS, FACTOR, RESOLUTION, EXPONENT = (
    (0.7, 1.4), (0.0, 0.1), (0.5, 1.0), (0.75, 1.25), (0.5, 1.0), (0.7, 1.5),
)  # fmt: skip
READ_SCALE = 0.85  # what is read is larger by that: less than the largest scale needs, as nnU-Net has it
WIDEST_KERNEL = 7
SMALL = 1e-7

Arrays = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class PatchAugmentation:
    """Random changes of training patches.

    Args:
        nnunet: Augment patches as nnU-Net does.
    """

    nnunet: bool = True


class Chances(NamedTuple):
    """How likely each change is; of turning and scaling each by itself, of mirroring along each axis."""

    moved: float = 0.2
    noise: float = 0.1
    blur: float = 0.2 * 0.5
    brightness: float = 0.15
    contrast: float = 0.15
    low_resolution: float = 0.25 * 0.5
    inverted_gamma: float = 0.1
    gamma: float = 0.3
    mirrored: float = 0.5


NNUNET = Chances()


class Turning(NamedTuple):
    """How patches are turned.

    Attributes:
        degrees: at most, either way, about each axis.
        in_plane: of patches with depth that are much longer than deep: each slice is turned alike, and by itself.
    """

    degrees: float
    in_plane: bool


def turning(patch_size: Sequence[int]) -> Turning:
    """Of patches [D, H, W] or [H, W]."""
    if len(patch_size) == 2:
        return Turning(15.0 if max(patch_size) / min(patch_size) > 1.5 else 180.0, in_plane=False)
    if max(patch_size) / patch_size[0] > ANISOTROPIC:
        return Turning(180.0, in_plane=True)
    return Turning(30.0, in_plane=False)


def read_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    """What is read, so that a patch that is turned is still full, in voxels along each axis."""
    degrees, in_plane = turning(patch_size)
    angle = math.radians(min(90.0, degrees))
    size = np.array(patch_size, float)
    planes = [(0, 1)] if len(size) == 2 else [(1, 2), (0, 2), (0, 1)]
    turned = [size]
    for a, b in planes:
        corner = size.copy()
        sign = -1 if (a, b) == (0, 2) else 1  # of the sense in which nnU-Net turns its one corner
        corner[a] = size[a] * math.cos(angle) + sign * size[b] * math.sin(angle)
        corner[b] = size[b] * math.cos(angle) - sign * size[a] * math.sin(angle)
        turned.append(np.abs(corner))
    largest = (np.max(turned, 0) / READ_SCALE).astype(int)
    if in_plane:
        largest[0] = patch_size[0]
    return tuple(largest.tolist())


def make_augment(
    patch_size: Sequence[int], classes: int, zeros_stay: bool, chances: Chances = NNUNET
) -> Callable[[jax.Array, jax.Array, jax.Array], Arrays]:
    """`(key, images, masks) -> images, masks`: [B, …, 1] and [B, …] as they are read -> as they are seen.

    Args:
        patch_size: that is seen, [D, H, W] or [H, W].
        classes: highest class index of a mask.
        zeros_stay: whether what is zero in the scan is zero in the end.
    """
    change = partial(_augment_patch, tuple(patch_size), classes, zeros_stay, chances)

    def augment(key: jax.Array, images: jax.Array, masks: jax.Array) -> Arrays:
        images, masks = jax.vmap(change)(jax.random.split(key, len(images)), images[..., 0], masks)
        return images[..., None], masks

    return augment


def _augment_patch(
    patch_size: tuple[int, ...],
    classes: int,
    zeros_stay: bool,
    chances: Chances,
    key: jax.Array,
    image: jax.Array,
    mask: jax.Array,
) -> Arrays:
    keys = iter(jax.random.split(key, 32))
    degrees, in_plane = turning(patch_size)
    axes = len(patch_size) - in_plane

    def happens(probability: float) -> jax.Array:
        return jax.random.bernoulli(next(keys), probability)

    def between(low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    def factor(low: float, high: float) -> jax.Array:  # as often below 1 as above
        return jnp.where(happens(0.5), between(low, 1.0), between(1.0, high))

    turned, scaled = happens(chances.moved), happens(chances.moved)
    angles = jnp.where(turned, jnp.deg2rad(between(-degrees, degrees, (axes,))), 0.0)
    scale = jnp.where(scaled, between(*SCALE), 1.0)
    move = partial(moved, size=patch_size[in_plane:], classes=classes, happens=turned | scaled)
    if in_plane:
        image, mask = jax.vmap(lambda image, mask: move(image, mask, angles, scale))(image, mask)
    else:
        image, mask = move(image, mask, angles, scale)

    def perhaps(probability: float, changed: jax.Array) -> jax.Array:
        return jnp.where(happens(probability), changed, image)

    image = perhaps(chances.noise, image + between(*NOISE_DEVIATION) * jax.random.normal(next(keys), image.shape))
    image = perhaps(chances.blur, blurred(image, between(*BLUR_VOXELS, (image.ndim,))))
    image = perhaps(chances.brightness, image * factor(*FACTOR))
    image = perhaps(chances.contrast, contrasted(image, factor(*FACTOR)))
    resolution = jnp.full(image.ndim, between(*RESOLUTION))
    resolution = resolution.at[0].set(1.0) if in_plane else resolution
    image = perhaps(chances.low_resolution, at_low_resolution(image, resolution))
    image = perhaps(chances.inverted_gamma, -gamma_changed(-image, factor(*EXPONENT)))
    image = perhaps(chances.gamma, gamma_changed(image, factor(*EXPONENT)))
    for axis in range(image.ndim):
        mirrored = happens(chances.mirrored)
        image, mask = (jnp.where(mirrored, jnp.flip(x, axis), x) for x in (image, mask))
    if zeros_stay:
        image = jnp.where(mask == OUTSIDE, 0, image)
    return image, jnp.maximum(mask, 0)


def moved(
    image: jax.Array,
    mask: jax.Array,
    angles: jax.Array,
    scale: jax.Array,
    *,
    size: Sequence[int],
    classes: int,
    happens: jax.Array,
) -> Arrays:
    """The middle of a patch, turned and scaled: the image linearly, of the mask the class of the largest share.

    Args:
        angles: radians about each axis; in a plane the last one.
        scale: above 1 what is seen is more, and smaller.
        size: of what is seen.
        happens: whether it is; else the middle is cut out as it is.
    """
    places = jnp.moveaxis(jnp.indices(size, dtype=jnp.float32), 0, -1) - (jnp.array(size) - 1) / 2  # from the middle
    places = jnp.matmul(places, (_rotation(angles) * scale).T, precision="highest")  # GPUs round to TF32 else
    whole = jnp.array(image.shape)
    still = whole // 2 - jnp.array(size) // 2 + (jnp.array(size) - 1) / 2
    places += jnp.where(happens, (whole - 1) / 2, still)

    def at(voxel: jax.Array) -> Arrays:
        """What is there; beyond the patch 0, and OUTSIDE."""
        there = ((voxel >= 0) & (voxel < whole)).all(-1)
        index = tuple(jnp.moveaxis(jnp.clip(voxel, 0, whole - 1), -1, 0))
        return jnp.where(there, image[index], 0), jnp.where(there, mask[index], OUTSIDE)

    first = jnp.floor(places)
    beyond = places - first  # the share of the next voxel
    values = jnp.zeros(size, image.dtype)
    labels = jnp.arange(OUTSIDE, classes + 1).reshape(-1, *(1 for _ in size))
    shares = jnp.zeros((len(labels), *size), jnp.float32)
    for corner in product((0, 1), repeat=len(size)):
        share = jnp.where(jnp.array(corner) == 1, beyond, 1 - beyond).prod(-1)
        value, label = at(first.astype(jnp.int32) + jnp.array(corner))
        values += share * value
        shares += share * (label == labels)
    # compared in float16, as nnU-Net does: classes whose shares differ by less are even, and the nearest has the voxel
    shares = (1000 * shares).astype(jnp.float16)
    _, nearest = at(jnp.round(places).astype(jnp.int32))
    of_nearest = jnp.where(nearest == labels, shares, 0).max(0)
    winner = jnp.where(of_nearest == shares.max(0), nearest, jnp.argmax(shares, axis=0) + OUTSIDE)
    return values, winner.astype(mask.dtype)


def _rotation(angles: jax.Array) -> jax.Array:
    """About the first axis, then the second, then the third; in a plane by the last angle."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if len(angles) == 2:
        return jnp.array([[cos[1], -sin[1]], [sin[1], cos[1]]])
    about = [
        jnp.array([[1, 0, 0], [0, cos[0], -sin[0]], [0, sin[0], cos[0]]]),
        jnp.array([[cos[1], 0, sin[1]], [0, 1, 0], [-sin[1], 0, cos[1]]]),
        jnp.array([[cos[2], -sin[2], 0], [sin[2], cos[2], 0], [0, 0, 1]]),
    ]
    return about[2] @ about[1] @ about[0]


def blurred(image: jax.Array, sigmas: jax.Array) -> jax.Array:
    """By a Gaussian along each axis, whose kernel has the odd width nearest to six deviations and a half."""
    reach = WIDEST_KERNEL // 2
    for axis in range(image.ndim):
        asked = 6 * sigmas[axis] + 0.5
        even = jnp.round(asked)
        width = jnp.where(even % 2 == 1, even, jnp.where(asked >= even, even + 1, even - 1))
        steps = jnp.arange(-reach, reach + 1)
        kernel = jnp.where(jnp.abs(steps) <= width // 2, jnp.exp(-0.5 * jnp.square(steps / sigmas[axis])), 0)
        kernel /= kernel.sum()
        margins = [(reach, reach) if other == axis else (0, 0) for other in range(image.ndim)]
        padded = jnp.pad(image, margins, mode="reflect")
        parts = (jax.lax.slice_in_dim(padded, i, i + image.shape[axis], axis=axis) for i in range(WIDEST_KERNEL))
        image = sum(weight * part for weight, part in zip(kernel, parts, strict=True))
    return image


def contrasted(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Spread around its mean, and kept within its range."""
    mean = image.mean()
    return jnp.clip((image - mean) * factor + mean, image.min(), image.max())


def at_low_resolution(image: jax.Array, resolution: jax.Array) -> jax.Array:
    """As it would look had it been taken with so many times the voxels along each axis, at most 1."""
    for axis, side in enumerate(image.shape):
        fewer = jnp.round(side * resolution[axis])
        places = jnp.clip((jnp.arange(side) + 0.5) * fewer / side - 0.5, 0, fewer - 1)
        first = jnp.floor(places)
        taken = [jnp.floor((jnp.minimum(first + next_one, fewer - 1) + 0.5) * side / fewer) for next_one in (0, 1)]
        before, after = (jnp.take(image, jnp.clip(i, 0, side - 1).astype(jnp.int32), axis=axis) for i in taken)
        weight = (places - first).reshape([-1 if other == axis else 1 for other in range(image.ndim)])
        image = (1 - weight) * before + weight * after
    return image


def gamma_changed(image: jax.Array, exponent: jax.Array) -> jax.Array:
    """Its grey values, from their least to their greatest, to a power; mean and deviation stay."""
    mean, deviation, least = image.mean(), image.std(ddof=1), image.min()
    span = image.max() - least
    changed = ((image - least) / jnp.maximum(span, SMALL)) ** exponent * span + least
    return (changed - changed.mean()) * (deviation / jnp.maximum(changed.std(ddof=1), SMALL)) + mean
