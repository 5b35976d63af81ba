"""From the classes predicted for a slice to its mask: binary opening, then closing."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from jaxla.config import Postprocessing


def postprocess(classes: np.ndarray, postprocessing: Postprocessing) -> np.ndarray:
    """Classes [S, H, W] uint8 -> the same, each class opened and closed in every slice.

    What opening takes from a class becomes background; closing fills background alone, of several classes the first
    that claims a pixel. What lies outside the slice is neither in nor out: a structure at its border stays as it is.
    """
    if not postprocessing.opening and not postprocessing.closing:
        return classes
    opened = np.zeros_like(classes)
    present = [k for k in np.unique(classes) if k]
    for k in present:
        opened[_open(classes == k, postprocessing.opening)] = k
    closed = opened.copy()
    for k in present:
        closed[_close(opened == k, postprocessing.closing) & (closed == 0)] = k
    return closed


def _open(mask: np.ndarray, side: int) -> np.ndarray:
    return ndimage.binary_dilation(_erode(mask, side), _square(side)) if side else mask


def _close(mask: np.ndarray, side: int) -> np.ndarray:
    return _erode(ndimage.binary_dilation(mask, _square(side)), side) if side else mask


def _erode(mask: np.ndarray, side: int) -> np.ndarray:
    return ndimage.binary_erosion(mask, _square(side), border_value=1)


def _square(side: int) -> np.ndarray:
    return np.ones((1, side, side), bool)
