"""Stored arrays <-> stacks of slices.

Slices follow one convention whatever the file's orientation. The canonical axes run right to left, anterior to
posterior and superior to inferior. The slice axis comes first; of the other two, the later one gives the rows. An
axial slice is thus shown in the radiological convention: the patient's right on the left, anterior on top.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

AXES = ("left-right", "anterior-posterior", "head-foot")  # names of the canonical axes
HEAD_FOOT = 2


@dataclass(frozen=True)
class SliceGeometry:
    """The conversion between a stored array [X, Y, Z] and slices [S, H, W]."""

    order: tuple[int, int, int]  # the stored axes that become the slice, row and column axes
    flip: tuple[int, ...]  # the new axes that run against their stored axis
    spacing: tuple[float, float, float]  # mm along slices, rows and columns
    axis: str  # anatomical name of the slice axis


def slice_geometry(affine: np.ndarray) -> SliceGeometry:
    """Return the slices of a grid with this affine [4, 4], along its coarsest spacing; ties go to head-foot."""
    orientation = nib.orientations.io_orientation(affine)
    stored_axis = np.argsort(orientation[:, 0])  # by canonical axis
    spacing = nib.affines.voxel_sizes(affine)[stored_axis]
    coarsest = np.flatnonzero(spacing >= spacing.max() * (1 - 1e-3))
    slice_axis = int(coarsest[0]) if len(coarsest) == 1 else HEAD_FOOT
    canonical = slice_row_column_axes(slice_axis)
    order = tuple(int(stored_axis[axis]) for axis in canonical)
    return SliceGeometry(
        order=order,
        flip=tuple(i for i, stored in enumerate(order) if orientation[stored, 1] > 0),
        spacing=tuple(float(spacing[axis]) for axis in canonical),
        axis=AXES[slice_axis],
    )


def to_slices(array: np.ndarray, geometry: SliceGeometry) -> np.ndarray:
    """Return a stored array [X, Y, Z] as slices [S, H, W], a view."""
    return np.flip(array.transpose(geometry.order), geometry.flip)


def from_slices(slices: np.ndarray, geometry: SliceGeometry) -> np.ndarray:
    """Return slices [S, H, W, …] as a stored array [X, Y, Z, …], a view."""
    trailing = tuple(range(3, slices.ndim))
    return np.flip(slices, geometry.flip).transpose(*np.argsort(geometry.order), *trailing)


def slices_to_canonical(slices: np.ndarray, slice_axis: str) -> np.ndarray:
    """Return slices [S, H, W], cut along `slice_axis`, transposed to the order of `AXES`."""
    return slices.transpose(np.argsort(slice_row_column_axes(AXES.index(slice_axis))))


def canonical_to_slices(array: np.ndarray, slice_axis: str) -> np.ndarray:
    """Invert `slices_to_canonical`."""
    return array.transpose(slice_row_column_axes(AXES.index(slice_axis)))


def slice_row_column_axes(slice_axis: int) -> tuple[int, int, int]:
    """Return the canonical axes of slices, rows and columns."""
    columns, rows = (axis for axis in range(3) if axis != slice_axis)
    return slice_axis, rows, columns
