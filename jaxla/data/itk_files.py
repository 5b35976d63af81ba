"""Arrays and affines of NRRD and MetaImage files, read and written by SimpleITK."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from jaxla.cli.terminal import shorten
from jaxla.config import InputError
from jaxla.data.affines import LPS_TO_RAS, affine_from_lps
from jaxla.data.itk_headers import EXPORT_AGAIN, check_header

if TYPE_CHECKING:
    import SimpleITK as sitk


def read_itk_grid(path: Path) -> tuple[np.ndarray, tuple[str, ...], tuple[int, int, int]]:
    """Read a file's affine [4, 4] (voxel indices to mm, RAS+), warnings about its header, and its shape (X, Y, Z).

    Raises:
        InputError: SimpleITK is not installed, or the file is damaged or holds no 3D scalar image.
    """
    reader, warnings = _open(path)
    return _read_affine(path, reader), warnings, reader.GetSize()


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read a file's array [X, Y, Z], of the stored type, and its affine and warnings as `read_itk_grid` returns them.

    Raises:
        InputError: as `read_itk_grid`.
    """
    reader, warnings = _open(path)
    affine = _read_affine(path, reader)  # before the voxels: ITK refuses some affines without giving a reason
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _damaged(path, error) from error
    return import_itk(path).GetArrayFromImage(image).T, affine, warnings


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write `array` [X, Y, Z], or [X, Y, Z, K] with K values per voxel, compressed; read it back to check."""
    sitk = import_itk(path)
    axes = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(axes[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.moveaxis(array, (0, 1, 2), (2, 1, 0)), isVector=array.ndim == 4)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(axes[:3, 3].tolist())
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
        written = sitk.ReadImage(str(path))
    except RuntimeError as error:  # ITK gives no reason for a full disk
        raise OSError(errno.EIO, os.strerror(errno.EIO), path) from error
    same_voxels = np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image))
    if not (same_voxels and np.array_equal(_read_affine(path, written), affine_from_lps(path, axes))):
        raise AssertionError(f"{path}: the file differs from the array that was written to it")


def import_itk(path: Path) -> ModuleType:
    """Import SimpleITK and turn off its warnings.

    Raises:
        InputError: it is not installed.
    """
    try:
        import SimpleITK as sitk
    except ImportError as error:
        problem = f"{path.suffix} files need the package SimpleITK"
        raise InputError(path, problem, "Run: pip install SimpleITK") from error
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


def _open(path: Path) -> tuple[sitk.ImageFileReader, tuple[str, ...]]:
    """Check a file's header and return a reader that has read it, and warnings."""
    sitk = import_itk(path)
    warnings = check_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(path, error) from error
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise InputError(path, "holds several values per voxel", "Export a scalar image.")
    return reader, warnings


def _read_affine(path: Path, image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    lps, directions = np.eye(4), np.reshape(image.GetDirection(), (3, 3))
    with np.errstate(all="ignore"):  # an axis of length 0 is refused below
        lps[:3, :3] = directions / np.linalg.norm(directions, axis=0) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return affine_from_lps(path, lps)


def _damaged(path: Path, error: RuntimeError) -> InputError:
    """Return an error with the last line of ITK's error, which has the reason; the others name ITK's source files."""
    reason = shorten(str(error).strip().splitlines()[-1].strip().rpartition(": ")[2], length=200)
    return InputError(path, f"truncated or damaged ({reason})", EXPORT_AGAIN)
