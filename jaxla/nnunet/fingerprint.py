"""What nnU-Net plans from: of each scan its spacing, and its shape once the zeros around it are cut away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import ndimage

from jaxla.data.prepared import PreparedVolume
from jaxla.nnunet.axes import planned_order, to_plan_axes
from jaxla.nnunet.plan import Fingerprint

Box = tuple[slice, ...]


def fingerprint(
    volumes: Sequence[PreparedVolume],
    track: Callable[[Iterable[PreparedVolume]], Iterable[PreparedVolume]] = iter,
) -> Fingerprint:
    """Of the scans of a data set, one at a time in memory.

    Args:
        track: wraps the iteration over volumes, for a progress bar.
    """
    spacings, shapes, shares = [], [], []
    for volume in track(volumes):
        order = planned_order(volume.slice_axis)
        box = nonzero_box(to_plan_axes(volume.image, order))
        shapes.append(tuple(side.stop - side.start for side in box))
        spacings.append(tuple(volume.spacing[axis] for axis in order))
        shares.append(math.prod(shapes[-1]) / math.prod(volume.shape))
    return Fingerprint(tuple(spacings), tuple(shapes), float(np.median(shares)))


def nonzero_box(image: np.ndarray) -> Box:
    """The smallest box that holds all of an image that is not zero."""
    occupied = image != 0
    sides = []
    for axis in range(image.ndim):
        along = np.flatnonzero(occupied.any(axis=tuple(other for other in range(image.ndim) if other != axis)))
        sides.append(slice(int(along[0]), int(along[-1]) + 1))
    return tuple(sides)


def nonzero_mask(image: np.ndarray) -> np.ndarray:
    """What of an image is not zero, holes within it filled."""
    return ndimage.binary_fill_holes(image != 0)
