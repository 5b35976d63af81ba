"""The formats of scans: file extensions, what counts as one scan on disk, and which module reads and writes each."""

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np

from jaxla.cli.files import file_sha256
from jaxla.data.dicom import is_dicom_series, is_segmentation, read_dicom, read_dicom_grid, slice_files
from jaxla.data.dicom_seg import read_segmentation
from jaxla.data.itk_files import read_itk, read_itk_grid, write_itk
from jaxla.data.itk_headers import locate_voxels
from jaxla.data.nifti import read_nifti, read_nifti_grid, write_nifti
from jaxla.data.nifti_geometry import Grid, find_grid

NIFTI_EXTENSIONS = (".nii.gz", ".nii")
ITK_EXTENSIONS = (".nrrd", ".nhdr", ".mha", ".mhd")  # the header may name a second file with the voxels
SEG_EXTENSION = ".dcm"  # a DICOM segmentation; a DICOM scan is the folder of its slices
EXTENSIONS = (*NIFTI_EXTENSIONS, *ITK_EXTENSIONS)
FORMATS = ".nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, or a folder with one DICOM series"  # for messages


def scan_extension(name: str) -> str:
    """Return the extension of a scan's file name as it is written, such as `.nii.gz` or `.NRRD`; empty if none."""
    lower = name.lower()
    return next((name[-len(known) :] for known in (*EXTENSIONS, SEG_EXTENSION) if lower.endswith(known)), "")


def strip_extension(name: str) -> str:
    """Return the name of a scan's file or DICOM folder without the extension of its format."""
    return name.removesuffix(scan_extension(name))


def is_scan(path: Path) -> bool:
    """Return whether a path is one scan or mask: a file with a known extension, or a folder that holds DICOM slices.

    The extension decides for all files except `.dcm`, so a damaged file or a dangling link counts. A file `.dcm` counts
    only if it is a DICOM segmentation; a single slice is part of its folder. Hidden files and named pipes do not count.
    """
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return is_dicom_series(path)
    extension = scan_extension(path.name).lower()
    return is_segmentation(path) if extension == SEG_EXTENSION else bool(extension) and not is_special(path)


def is_special(path: Path) -> bool:
    """Return whether a path is neither a file nor a folder, such as a named pipe, on which reading may never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def scan_files(path: Path) -> list[Path]:
    """Return all files of a scan: one file, the slices of a DICOM series, or a header and the file with its voxels."""
    if path.is_dir():
        return slice_files(path)[0]
    if path.suffix.lower() in ITK_EXTENSIONS and (voxels := locate_voxels(path).path) != path:
        return [path, voxels]
    return [path]


def scan_sha256(path: Path) -> str:
    """Return the sha256 of a scan's file, or for several files the sha256 of their sorted hashes."""
    hashes = sorted(map(file_sha256, scan_files(path)))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def read_scan(path: Path) -> tuple[np.ndarray, Grid]:
    """Read a scan's array [X, Y, Z], of the stored type or scaled to float, with its grid.

    Raises:
        InputError: the scan is damaged, not 3D or has no usable grid, or its format needs a package that is missing.
    """
    if path.is_dir():
        array, affine, warnings = read_dicom(path)
    elif path.suffix.lower() in ITK_EXTENSIONS:
        array, affine, warnings = read_itk(path)
    elif path.suffix.lower() == SEG_EXTENSION:
        array, affine, warnings = *read_segmentation(path), ()
    else:
        return read_nifti(path)
    return array, make_grid(path, affine, warnings, array.shape)


def read_scan_grid(path: Path) -> Grid:
    """Read a scan's grid, without its voxels.

    Raises:
        InputError: as `read_scan`.
    """
    if path.is_dir():
        return make_grid(path, *read_dicom_grid(path))
    if path.suffix.lower() in ITK_EXTENSIONS:
        return make_grid(path, *read_itk_grid(path))
    if path.suffix.lower() == SEG_EXTENSION:
        array, affine = read_segmentation(path)
        return make_grid(path, affine, (), array.shape)
    return read_nifti_grid(path)


def write_scan(path: Path, array: np.ndarray, affine: np.ndarray, header: nib.Nifti1Header) -> None:
    """Write `array` [X, Y, Z] or [X, Y, Z, K] in the format of the path's extension; read it back to check."""
    if path.suffix.lower() in ITK_EXTENSIONS:
        write_itk(path, array, affine)
    else:
        write_nifti(path, array, header)


def make_grid(path: Path, affine: np.ndarray, warnings: tuple[str, ...], shape: tuple[int, int, int]) -> Grid:
    """Return the grid with this affine in mm, and a NIfTI header that holds it.

    Args:
        affine: checked by `jaxla.data.affines.check_affine`.
        warnings: warnings about the file, to which those about its size are added.
        shape: X, Y, Z.

    Raises:
        InputError: voxels or the scan are too small or too large.
    """
    header = nib.Nifti1Header()
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    checked = find_grid(path, header, shape)
    return Grid(affine, header, (*warnings, *checked.warnings))
