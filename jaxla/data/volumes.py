"""NIfTI files <-> checked volumes, and volumes <-> stacks of slices.

Slices follow one convention whatever the file's orientation. The canonical axes run right to left, anterior to
posterior and superior to inferior. The slice axis comes first; of the other two, the later one gives the rows. An
axial slice is thus shown in the radiological convention: the patient's right on the left, anterior on top.
"""

import gzip
import hashlib
import io
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from jaxla.cli.files import atomic_file, report_os_errors
from jaxla.config import InputError

AXES = ("left-right", "anterior-posterior", "head-foot")  # canonical
HEAD_FOOT = 2
MAX_LABEL = 65535
MAX_SKEW = 0.01  # cosine of the angle between two axes; rounding in a header causes far less

# nibabel logs what it repairs in a header; _check_header reads the stored header and raises an error instead
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


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
    try:
        image = nib.load(path)
    except (ImageFileError, OSError, EOFError, HeaderDataError) as error:
        raise InputError(path, f"cannot be read ({error})", "Restore it from a copy.") from error
    return Grid(image.affine, image.header)


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


@dataclass(frozen=True)
class SliceGeometry:
    """How a stored array [X, Y, Z] becomes slices [S, H, W], and back."""

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
    """Return slices [S, H, W], cut along `slice_axis`, with the axes `AXES`."""
    return slices.transpose(np.argsort(slice_row_column_axes(AXES.index(slice_axis))))


def canonical_to_slices(array: np.ndarray, slice_axis: str) -> np.ndarray:
    """Invert `slices_to_canonical`."""
    return array.transpose(slice_row_column_axes(AXES.index(slice_axis)))


def slice_row_column_axes(slice_axis: int) -> tuple[int, int, int]:
    """Return the canonical axes of slices, rows and columns."""
    columns, rows = (axis for axis in range(3) if axis != slice_axis)
    return slice_axis, rows, columns


def write_volume(path: Path, array: np.ndarray, like: Volume | Grid) -> None:
    """Write `array` [X, Y, Z] or [X, Y, Z, K] on the grid of `like`, read it back, and only then give it its name.

    Raises:
        InputError: the folder cannot be written.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    with report_os_errors("written", path, "Use another output folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            nib.save(image_class(array, like.affine, header), temporary)
            written = nib.load(temporary)
            keys = ("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z")
            pairs = [(written.affine, like.affine), *((written.header[key], like.header[key]) for key in keys)]
            if not all(np.array_equal(a, b) for a, b in [*pairs, (np.asarray(written.dataobj), array)]):
                raise AssertionError(f"{path}: the file differs from the array that was written to it")


def hash_voxels(array: np.ndarray) -> str:
    """Return the sha256 of a scan's shape and voxels, which two files of the same scan have in common."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _read(path: Path) -> Volume:
    if not path.is_file():
        raise InputError(path, "no such file", "Name an existing NIfTI file.")
    try:
        _check_compression(path)
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):  # includes Nifti2Image, a subclass
            raise InputError(path, f"not a NIfTI file, but {type(image).__name__}", "Convert it to .nii.gz.")
        _check_header(path, image)
        array = np.asarray(image.dataobj)
    except InputError:
        raise
    except ImageFileError as error:
        raise InputError(path, "not a NIfTI file", "Convert it to .nii.gz.") from error
    except (EOFError, OSError, zlib.error, ValueError, HeaderDataError) as error:
        reason = " ".join(str(error).split())
        raise InputError(path, f"truncated or damaged ({reason})", "Copy or export the file again.") from error
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            array = array.astype(np.float32, copy=False)
        if bad := int(array.size - np.isfinite(array).sum()):
            raise InputError(path, f"{bad} of {array.size} voxels are NaN or infinite", "Export the file again.")
    elif array.dtype.kind not in "iu":
        raise InputError(path, f"voxels of type {array.dtype} are not grey values", "Export a scalar image.")
    return Volume(path, array, image.affine, image.header)


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
