"""One NIfTI file -> a checked volume; a volume <-> its stack of slices.

Slices follow one convention whatever the file's orientation: the canonical axes run right-to-left,
anterior-to-posterior and superior-to-inferior, the slice axis comes first, and of the other two the later one gives
the rows. An axial slice is then seen as radiologists see it, patient's right on the left and anterior on top.
"""

from __future__ import annotations

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
MOST_LABEL = 65535
MOST_SKEW = 0.01  # cosine between two axes; rounding in a header makes far less

# nibabel logs what it repairs in a header; read_header looks at the header as stored and says it itself
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Volume:
    """A 3D array as stored on file, with its place in the world.

    Attributes:
        path: the file it came from.
        array: [X, Y, Z] in the file's own axes; float32 or an integer type.
        affine: [4, 4], voxel indices to mm (RAS+).
        header: the file's NIfTI header.
    """

    path: Path
    array: np.ndarray
    affine: np.ndarray
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
    """Read an image and check it: 3D, finite, not constant, with a usable grid.

    Raises:
        InputError: the file is missing, truncated, not a NIfTI, or fails a check.
    """
    volume = _read(Path(path))
    if volume.array.min() == volume.array.max():
        raise InputError(f"{path}: every voxel is {volume.array.flat[0]}; export the scan again or leave this case out")
    return volume


