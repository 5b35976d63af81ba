"""Conversion between slices in their own pixels and the network's square input.

A slice is padded to a square in mm, which keeps its aspect, and the square is resized to the input. Grey values are
scaled to 0..1 between two percentiles of the volume; the padding is 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy.sparse import csr_array

NEIGHBOUR_MM = 2.5  # distance between a slice and its neighbours in a network's input
ROUNDING_MARGIN = 1e-3  # so that slices of 1 mm and 0.999999 mm have the same neighbours
TIE_MARGIN = np.float32(1e-5)  # fractions of a pixel that differ by less differ only by rounding


@dataclass(frozen=True)
class Frame:
    """Position of a slice in the input: `height` × `width` input pixels from row `top` and column `left`.

    `top` or `left` is negative for a slice that is larger than the input, which is cropped to its centre.
    """

    size: int
    top: int
    left: int
    height: int
    width: int

    @property
    def is_cropped(self) -> bool:
        """The slice is larger than the input."""
        return max(self.height, self.width) > self.size


@dataclass(frozen=True)
class Canvas:
    """The square to which slices are padded before it is resized to the network's input."""

    size: int  # side of the input in pixels
    extent: float = 0.0  # side of the square in mm; 0 gives each slice the smallest square that holds it

    def frame(self, shape: tuple[int, int], spacing: tuple[float, float]) -> Frame:
        """Return the frame of slices with H × W pixels of `spacing` mm."""
        sides = _sides_mm(shape, spacing)
        height, width = (max(1, round(self.size * side / (self.extent or max(sides)))) for side in sides)
        return Frame(self.size, (self.size - height) // 2, (self.size - width) // 2, height, width)


def smallest_extent(slices: Iterable[tuple[tuple[int, int], tuple[float, float]]]) -> float:
    """Return the side in mm of the smallest square that holds all slices, given as (H, W) and spacing in mm."""
    return max(max(_sides_mm(shape, spacing)) for shape, spacing in slices)


def structure_extent(mask: np.ndarray, spacing: tuple[float, float]) -> float:
    """Return the side in mm of the smallest square, centred on slices, that holds all structures; 0 if there are none.

    Args:
        mask: class indices [S, H, W].
        spacing: mm of rows and columns.
    """
    sides = [0.0]
    for axis, mm in zip((1, 2), spacing, strict=True):
        present = np.flatnonzero(mask.any(axis=(0, 3 - axis)))
        centre = mask.shape[axis] / 2
        if len(present):
            sides.append(2 * mm * float(max(centre - present[0], present[-1] + 1 - centre)))
    return max(sides)


def _sides_mm(shape: tuple[int, int], spacing: tuple[float, float]) -> list[float]:
    return [n * mm for n, mm in zip(shape, spacing, strict=True)]


def intensity_range(array: np.ndarray) -> tuple[float, float]:
    """Return the 0.5th and 99.5th percentiles (docs/paper1.md), or the extremes if these are equal."""
    low, high = np.percentile(array, (0.5, 99.5))
    if low == high:
        low, high = array.min(), array.max()
    return float(low), float(high)


def find_neighbours(index: int, count: int, spacing: float, neighbours: int) -> list[int]:
    """Return the indices of a slice and its neighbours on each side, from first to last.

    They are NEIGHBOUR_MM apart, or as close to that as slices with a spacing of `spacing` mm allow. Beyond the ends,
    the first and the last of `count` slices are repeated.
    """
    step = max(1, round(NEIGHBOUR_MM / spacing - ROUNDING_MARGIN))
    wanted = range(index - neighbours * step, index + neighbours * step + 1, step)
    return [min(max(i, 0), count - 1) for i in wanted]


def slice_to_input(
    slices: np.ndarray, index: int, spacing: float, intensity_range: tuple[float, float], frame: Frame, neighbours: int
) -> np.ndarray:
    """Return slice `index` of [S, H, W] and its neighbours as an input [size, size, 1 + 2 · neighbours]."""
    indices = find_neighbours(index, len(slices), spacing, neighbours)
    return np.concatenate([image_to_input(slices[i], intensity_range, frame) for i in indices], axis=-1)


def image_to_input(pixels: np.ndarray, intensity_range: tuple[float, float], frame: Frame) -> np.ndarray:
    """Convert a slice [H, W] in the scan's intensities to an input [size, size, 1], float32 in 0..1."""
    low, high = intensity_range
    grey = np.clip((pixels.astype(np.float32) - low) / (high - low), 0, 1)
    return _embed(_resize(grey, frame.height, frame.width), frame)[..., None]


def mask_to_input(classes: np.ndarray, frame: Frame) -> np.ndarray:
    """Convert class indices [H, W] to [size, size] uint8: each input pixel gets the class that covers most of it.

    Nearest-neighbour sampling would shift every structure by half a pixel when downsampling by two. Where two classes
    cover equal parts of a pixel, as along a border through its middle, pixels alternate between the first and the last.
    """
    if classes.shape == (frame.height, frame.width):
        return _embed(classes, frame)
    lowest, *higher = np.flatnonzero(np.bincount(classes.ravel())).astype(np.uint8)
    rows, columns = (_coverage(n, count) for n, count in zip(classes.shape, (frame.height, frame.width), strict=True))
    fractions = [(columns @ (rows @ np.float32(classes == k)).T).T for k in higher]
    result = np.full((frame.height, frame.width), lowest)
    largest = 1 - sum(fractions)
    margin = np.where(np.add(*np.indices(result.shape, sparse=True)) % 2, -TIE_MARGIN, TIE_MARGIN)
    for k, fraction in zip(higher, fractions, strict=True):
        result[fraction + margin > largest] = k
        largest = np.maximum(largest, fraction)
    return _embed(result, frame)


@lru_cache(maxsize=64)
def _coverage(n: int, count: int) -> csr_array:
    """Return [count, n] float32: the fraction of each of `count` equal intervals that lies in each of n pixels."""
    borders = np.arange(count + 1)[:, None] * (n / count)
    pixels = np.arange(n)
    lengths = np.minimum(borders[1:], pixels + 1) - np.maximum(borders[:-1], pixels)
    return csr_array(np.float32(np.maximum(lengths, 0) * (count / n)))


def input_to_slice(probabilities: np.ndarray, frame: Frame, shape: tuple[int, int]) -> np.ndarray:
    """Convert [size, size, K] float32 to [H, W, K] on the slice's own pixels; cropped pixels become background."""
    in_input, in_slice = _visible_part(frame)
    visible = probabilities[in_input]
    if frame.is_cropped:
        visible = np.zeros((frame.height, frame.width, probabilities.shape[-1]), np.float32)
        if visible.shape[-1] > 1:
            visible[..., 0] = 1
        visible[in_slice] = probabilities[in_input]
    return np.stack([_resize(visible[..., k], *shape) for k in range(visible.shape[-1])], axis=-1)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize bilinearly with half-pixel centres; when shrinking, Pillow widens the kernel against aliasing."""
    if pixels.shape == (height, width):
        return np.asarray(pixels)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BILINEAR))


def _embed(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    square = np.zeros((frame.size, frame.size), pixels.dtype)
    in_input, in_slice = _visible_part(frame)
    square[in_input] = pixels[in_slice]
    return square


def _visible_part(frame: Frame) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the rows and columns that a slice and the input have in common: in the input, and in the resized slice."""
    pairs = []
    for start, length in ((frame.top, frame.height), (frame.left, frame.width)):
        first, last = max(start, 0), min(start + length, frame.size)
        pairs.append((slice(first, last), slice(first - start, last - start)))
    rows, columns = pairs
    return (rows[0], columns[0]), (rows[1], columns[1])
