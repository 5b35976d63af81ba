"""Checks of affines that do not come from a NIfTI header: of arrays, ITK files and DICOM series."""

from pathlib import Path

import numpy as np

from jaxla.config import InputError
from jaxla.data.nifti_geometry import describe_fault

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # the axes of ITK and DICOM point left, posterior and superior


def affine_from_lps(path: Path, lps: np.ndarray) -> np.ndarray:
    """Convert an affine [4, 4] (voxel indices to mm) from LPS to RAS+, and check it as `check_affine` does."""
    return check_affine(path, LPS_TO_RAS @ lps)


def check_affine(path: Path, affine: np.ndarray) -> np.ndarray:
    """Return an affine [4, 4], voxel indices to mm (RAS+), rounded to float32.

    NIfTI stores affines in float32, so a scan has the same affine in every format.

    Raises:
        InputError: the affine cannot be used. The error names `path`.
    """
    with np.errstate(all="ignore"):
        affine = affine.astype(np.float32).astype(np.float64) + 0.0  # + 0.0 turns -0 into 0
    if fault := describe_fault(affine):
        fix = "Export the scan again, or resample it onto a rectangular grid."
        raise InputError(path, f"its affine {fault}", fix)
    return affine