def read_mask(path: str | Path) -> Volume:
    """Read a mask and check it: 3D, whole-numbered, with a usable grid; the array comes as int32.

    Raises:
        InputError: the file is missing, truncated, not a NIfTI, or fails a check.
    """
    volume = _read(Path(path))
    values = volume.array
    if values.min() < 0 or values.max() > MOST_LABEL or (values.dtype.kind == "f" and (values % 1).any()):
        raise InputError(f"{path}: has values that are no labels; a mask holds whole numbers from 0 to {MOST_LABEL}")
    return Volume(volume.path, values.astype(np.int32), volume.affine, volume.header)


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes have one shape and put every corner within a tenth of a voxel of each other."""
    if a.array.shape != b.array.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in a.array.shape], indexing="ij")).reshape(3, -1)
    corners = np.vstack([corners, np.ones(8)])
    return bool(np.abs((a.affine - b.affine) @ corners).max() <= 0.1 * min(a.spacing))


def require_same_grid(mask: Volume, image: Volume) -> None:
    """Raise an InputError unless `mask` lies on the grid of `image`."""
    if same_grid(mask, image):
        return
    what = (
        f"shape {mask.array.shape} against {image.array.shape}"
        if mask.array.shape != image.array.shape
        else "same shape, but another affine"
    )
    raise InputError(f"{mask.path}: not on the grid of {image.path} ({what}); resample the mask onto the image's grid")


@dataclass(frozen=True)
class SliceGeometry:
    """How a stored array [X, Y, Z] becomes slices [S, H, W], and back.

    Attributes:
        order: the stored axis that becomes the slice, row and column axis.
        flip: which of the three new axes run against the stored one.
        spacing: mm along slices, rows and columns.
        axis: anatomical name of the slice axis.
    """

    order: tuple[int, int, int]
    flip: tuple[int, ...]
    spacing: tuple[float, float, float]
    axis: str


def slice_geometry(affine: np.ndarray) -> SliceGeometry:
    """The slices of a grid: along its coarsest spacing; ties go to the head-foot axis.

    Args:
        affine: [4, 4] of the stored array.
    """
    orientation = nib.orientations.io_orientation(affine)
    stored_axis = np.argsort(orientation[:, 0])  # of each canonical axis
    spacing = nib.affines.voxel_sizes(affine)[stored_axis]
    coarsest = np.flatnonzero(spacing >= spacing.max() * (1 - 1e-3))
    slice_axis = int(coarsest[0]) if len(coarsest) == 1 else HEAD_FOOT
    canonical = axes_of_slices(slice_axis)
    order = tuple(int(stored_axis[axis]) for axis in canonical)
    return SliceGeometry(
        order=order,
        flip=tuple(i for i, stored in enumerate(order) if orientation[stored, 1] > 0),
        spacing=tuple(float(spacing[axis]) for axis in canonical),
        axis=AXES[slice_axis],
    )


def to_slices(array: np.ndarray, geometry: SliceGeometry) -> np.ndarray:
    """[X, Y, Z] as stored -> [S, H, W] (a view)."""
    return np.flip(array.transpose(geometry.order), geometry.flip)


def from_slices(slices: np.ndarray, geometry: SliceGeometry) -> np.ndarray:
    """[S, H, W] -> [X, Y, Z] as stored (a view); further axes stay behind."""
    further = tuple(range(3, slices.ndim))
    return np.flip(slices, geometry.flip).transpose(*np.argsort(geometry.order), *further)


def slices_to_canonical(slices: np.ndarray, slice_axis: str) -> np.ndarray:
    """[S, H, W] -> left-right, anterior-posterior, head-foot axes, whichever of them the slices were cut along."""
    return slices.transpose(np.argsort(axes_of_slices(AXES.index(slice_axis))))


def canonical_to_slices(array: np.ndarray, slice_axis: str) -> np.ndarray:
    """The inverse of `slices_to_canonical`."""
    return array.transpose(axes_of_slices(AXES.index(slice_axis)))


def axes_of_slices(slice_axis: int) -> tuple[int, int, int]:
    """The canonical axes of slices, rows and columns."""
    columns, rows = (axis for axis in range(3) if axis != slice_axis)
    return slice_axis, rows, columns


def write_volume(path: Path, array: np.ndarray, like: Volume | Grid) -> None:
    """Write `array` [X, Y, Z] (or [X, Y, Z, K]) on the grid of `like`, read it back, and only then give it its name.

    Raises:
        InputError: the folder cannot be written.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    with report_os_errors("written", path, "choose another output folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as beside:
            nib.save(image_class(array, like.affine, header), beside)
            written = nib.load(beside)
            same = np.array_equal(written.affine, like.affine) and all(
                np.array_equal(written.header[key], like.header[key])
                for key in ("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z")
            )
            if not (same and np.array_equal(np.asarray(written.dataobj), array)):
                raise AssertionError(f"{path}: what was read back differs from what was written")


def _read(path: Path) -> Volume:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        _check_compression(path)
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one too
            raise InputError(f"{path}: not a NIfTI file (it reads as {type(image).__name__}); convert it to .nii.gz")
        _check_header(path, image)
        array = np.asarray(image.dataobj)
    except ImageFileError as error:
        raise InputError(f"{path}: not a NIfTI file; convert it to .nii.gz first") from error
    except (EOFError, OSError, zlib.error, ValueError, HeaderDataError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: truncated or damaged ({reason}); copy or export the file again") from error
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            array = array.astype(np.float32, copy=False)
        if bad := int(array.size - np.isfinite(array).sum()):
            raise InputError(f"{path}: {bad} of {array.size} voxels are NaN or infinite; mend the file or leave it out")
    elif array.dtype.kind not in "iu":
        raise InputError(f"{path}: voxels of type {array.dtype} are not grey values; export a scalar image")
    return Volume(path, array, image.affine, image.header)


def _check_compression(path: Path) -> None:
    """Read a compressed file to its end, where its checksum is: nibabel stops before, and a flipped bit goes unseen."""
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; copy or export the file again")
    if path.suffix == ".gz":
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                raise InputError(f"{path}: not a NIfTI file (its name ends in .gz, but it is not compressed)")
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def _check_header(path: Path, image: nib.Nifti1Image) -> None:
    if len(image.shape) != 3:
        raise InputError(f"{path}: is {len(image.shape)}D with shape {image.shape}; expected one 3D volume per file")
    if 0 in image.shape:
        raise InputError(f"{path}: has no voxels (shape {image.shape})")
    with ImageOpener(path) as file:  # the header as stored: nibabel.load sets a zero spacing to 1
        stored = type(image.header).from_fileobj(io.BytesIO(file.read(image.header.sizeof_hdr)), check=False)
    spacing = stored["pixdim"][1:4]
    if not (np.isfinite(spacing).all() and (spacing != 0).all()):
        raise InputError(f"{path}: voxel spacing {spacing.tolist()} in the header; set the true spacing in mm")
    affine = image.affine
    sizes = nib.affines.voxel_sizes(affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * max(np.prod(sizes), 1e-9):
        raise InputError(f"{path}: the affine is singular, so voxels have no place; mend its sform or qform")
    axes = affine[:3, :3] / sizes
    if (skew := np.abs(axes.T @ axes - np.eye(3)).max()) > MOST_SKEW:
        raise InputError(
            f"{path}: the affine is sheared: two of its axes are {np.degrees(np.arcsin(skew)):.1f}° off a right angle, "
            "and distances along them would be wrong; resample the scan onto a grid of right angles"
        )


def voxels_sha256(array: np.ndarray) -> str:
    """Of the shape and voxels of a scan: what two files of the same scan have in common."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
