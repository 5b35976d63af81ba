"""The axes of a plan: head to foot, anterior to posterior, left-right, in the order in which the plan takes them.

nnU-Net takes a file's own axes, so that two scans of one patient, stored differently, are different images to it. Here
axes are anatomical, whatever the files' orientation is; of files stored as most scanners do it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxla.data.volumes import AXES, slice_row_column_axes

ANATOMICAL = (2, 1, 0)  # of the canonical axes


def planned_order(slice_axis: str, transpose_forward: Sequence[int] = (0, 1, 2)) -> tuple[int, int, int]:
    """Which axis of slices [S, H, W] comes first, second and third.

    Args:
        slice_axis: anatomical name of S.
    """
    of_slices = slice_row_column_axes(AXES.index(slice_axis))
    return tuple(of_slices.index(ANATOMICAL[axis]) for axis in transpose_forward)


def to_plan_axes(slices: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """[S, H, W] -> the axes of a plan (a view)."""
    return slices.transpose(order)


def from_plan_axes(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The inverse of `to_planned` (a view); further axes stay behind."""
    return array.transpose(*np.argsort(order), *range(3, array.ndim))
