"""Arrays, grids and headers of NIfTI files, read with checks and written back."""

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError

from jaxla.cli.files import report_os_errors
from jaxla.config import InputError
from jaxla.data.nifti_geometry import Grid, find_grid

GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 1 << 22
MIN_SLOPE = float(np.finfo(np.float32).tiny)  # a smaller scale factor would lose digits, or all values, in float32
COPY_AGAIN = "Copy or export the file again."

# nibabel logs what it repairs in a header; the checks below and in nifti_geometry.py raise an error instead
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def read_nifti_grid(path: Path) -> Grid:
    """Read a file's grid, without its voxels.

    Raises:
        InputError: the file is missing or damaged, or has no usable grid.
    """
    with _open_checked(path) as file:
        header = _read_header(path, file)
    return _find_grid(path, header, _read_shape(path, header))


def read_nifti(path: Path) -> tuple[np.ndarray, Grid]:
    """Read a file's array [X, Y, Z], of the stored type or scaled to float, and its grid.

    Raises:
        InputError: the file cannot be opened, is truncated or damaged, not a NIfTI file, not 3D, or has no usable grid.
    """
    with _open_checked(path) as file:
        header = _read_header(path, file)
        shape, dtype, scaling = _read_shape(path, header), header.get_data_dtype(), _read_scaling(path, header)
        offset = int(header["vox_offset"]) or header.single_vox_offset  # 0 means the first possible position
        _check_size(path, file, shape, dtype, offset)
        grid = _find_grid(path, header, shape)
    with _report_damage(path):  # not memory-mapped: a file that changes meanwhile would crash the process
        return np.asarray(ArrayProxy(path, (shape, dtype, offset, *scaling), mmap=False)), grid


def write_nifti(path: Path, array: np.ndarray, header: nib.Nifti1Header) -> None:
    """Write `array` [X, Y, Z] or [X, Y, Z, K] with the geometry of `header`, unit included; read it back to check."""
    header = header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    header.check_fix(error_level=100)  # repairs the signs of pixdim, as nibabel does when it writes
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    nib.save(image_class(array, None, header), path)  # without an affine, which would replace sform and qform
    with _open_checked(path) as file:
        written = _read_header(path, file)
    keys = ("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z")
    keys += ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    pairs = [(written["pixdim"][:4], header["pixdim"][:4]), *((written[key], header[key]) for key in keys)]
    same_header = all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
    if not (same_header and np.array_equal(np.asarray(ArrayProxy(path, written)), array)):
        raise AssertionError(f"{path}: the file differs from the array that was written to it")


@contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Turn the errors that damaged and unreadable files cause into an InputError."""
    with report_os_errors("read", path, "Check the file and its permissions."):
        try:
            yield
        except (gzip.BadGzipFile, EOFError, zlib.error, HeaderDataError) as error:
            reason = " ".join(str(error).split())
            raise InputError(path, f"truncated or damaged ({reason})", COPY_AGAIN) from error
        except MemoryError as error:
            fix = "Use a machine with more memory, or leave the file out."
            raise InputError(path, "too large for the memory of this machine", fix) from error


@contextmanager
def _open_checked(path: Path) -> Iterator[BinaryIO]:
    """Open a file and decompress it if needed; within the context, report damage as an InputError."""
    with _report_damage(path):
        with path.open("rb") as file:
            start = file.read(len(GZIP_MAGIC))
        if not start:
            raise InputError(path, "the file is empty", COPY_AGAIN)
        is_gzip, has_gzip_name = start == GZIP_MAGIC, path.suffix.lower() == ".gz"
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            if is_gzip != has_gzip_name:
                _read_header(path, file)  # raises an error unless it is a NIfTI file
            if is_gzip and not has_gzip_name:
                problem = "compressed with gzip, but its name does not end in .gz"
                raise InputError(path, problem, f"Rename it to {path.name}.gz.")
            if has_gzip_name and not is_gzip:
                problem = "not compressed, but its name ends in .gz"
                raise InputError(path, problem, f"Rename it to {path.name[:-3]}.")
            yield file


def _read_header(path: Path, file: BinaryIO) -> nib.Nifti1Header:
    """Return the header as it is stored, and check what is needed to find the voxels."""
    not_nifti = InputError(path, "not a NIfTI file", "Convert it to NIfTI, or replace a damaged file.")
    block = file.read(nib.Nifti2Header.sizeof_hdr)
    versions = [(version, order) for version in (nib.Nifti1Header, nib.Nifti2Header) for order in ("little", "big")]
    matching = [
        (version, order) for version, order in versions if int.from_bytes(block[:4], order) == version.sizeof_hdr
    ]
    if not matching:
        raise not_nifti
    version, order = matching[0]
    length = version.sizeof_hdr
    if len(block) < length:
        raise InputError(path, f"truncated or damaged (its header ends after {len(block)} bytes)", COPY_AGAIN)
    header = version(block[:length], endianness=order, check=False)
    if (magic := header["magic"].item()) == version.pair_magic:
        raise InputError(path, "a header whose voxels are in a separate .img file", "Convert the pair to one .nii.gz.")
    if magic != version.single_magic:
        raise not_nifti
    if not math.isfinite(offset := float(header["vox_offset"])) or offset % 1:
        raise InputError(path, f"truncated or damaged (its header has vox_offset {offset:g})", COPY_AGAIN)
    header.copy().check_fix(error_level=40)  # raises an error for an unknown type of voxels, among others
    return header


def _read_shape(path: Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    """Return X, Y, Z; trailing axes of length 1 are dropped."""
    count, *sides = map(int, header["dim"])
    if not 1 <= count <= 7 or min(sides[:count]) < 0:
        raise InputError(path, f"truncated or damaged (its header has dim {[count, *sides]})", COPY_AGAIN)
    shape = tuple(sides[:count])
    if 0 in shape:
        raise InputError(path, f"has no voxels (shape {shape})", "Export the file again.")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(path, f"is {len(shape)}D with shape {shape}", "Export one 3D volume per file.")
    return shape


def _find_grid(path: Path, header: nib.Nifti1Header, shape: tuple[int, int, int]) -> Grid:
    grid = find_grid(path, header, shape)
    bits = 8 * header.get_data_dtype().itemsize
    if header["bitpix"] == bits:
        return grid
    warning = f"its header has bitpix {header['bitpix']}, but voxels of type {header.get_data_dtype()} have {bits} bits"
    return grid._replace(warnings=(*grid.warnings, warning))


def _read_scaling(path: Path, header: nib.Nifti1Header) -> tuple[float, float]:
    """Return slope and intercept; a slope of 0 or NaN means that voxels are not scaled."""
    if math.isinf(header["scl_slope"]) or 0 < abs(header["scl_slope"]) < MIN_SLOPE:
        raise InputError(path, f"invalid scl_slope {header['scl_slope']} in the header", COPY_AGAIN)
    slope, intercept = header.get_slope_inter()
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def _check_size(path: Path, file: BinaryIO, shape: tuple[int, int, int], dtype: np.dtype, offset: int) -> None:
    """Compare the bytes that the header declares with those that the file or gzip stream holds, before reading voxels.

    A compressed file is read to its checksum: nibabel stops before it and would miss a flipped bit.
    """
    declared = offset + math.prod(shape) * dtype.itemsize
    declaration = f"its header declares {declared} bytes, for voxels {'×'.join(map(str, shape))} of type {dtype}"
    held = file.seek(0, 2) if not isinstance(file, gzip.GzipFile) else _count_bytes(file, declared)
    if held < declared:
        raise InputError(path, f"truncated or damaged ({declaration}, but the file holds {held})", COPY_AGAIN)
    if held > declared:
        raise InputError(path, f"more voxels than expected ({declaration}, but the file holds more)", COPY_AGAIN)


def _count_bytes(file: gzip.GzipFile, limit: int) -> int:
    """Return the number of bytes in a gzip stream, or a number above `limit` if there are more than that."""
    held = file.tell()
    while held <= limit and (chunk := file.read(CHUNK_BYTES)):
        held += len(chunk)
    return held
