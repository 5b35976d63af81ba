"""Postprocessing of predicted classes: binary opening and closing of slices."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from jaxla.config import Postprocessing


def postprocess(classes: np.ndarray, postprocessing: Postprocessing) -> np.ndarray:
    """Return classes [S, H, W] uint8 after binary opening, then closing, of each class in each slice.

    Pixels that opening removes become background. Closing fills only background; the lower class wins a pixel that
    several classes fill. The border of a slice does not erode a structure that it cuts.
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
    if not side:
        return mask
    eroded = ndimage.binary_erosion(mask, _square(side), border_value=1)  # the structure may continue outside the slice
    return ndimage.binary_dilation(eroded, _square(side))


def _close(mask: np.ndarray, side: int) -> np.ndarray:
    if not side:
        return mask
    padded = np.pad(mask, ((0, 0), (side, side), (side, side)))  # room for the dilation beyond the slice
    return ndimage.binary_closing(padded, _square(side))[:, side:-side, side:-side]


def _square(side: int) -> np.ndarray:
    return np.ones((1, side, side), bool)
