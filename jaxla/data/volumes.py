"""Scans and masks in files <-> checked volumes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from jaxla.cli.files import atomic_file, report_os_errors
from jaxla.config import InputError
from jaxla.data.formats import FORMATS, read_scan, read_scan_grid, write_scan

MAX_LABEL = 65535


@dataclass(frozen=True)
class Volume:
    """A 3D array as stored in a file, with its affine and header."""

    path: Path
    array: np.ndarray  # [X, Y, Z] in the file's own axes; float32 or an integer type
    affine: np.ndarray  # [4, 4], voxel indices to mm (RAS+)
    header: nib.Nifti1Header

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the array's own axes."""
        return tuple(float(s) for s in nib.affines.voxel_sizes(self.affine))


class Grid(NamedTuple):
    """Where a scan's voxels lie: its affine [4, 4], voxel indices to mm (RAS+), and its NIfTI header."""

    affine: np.ndarray
    header: nib.Nifti1Header


def read_grid(path: str | Path) -> Grid:
    """Read a scan's affine and header, without its voxels.

    Raises:
        InputError: the file is missing or damaged.
    """
    return Grid(*read_scan_grid(Path(path)))


def read_image(path: str | Path) -> Volume:
    """Read an image and check that it is 3D, finite and not constant, and has a usable grid.

    Raises:
        InputError: the file is missing, truncated, not a NIfTI file, or fails a check.
    """
    volume = _read(Path(path))
    if volume.array.min() == volume.array.max():
        raise InputError(path, f"every voxel is {volume.array.flat[0]}", "Export it again, or leave the case out.")
    return volume


def read_mask(path: str | Path) -> Volume:
    """Read a mask, as int32, and check that it is 3D, holds label values and has a usable grid.

    Raises:
        InputError: the file is missing, truncated, not a NIfTI file, or fails a check.
    """
    volume = _read(Path(path))
    values = volume.array
    if values.min() < 0 or values.max() > MAX_LABEL or (values.dtype.kind == "f" and (values % 1).any()):
        raise InputError(path, "holds values that are not labels", f"Use whole numbers from 0 to {MAX_LABEL}.")
    return Volume(volume.path, values.astype(np.int32), volume.affine, volume.header)


def same_grid(a: Volume, b: Volume) -> bool:
    """Return whether two volumes have the same shape and all corners within a tenth of a voxel of each other."""
    if a.array.shape != b.array.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in a.array.shape], indexing="ij")).reshape(3, -1)
    corners = np.vstack([corners, np.ones(8)])
    return bool(np.abs((a.affine - b.affine) @ corners).max() <= 0.1 * min(a.spacing))


def require_same_grid(mask: Volume, image: Volume) -> None:
    """Raise an InputError unless `mask` lies on the grid of `image`."""
    if same_grid(mask, image):
        return
    difference = "same shape, different affine"
    if mask.array.shape != image.array.shape:
        difference = f"shape {mask.array.shape} instead of {image.array.shape}"
    problem = f"not on the grid of {image.path} ({difference})"
    raise InputError(mask.path, problem, "Resample the mask onto the grid of the image.")


def write_volume(path: Path, array: np.ndarray, like: Volume | Grid) -> None:
    """Write `array` [X, Y, Z] or [X, Y, Z, K] on the grid of `like`, read it back, and only then give it its name.

    Raises:
        InputError: the folder cannot be written.
    """
    with report_os_errors("written", path, "Use another output folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            write_scan(temporary, array, like.affine, like.header)


def hash_voxels(array: np.ndarray) -> str:
    """Return the sha256 of a scan's shape and voxels, which two files of the same scan have in common."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _read(path: Path) -> Volume:
    if not path.exists():
        raise InputError(path, "no such file", f"Name an existing scan ({FORMATS}).")
    array, affine, header = read_scan(path)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            array = array.astype(np.float32, copy=False)
        if bad := int(array.size - np.isfinite(array).sum()):
            raise InputError(path, f"{bad} of {array.size} voxels are NaN or infinite", "Export the file again.")
    elif array.dtype.kind not in "iu":
        raise InputError(path, f"voxels of type {array.dtype} are not grey values", "Export a scalar image.")
    return Volume(path, array, affine, header)
