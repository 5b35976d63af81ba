"""From predicted classes to a mask: binary opening and closing of slices."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from jaxla.config import Postprocessing


def postprocess(classes: np.ndarray, postprocessing: Postprocessing) -> np.ndarray:
    """Classes [S, H, W] uint8 -> the same, each class opened and closed in every slice.

    What opening takes from a class becomes background; closing fills background alone, of several classes the first
    that claims a pixel. Neither takes away from a structure because the slice's border cuts it.
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
    eroded = ndimage.binary_erosion(mask, _square(side), border_value=1)  # it may go on outside the slice
    return ndimage.binary_dilation(eroded, _square(side))


def _close(mask: np.ndarray, side: int) -> np.ndarray:
    if not side:
        return mask
    room = np.pad(mask, ((0, 0), (side, side), (side, side)))  # for what the dilation puts outside the slice
    return ndimage.binary_closing(room, _square(side))[:, side:-side, side:-side]


def _square(side: int) -> np.ndarray:
    return np.ones((1, side, side), bool)
