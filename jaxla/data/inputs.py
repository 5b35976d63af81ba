"""A slice in its own pixels <-> the network's square input.

A slice is padded to a square of so many millimetres, and that is resized to the input, so that its aspect is kept. Grey
values run from 0 to 1 over the volume's own percentiles; what surrounds the slice is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy.sparse import csr_array

EVEN = np.float32(1e-5)  # shares of a pixel that differ by less do so by rounding


@dataclass(frozen=True)
class Frame:
    """Where a slice lies in the input: `height` × `width` input pixels from row `top` and column `left`.

    Of a slice that is larger than the input, `top` or `left` is negative, and its centre is cut out.
    """

    size: int
    top: int
    left: int
    height: int
    width: int

    @property
    def cuts(self) -> bool:
        return max(self.height, self.width) > self.size


@dataclass(frozen=True)
class Canvas:
    """The square that slices are laid on before it is resized to the network's input.

    Attributes:
        size: of the input, pixels a side.
        extent: of the square, mm a side; 0 where each slice has the smallest that holds it.
    """

    size: int
    extent: float = 0.0

    def frame(self, shape: tuple[int, int], spacing: tuple[float, float]) -> Frame:
        """The frame of slices of H × W pixels of `spacing` mm."""
        sides = _sides(shape, spacing)
        height, width = (max(1, round(self.size * side / (self.extent or max(sides)))) for side in sides)
        return Frame(self.size, (self.size - height) // 2, (self.size - width) // 2, height, width)


def smallest_extent(slices: Iterable[tuple[tuple[int, int], tuple[float, float]]]) -> float:
    """The side in mm of the smallest square that holds each of the slices: their H and W, and spacing in mm."""
    return max(max(_sides(shape, spacing)) for shape, spacing in slices)


def _sides(shape: tuple[int, int], spacing: tuple[float, float]) -> list[float]:
    return [n * mm for n, mm in zip(shape, spacing, strict=True)]


def intensity_range(array: np.ndarray) -> tuple[float, float]:
    """The 0.5 and 99.5 percentile (docs/paper1.md); the extremes where these coincide."""
    low, high = np.percentile(array, (0.5, 99.5))
    if low == high:
        low, high = array.min(), array.max()
    return float(low), float(high)


def image_to_input(pixels: np.ndarray, intensity_range: tuple[float, float], frame: Frame) -> np.ndarray:
    """[H, W] in the scan's intensities -> [size, size, 1] float32 in 0..1."""
    low, high = intensity_range
    grey = np.clip((pixels.astype(np.float32) - low) / (high - low), 0, 1)
    return _embed(_resize(grey, frame.height, frame.width), frame)[..., None]


def mask_to_input(classes: np.ndarray, frame: Frame) -> np.ndarray:
    """[H, W] class indices -> [size, size] uint8, for each input pixel the class that covers most of it.

    Taking the nearest pixel would move every structure by half a pixel where two pixels become one. There, where a
    border runs through the middle of an input pixel, two classes are even: pixels then take the first and the last of
    them in turn.
    """
    if classes.shape == (frame.height, frame.width):
        return _embed(classes, frame)
    lowest, *others = np.flatnonzero(np.bincount(classes.ravel())).astype(np.uint8)
    rows, columns = (_overlaps(n, count) for n, count in zip(classes.shape, (frame.height, frame.width), strict=True))
    shares = [(columns @ (rows @ np.float32(classes == k)).T).T for k in others]
    result, most = np.full((frame.height, frame.width), lowest), 1 - sum(shares)
    turn = np.where(np.add(*np.indices(result.shape, sparse=True)) % 2, -EVEN, EVEN)
    for k, share in zip(others, shares, strict=True):
        result[share + turn > most] = k
        most = np.maximum(most, share)
    return _embed(result, frame)


@lru_cache(maxsize=64)
def _overlaps(n: int, count: int) -> csr_array:
    """[count, n] float32: of each of `count` equal intervals, the share that lies in each of n pixels."""
    borders, pixels = np.arange(count + 1)[:, None] * (n / count), np.arange(n)
    lengths = np.minimum(borders[1:], pixels + 1) - np.maximum(borders[:-1], pixels)
    return csr_array(np.float32(np.maximum(lengths, 0) * (count / n)))


def input_to_slice(probabilities: np.ndarray, frame: Frame, shape: tuple[int, int]) -> np.ndarray:
    """[size, size, K] float32 -> [H, W, K] on the slice's own pixels; what the input did not show is background."""
    in_input, in_slice = _shared_part(frame)
    shown = probabilities[in_input]
    if frame.cuts:
        shown = np.zeros((frame.height, frame.width, probabilities.shape[-1]), np.float32)
        if shown.shape[-1] > 1:
            shown[..., 0] = 1
        shown[in_slice] = probabilities[in_input]
    channels = [_resize(shown[..., k], *shape) for k in range(shown.shape[-1])]
    return np.stack(channels, axis=-1)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear resizing: half-pixel centres, and a kernel that widens where it shrinks (no aliasing)."""
    if pixels.shape == (height, width):
        return np.asarray(pixels)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BILINEAR))


def _embed(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    square = np.zeros((frame.size, frame.size), pixels.dtype)
    in_input, in_slice = _shared_part(frame)
    square[in_input] = pixels[in_slice]
    return square


def _shared_part(frame: Frame) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """What input and slice share: as rows and columns of the input, and of the slice at the input's resolution."""
    pairs = []
    for start, length in ((frame.top, frame.height), (frame.left, frame.width)):
        first, last = max(start, 0), min(start + length, frame.size)
        pairs.append((slice(first, last), slice(first - start, last - start)))
    rows, columns = pairs
    return (rows[0], columns[0]), (rows[1], columns[1])
