"""Tiny scans, on which a training step takes milliseconds."""

import nibabel as nib
import numpy as np

from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases


def disc_scans(folder):
    """Write and prepare scans of 5, 6 and 7 slices of 32 × 32 with a bright disc on noise; the last mask is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:32, :32]
    for i, slices in enumerate((5, 6, 7)):
        disc = ((row - 12 - 3 * i) ** 2 + (column - 18) ** 2 < 64)[..., None] & np.ones(slices, bool)
        image = (100 * rng.random(disc.shape) + 80 * disc).astype(np.float32)
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        nib.save(nib.Nifti1Image(image, affine), folder / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(np.uint8(disc if i < 2 else 0 * disc), affine), folder / f"case{i}_mask.nii.gz")
    return prepare_scans(folder)


def prepare_scans(folder):
    """Prepare the scans of a folder, with the cache inside it."""
    return prepare_cases(find_cases(folder), folder / "cache")
