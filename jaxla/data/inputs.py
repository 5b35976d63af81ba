"""A slice in its own pixels <-> the network's square input.

A slice is scaled to fit the square with its aspect in millimetres kept, and centred; a square slice of square pixels,
as in LAScarQS, fills it. Grey values run from 0 to 1 over the volume's own percentiles; what surrounds the slice is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Frame:
    """Where a slice lies in the input: `height` × `width` input pixels from row `top` and column `left`."""

    size: int
    top: int
    left: int
    height: int
    width: int


def frame(shape: tuple[int, int], spacing: tuple[float, float], size: int) -> Frame:
    """The frame of slices of H × W pixels of `spacing` mm in an input of `size` × `size` pixels."""
    extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    height, width = (max(1, round(size * e / max(extent))) for e in extent)
    return Frame(size, (size - height) // 2, (size - width) // 2, height, width)


def image_to_input(pixels: np.ndarray, intensity_range: tuple[float, float], place: Frame) -> np.ndarray:
    """[H, W] in the scan's intensities -> [size, size, 1] float32 in 0..1."""
    low, high = intensity_range
    grey = np.clip((pixels.astype(np.float32) - low) / (high - low), 0, 1)
    return _embed(_resize(grey, place.height, place.width, Image.Resampling.BILINEAR), place)[..., None]


def mask_to_input(classes: np.ndarray, place: Frame) -> np.ndarray:
    """[H, W] class indices -> [size, size] uint8, each input pixel taking its nearest."""
    return _embed(_resize(classes, place.height, place.width, Image.Resampling.NEAREST), place)


def input_to_slice(probabilities: np.ndarray, place: Frame, shape: tuple[int, int]) -> np.ndarray:
    """[size, size, K] float32 -> [H, W, K] on the slice's own pixels."""
    cut = probabilities[place.top : place.top + place.height, place.left : place.left + place.width]
    channels = [_resize(cut[..., k], *shape, Image.Resampling.BILINEAR) for k in range(cut.shape[-1])]
    return np.stack(channels, axis=-1)


def _resize(pixels: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    """Pillow's resizing: half-pixel centres, and a kernel that widens where it shrinks (no aliasing)."""
    if pixels.shape == (height, width):
        return np.asarray(pixels)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), how))


def _embed(pixels: np.ndarray, place: Frame) -> np.ndarray:
    square = np.zeros((place.size, place.size), pixels.dtype)
    square[place.top : place.top + place.height, place.left : place.left + place.width] = pixels
    return square
