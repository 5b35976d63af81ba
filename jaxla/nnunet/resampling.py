"""nnU-Net's resampling: cubic for images, linear for masks; along an axis of much longer voxels, the nearest slice.

Reference code: nnunetv2 2.8.1, `default_resampling`, whose in-plane steps are scikit-image's `resize(mode="edge",
anti_aliasing=False)`; that is SciPy's `zoom` with half-pixel centres, kept within the range of what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from jaxla.nnunet.planner import ANISOTROPIC

IMAGE_ORDER, MASK_ORDER = 3, 1

Resize = Callable[[np.ndarray, Sequence[int]], np.ndarray]


def separate_axis(spacing: Sequence[float], other: Sequence[float]) -> int | None:
    """The axis whose voxels are much longer than the others', before resampling or after; None where none is."""
    for mm in (np.array(spacing), np.array(other)):
        if mm.max() / mm.min() > ANISOTROPIC:
            longest = np.flatnonzero(mm == mm.max())
            return int(longest[0]) if len(longest) == 1 else None
    return None


def resample_image(image: np.ndarray, shape: Sequence[int], separate: int | None) -> np.ndarray:
    """[D, H, W] -> another shape of the same extent, in the image's own dtype.

    Args:
        separate: axis along which each slice is resampled by itself, then the nearest one is taken.
    """
    return _resample(image, shape, separate, lambda part, size: _resize(part, size, IMAGE_ORDER))


def resample_mask(mask: np.ndarray, shape: Sequence[int], separate: int | None) -> np.ndarray:
    """`resample_image` for class indices: for each voxel the class of the largest share, of equal ones the nearest.

    Where the nearest is not among the equal ones, the lowest of them. Reference code: batchgenerators 0.25.5.
    """

    def resize(part: np.ndarray, size: Sequence[int]) -> np.ndarray:
        values = np.unique(part)
        nearest = np.searchsorted(values, _resize(part, size, order=0))
        largest, of_nearest, winner = np.full(size, -1.0), np.zeros(size), np.zeros(size, int)
        for i, value in enumerate(values):  # one at a time: of many classes all shares would fill the memory
            share = _resize(part == value, size, MASK_ORDER)
            of_nearest[nearest == i] = share[nearest == i]
            winner[share > largest] = i
            largest = np.maximum(largest, share)
        return values[np.where(of_nearest == largest, nearest, winner)]

    return _resample(mask, shape, separate, resize)


def _resample(array: np.ndarray, shape: Sequence[int], separate: int | None, resize: Resize) -> np.ndarray:
    if array.shape == tuple(shape):
        return array
    if separate is None:
        return resize(array, shape).astype(array.dtype)
    in_plane = [side for axis, side in enumerate(shape) if axis != separate]
    # slices that are never the nearest are not resampled
    nearest = nearest_places(array.shape[separate], shape[separate])
    resampled = {i: resize(array.take(i, separate), in_plane).astype(array.dtype) for i in np.unique(nearest)}
    return np.stack([resampled[i] for i in nearest], axis=separate)


def _resize(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    factors = [after / before for before, after in zip(array.shape, shape, strict=True)]
    zoomed = ndimage.zoom(array.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(zoomed, array.min(), array.max())  # a cubic goes beyond


def nearest_places(before: int, after: int) -> np.ndarray:
    """For each of `after` equal intervals the nearest of `before` samples, as SciPy's `map_coordinates` rounds."""
    places = before / after * (np.arange(after) + 0.5) - 0.5
    return np.clip(np.floor(places + 0.5).astype(int), 0, before - 1)


def linear_places(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `after` equal intervals the two of `before` samples it lies between, and the weight of the second."""
    places = np.clip(before / after * (np.arange(after) + 0.5) - 0.5, 0, before - 1)
    first = np.minimum(places.astype(int), max(before - 2, 0))
    return first, np.minimum(first + 1, before - 1), (places - first).astype(np.float32)
