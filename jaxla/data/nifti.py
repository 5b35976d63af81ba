"""Arrays, affines and headers of NIfTI files, read with checks and written back."""

import gzip
import io
import logging
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from jaxla.config import InputError

MAX_SKEW = 0.01  # cosine of the angle between two axes; rounding in a header causes far less

# nibabel logs what it repairs in a header; _check_header reads the stored header and raises an error instead
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

Grid = tuple[np.ndarray, nib.Nifti1Header]  # affine [4, 4], voxel indices to mm (RAS+), and the header


def read_nifti_grid(path: Path) -> Grid:
    """Read a file's affine and header, without its voxels.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        image = nib.load(path)
    except (ImageFileError, OSError, EOFError, HeaderDataError) as error:
        raise InputError(path, f"cannot be read ({error})", "Restore it from a copy.") from error
    return image.affine, image.header


def read_nifti(path: Path) -> tuple[np.ndarray, *Grid]:
    """Read a file's array [X, Y, Z], of the stored type or scaled to float, with its affine and header.

    Raises:
        InputError: the file is truncated, not a NIfTI file, not 3D, or has no usable grid.
    """
    try:
        _check_compression(path)
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):  # includes Nifti2Image, a subclass
            raise InputError(path, f"not a NIfTI file, but {type(image).__name__}", "Convert it to .nii.gz.")
        _check_header(path, image)
        return np.asarray(image.dataobj), image.affine, image.header
    except InputError:
        raise
    except ImageFileError as error:
        raise InputError(path, "not a NIfTI file", "Convert it to .nii.gz.") from error
    except (EOFError, OSError, zlib.error, ValueError, HeaderDataError) as error:
        reason = " ".join(str(error).split())
        raise InputError(path, f"truncated or damaged ({reason})", "Copy or export the file again.") from error


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, header: nib.Nifti1Header) -> None:
    """Write `array` [X, Y, Z] or [X, Y, Z, K] with this affine and the geometry of `header`; read it back to check."""
    header = header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    nib.save(image_class(array, affine, header), path)
    written = nib.load(path)
    keys = ("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z")
    pairs = [(written.affine, affine), *((written.header[key], header[key]) for key in keys)]
    if not all(np.array_equal(a, b) for a, b in [*pairs, (np.asarray(written.dataobj), array)]):
        raise AssertionError(f"{path}: the file differs from the array that was written to it")


def _check_compression(path: Path) -> None:
    """Read a compressed file to its checksum: nibabel stops before it and would miss a flipped bit."""
    if path.stat().st_size == 0:
        raise InputError(path, "the file is empty", "Copy or export the file again.")
    if path.suffix == ".gz":
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                raise InputError(path, "not a NIfTI file: .gz, but not compressed", "Convert it to .nii.gz.")
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def _check_header(path: Path, image: nib.Nifti1Image) -> None:
    if len(image.shape) != 3:
        raise InputError(path, f"is {len(image.shape)}D with shape {image.shape}", "Export one 3D volume per file.")
    if 0 in image.shape:
        raise InputError(path, f"has no voxels (shape {image.shape})", "Export the file again.")
    with ImageOpener(path) as file:  # the stored header: nibabel.load replaces a spacing of zero by 1
        stored = type(image.header).from_fileobj(io.BytesIO(file.read(image.header.sizeof_hdr)), check=False)
    spacing = stored["pixdim"][1:4]
    if not (np.isfinite(spacing).all() and (spacing != 0).all()):
        raise InputError(path, f"voxel spacing {spacing.tolist()} in the header", "Set the true spacing in mm.")
    affine = image.affine
    sizes = nib.affines.voxel_sizes(affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * max(np.prod(sizes), 1e-9):
        raise InputError(path, "the affine is singular", "Correct its sform or qform.")
    axes = affine[:3, :3] / sizes
    if (skew := np.abs(axes.T @ axes - np.eye(3)).max()) > MAX_SKEW:
        problem = f"the affine is sheared: two axes are {np.degrees(np.arcsin(skew)):.1f}° off a right angle"
        raise InputError(path, problem, "Resample the scan onto a rectangular grid.")
