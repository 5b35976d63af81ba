"""nnU-Net's resampling: cubic for images, linear for masks; the nearest slice along an axis of much coarser spacing.

Reference code: nnunetv2 2.8.1, `default_resampling`, whose in-plane steps are scikit-image's `resize(mode="edge",
anti_aliasing=False)`. That is SciPy's `zoom` with half-pixel centres, clipped to the range of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

ANISOTROPY_THRESHOLD = 3  # an axis is coarse if its spacing is more than this many times the finest
IMAGE_ORDER, MASK_ORDER = 3, 1  # orders of the splines

Resize = Callable[[np.ndarray, Sequence[int]], np.ndarray]


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the shape that covers the same extent at another spacing."""
    return tuple(round(float(old / new * n)) for n, old, new in zip(shape, spacing, new_spacing, strict=True))


def find_coarse_axis(spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
    """Return the axis of much coarser spacing than the others, or None if there is none.

    The new spacing is considered only if the old one has no coarse axis. Two equally coarse axes count as none.
    """
    for spacings in (np.array(spacing), np.array(new_spacing)):
        if spacings.max() / spacings.min() > ANISOTROPY_THRESHOLD:
            coarsest = np.flatnonzero(spacings == spacings.max())
            return int(coarsest[0]) if len(coarsest) == 1 else None
    return None


def resample_image(image: np.ndarray, shape: Sequence[int], coarse_axis: int | None) -> np.ndarray:
    """Resample [D, H, W] to another shape of the same extent; along `coarse_axis` the nearest slice is taken."""
    return _resample(image, shape, coarse_axis, lambda part, size: _zoom(part, size, IMAGE_ORDER))


def resample_mask(mask: np.ndarray, shape: Sequence[int], coarse_axis: int | None) -> np.ndarray:
    """Resample class indices as `resample_image` does images: each voxel takes the class with the largest weight.

    A tie goes to the class of the nearest voxel if that is among the tied ones, else to the lowest class. Reference
    code: batchgenerators 0.25.5.
    """

    def resize(part: np.ndarray, size: Sequence[int]) -> np.ndarray:
        values = np.unique(part)
        nearest = np.searchsorted(values, _zoom(part, size, order=0))
        largest, nearest_weight, winner = np.full(size, -1.0), np.zeros(size), np.zeros(size, int)
        for i, value in enumerate(values):  # one at a time: the weights of many classes would fill the memory
            weight = _zoom(part == value, size, MASK_ORDER)
            nearest_weight[nearest == i] = weight[nearest == i]
            winner[weight > largest] = i
            largest = np.maximum(largest, weight)
        return values[np.where(nearest_weight == largest, nearest, winner)]

    return _resample(mask, shape, coarse_axis, resize)


def _resample(array: np.ndarray, shape: Sequence[int], coarse_axis: int | None, resize: Resize) -> np.ndarray:
    if array.shape == tuple(shape):
        return array
    if coarse_axis is None:
        return resize(array, shape).astype(array.dtype)
    plane = [side for axis, side in enumerate(shape) if axis != coarse_axis]
    nearest = nearest_indices(array.shape[coarse_axis], shape[coarse_axis])
    slices = {i: resize(array.take(i, coarse_axis), plane).astype(array.dtype) for i in np.unique(nearest)}
    return np.stack([slices[i] for i in nearest], axis=coarse_axis)


def _zoom(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    factors = [after / before for before, after in zip(array.shape, shape, strict=True)]
    zoomed = ndimage.zoom(array.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(zoomed, array.min(), array.max())  # cubic splines overshoot


def nearest_indices(size: int, new_size: int) -> np.ndarray:
    """Return the index of the nearest of `size` samples for each of `new_size` samples.

    Rounds as SciPy's `map_coordinates` does.
    """
    positions = size / new_size * (np.arange(new_size) + 0.5) - 0.5
    return np.clip(np.floor(positions + 0.5).astype(int), 0, size - 1)


def linear_indices(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of the two of `size` samples around each of `new_size` samples, and the second's weight."""
    positions = np.clip(size / new_size * (np.arange(new_size) + 0.5) - 0.5, 0, size - 1)
    first = np.minimum(positions.astype(int), max(size - 2, 0))
    return first, np.minimum(first + 1, size - 1), (positions - first).astype(np.float32)
