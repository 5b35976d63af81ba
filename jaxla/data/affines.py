"""Affines of the formats whose axes point left, posterior and superior (LPS): ITK's files and DICOM."""

from pathlib import Path

import nibabel as nib
import numpy as np

from jaxla.config import InputError
from jaxla.data.nifti_geometry import MAX_SKEW

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine_from_lps(path: Path, lps: np.ndarray) -> np.ndarray:
    """Return the affine [4, 4] in RAS+ of an affine in LPS, both from voxel indices to mm.

    It is rounded to float32, as NIfTI stores it, so that a scan has the same affine in every format.

    Raises:
        InputError: the axes of the scan `path` cannot be used.
    """
    with np.errstate(all="ignore"):
        affine = (LPS_TO_RAS @ lps).astype(np.float32).astype(np.float64) + 0.0  # + 0.0 turns -0 into 0
        axes = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    if not np.isfinite([*affine.flat, *axes.flat]).all() or abs(np.linalg.det(axes)) < 1e-3:
        raise InputError(path, "two of its axes are parallel, or one has no length", "Export the file again.")
    if (skew := np.abs(axes.T @ axes - np.eye(3)).max()) > MAX_SKEW:
        problem = f"sheared: two axes are {np.degrees(np.arcsin(skew)):.1f}° off a right angle"
        raise InputError(path, problem, "Resample the scan onto a rectangular grid.")
    return affine
