"""Scans and masks, read from files or arrays with checks, and written back."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from jaxla.cli.files import atomic_file, report_os_errors
from jaxla.config import InputError
from jaxla.data.affines import check_affine
from jaxla.data.formats import FORMATS, is_special, make_grid, read_scan, read_scan_grid, write_scan
from jaxla.data.labels import MAX_VALUE
from jaxla.data.nifti_geometry import Grid, find_grid

MAX_LABEL_ROUNDING = 1e-3  # largest rounding error of labels that are stored with a scale factor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Volume:
    """A 3D array as stored in a file, with its affine and header."""

    path: Path
    array: np.ndarray  # [X, Y, Z] in the file's own axes; float32 or an integer type
    affine: np.ndarray  # [4, 4], voxel indices to mm (RAS+)
    header: nib.Nifti1Header  # with the file's own unit
    warnings: tuple[str, ...] = ()  # unusual entries of the header, which the user should check

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the array's own axes."""
        return tuple(float(s) for s in nib.affines.voxel_sizes(self.affine))


def read_grid(path: str | Path) -> Grid:
    """Read a scan's grid, without its voxels.

    Raises:
        InputError: the file is missing or damaged, or has no usable grid.
    """
    return read_scan_grid(Path(path))


def read_image(path: str | Path) -> Volume:
    """Read an image and check that it is 3D, finite and not constant, and has a usable grid.

    Raises:
        InputError: the file is missing or damaged, or fails a check.
    """
    return _require_contrast(_read(Path(path)))


def image_from_array(array: np.ndarray, affine: np.ndarray) -> Volume:
    """Return an image from an array in memory, checked like a file.

    Args:
        array: [X, Y, Z].
        affine: [4, 4], voxel indices to mm (RAS+).

    Raises:
        InputError: the array or the affine fails a check of `read_image`. The error names `image`.
    """
    where = Path("image")
    _require_3d(where, array.shape)
    if affine.shape != (4, 4):
        raise InputError("affine", f"has shape {affine.shape}", "Pass a 4 × 4 matrix, voxel indices to mm (RAS+).")
    grid = make_grid(where, check_affine(where, affine), (), array.shape)
    return _require_contrast(Volume(where, _check_voxels(where, array), *grid))


def image_from_nibabel(image: nib.Nifti1Image) -> Volume:
    """Return an image from a nibabel image in memory, checked like a file; its header is read by the same rules.

    Raises:
        InputError: the image fails a check of `read_image`. The error names `image`.
    """
    where = Path(image.get_filename() or "image")
    _require_3d(where, image.shape)
    array = _check_voxels(where, np.asarray(image.dataobj))
    return _require_contrast(Volume(where, array, *find_grid(where, image.header, image.shape)))


def read_mask(path: str | Path) -> Volume:
    """Read a mask, as int32, and check that it is 3D, holds label values and has a usable grid.

    Values within 0.001 of an integer, as scaling in the header produces, are rounded to it.

    Raises:
        InputError: the file is missing or damaged, or fails a check.
    """
    volume = _read(Path(path))
    values = volume.array
    labels = np.rint(values) if values.dtype.kind == "f" else values
    is_label = (labels >= 0) & (labels <= MAX_VALUE)
    if labels is not values:
        is_label &= np.abs(values - labels) <= MAX_LABEL_ROUNDING
    if not is_label.all():
        problem = f"holds the value {values[~is_label][0]:.6g}, which is not a label"
        raise InputError(path, problem, f"Use whole numbers from 0 to {MAX_VALUE}.")
    return replace(volume, array=labels.astype(np.int32))


def log_warnings(path: Path, warnings: Iterable[str]) -> None:
    """Log the unusual entries of a file's header."""
    for warning in warnings:
        log.warning("%s: %s", path, warning)


def same_grid(a: Volume, b: Volume) -> bool:
    """Return whether two volumes have the same shape, and corners that differ by at most 0.1 voxels."""
    if a.array.shape != b.array.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in a.array.shape], indexing="ij")).reshape(3, -1)
    corners = np.vstack([corners, np.ones(8)])
    return bool(np.abs((a.affine - b.affine) @ corners).max() <= 0.1 * min(a.spacing))


def require_same_grid(mask: Volume, image: Volume) -> None:
    """Raise an InputError unless `mask` lies on the grid of `image`."""
    if same_grid(mask, image):
        return
    if mask.array.shape != image.array.shape:
        difference = f"shape {mask.array.shape} instead of {image.array.shape}"
        fix = "Export the mask on the grid of the image, or resample it with nearest-neighbour interpolation."
    else:
        affines = " instead of ".join(_format_affine(volume.affine) for volume in (mask, image))
        difference = f"same shape, different affine: {affines}"
        fix = (
            "If the two fit voxel by voxel, one header is wrong: save that file's voxels with the header of the other "
            "as a new file; resampling would destroy the labels. Otherwise export the mask on the grid of the image."
        )
    raise InputError(mask.path, f"not on the grid of {image.path} ({difference})", fix)


def _format_affine(affine: np.ndarray) -> str:
    """Return the first three rows in mm: `[-0.75 0 0 6; 0 -0.75 0 5; 0 0 2.5 -4]`."""
    return "[" + "; ".join(" ".join(f"{value + 0:.5g}" for value in row) for row in affine[:3]) + "]"


def write_volume(path: Path, array: np.ndarray, like: Volume | Grid) -> None:
    """Write `array` [X, Y, Z] or [X, Y, Z, K] on the grid of `like`.

    The file gets its name only after it has been read back.

    Raises:
        InputError: the folder cannot be written.
    """
    with report_os_errors("written", path, "Use another output folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            write_scan(temporary, array, like.affine, like.header)


def hash_voxels(array: np.ndarray) -> str:
    """Return the sha256 of a scan's shape and voxels, which is the same for two files of the same scan."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _read(path: Path) -> Volume:
    with report_os_errors("read", path, "Check the permissions of its folder."):
        if not path.exists():
            problem = "a link to a missing file" if path.is_symlink() else "no such file"
            raise InputError(path, problem, f"Pass an existing scan ({FORMATS}).")
        if is_special(path):
            raise InputError(path, "neither a file nor a folder", f"Pass an existing scan ({FORMATS}).")
    array, grid = read_scan(path)
    return Volume(path, _check_voxels(path, array), *grid)


def _require_3d(where: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or 0 in shape:
        raise InputError(where, f"has shape {shape}", "Pass one 3D volume [X, Y, Z].")


def _require_contrast(volume: Volume) -> Volume:
    if volume.array.min() == volume.array.max():
        fix = "Export it again, or leave the case out."
        raise InputError(volume.path, f"every voxel is {volume.array.flat[0]}", fix)
    return volume


def _check_voxels(where: Path, array: np.ndarray) -> np.ndarray:
    """Return an array as float32 or its own integer type; raise an InputError unless it holds grey values."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            array = array.astype(np.float32, copy=False)
        if bad := int(array.size - np.isfinite(array).sum()):
            raise InputError(where, f"{bad} of {array.size} voxels are NaN or infinite", "Export the file again.")
    elif array.dtype.kind not in "iu":
        raise InputError(where, f"voxels of type {array.dtype} are not grey values", "Export a scalar image.")
    return array
