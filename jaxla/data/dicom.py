"""DICOM series, one folder each: slices found, checked and stacked into a volume."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import shorten
from jaxla.config import InputError
from jaxla.data.affines import affine_from_lps

if TYPE_CHECKING:
    from pydicom import Dataset

INDEX_CLASS = b"1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR file, which lists other files
SEGMENTATION_CLASS = b"1.2.840.10008.5.1.4.1.1.66.4"
SLICE_EXTENSIONS = (".dcm", ".ima")
META_BYTES = 1024  # the SOP class is among the first elements
GEOMETRY = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns")

MAX_DIRECTION_ERROR = 1e-3  # difference of two slices' direction cosines, which are rounded in some files
MAX_TILT = 0.01  # tangent of the angle between the slices' normal and the line on which they lie
MAX_OFFSET_FRACTION = 0.05  # distance of a slice from its regular position, relative to the slice distance
MISSING_GAP = 1.5  # a larger gap, in slice distances, means that a slice is missing


def dicom_meta(path: Path) -> bytes:
    """Return the first bytes of a DICOM file, which contain its SOP class; empty for any other file."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            start = file.read(META_BYTES)
    except OSError:  # unreadable; reading the scan raises the error
        return b""
    return start if start[128:132] == b"DICM" else b""


def is_dicom_slice(path: Path) -> bool:
    """Return whether a path is a DICOM file that is neither hidden, nor an index, nor a segmentation."""
    meta = b"" if path.name.startswith(".") else dicom_meta(path)
    return bool(meta) and INDEX_CLASS not in meta and SEGMENTATION_CLASS not in meta


def is_segmentation(path: Path) -> bool:
    """Return whether a path is a DICOM segmentation."""
    return SEGMENTATION_CLASS in dicom_meta(path)


def is_dicom_series(folder: Path) -> bool:
    """Return whether a path is a folder that directly holds a DICOM slice."""
    with contextlib.suppress(OSError):  # unreadable; reading the scan raises the error
        return folder.is_dir() and any(is_dicom_slice(path) for path in folder.iterdir())
    return False


def slice_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the DICOM slices of a folder, and its other files, by name; hidden files are ignored.

    Raises:
        InputError: a file with the extension of a slice is not a slice.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    slices = [path for path in files if is_dicom_slice(path)]
    others = [path for path in files if path not in set(slices)]
    for path in others:
        if path.suffix.lower() in SLICE_EXTENSIONS:
            what = "a DICOM segmentation" if is_segmentation(path) else "not a DICOM file"
            raise InputError(path, f"{what} in a folder of slices", "Restore it, or move it out of the folder.")
    return slices, others


def read_dicom_grid(folder: Path) -> tuple[np.ndarray, tuple[str, ...], tuple[int, int, int]]:
    """Read a series' affine [4, 4] (voxel indices to mm, RAS+), warnings and shape (X, Y, Z), without its voxels.

    Raises:
        InputError: as `read_dicom`.
    """
    slices, notes = read_slices(folder, with_voxels=False)
    with report_damage(folder):
        return _affine(folder, slices), notes, (int(slices[0].Columns), int(slices[0].Rows), len(slices))


def read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read a series' array [X, Y, Z], and its affine and warnings as `read_dicom_grid` returns them.

    X runs along the rows, Y along the columns, Z along the slices' normal. The array has the stored type, or float64
    if the slices have a rescale slope or intercept, which is applied.

    Raises:
        InputError: pydicom is not installed, a slice is damaged, or the slices are not one regular 3D grey image.
    """
    slices, notes = read_slices(folder)
    with report_damage(folder):
        affine = _affine(folder, slices)
    arrays = []
    for dataset in slices:
        _require_decoder(dataset)
        with report_damage(dataset.filename):
            arrays.append(_grey_values(dataset).T)
    return np.stack(arrays, axis=-1), affine, notes


def read_slices(folder: Path, with_voxels: bool = True) -> tuple[list[Dataset], tuple[str, ...]]:
    """Return the slices of a series in the order of their positions along their normal, and warnings.

    Raises:
        InputError: as `read_dicom`.
    """
    with report_os_errors("read", folder, "Make the folder readable."):
        files, others = slice_files(folder)
    if not files:
        raise InputError(folder, "no DICOM slice in this folder", "Pass a file, or the folder of one DICOM series.")
    pydicom = import_pydicom(folder)
    slices = []
    for path in files:
        with report_damage(path):
            slices.append(pydicom.dcmread(path, stop_before_pixels=not with_voxels))
    _require_one_series(folder, slices)
    for dataset in slices:
        with report_damage(dataset.filename):
            _check_slice(dataset, slices[0])
    normal = np.cross(*_directions(slices[0]))
    slices.sort(key=lambda dataset: float(normal @ _position(dataset)))
    if not others:
        return slices, ()
    names = ", ".join(path.name for path in others[:3])
    return slices, (f"files that are not DICOM slices are not used ({len(others)}): {names}",)


def import_pydicom(where: Path) -> ModuleType:
    """Import pydicom and turn off its log.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise InputError(where, "DICOM needs the package pydicom", "Run: pip install pydicom python-gdcm") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom


def _require_one_series(folder: Path, slices: Sequence[Dataset]) -> None:
    series: dict[str, list[Dataset]] = {}
    names: dict[str, str] = {}
    for dataset in slices:
        with report_damage(dataset.filename):
            uid = str(dataset.get("SeriesInstanceUID", ""))
            names.setdefault(uid, shorten(str(dataset.get("SeriesDescription", uid))))
        series.setdefault(uid, []).append(dataset)
    if len(series) == 1:
        return
    groups = [
        f"{names[uid]} ({len(group)} files, such as {Path(group[0].filename).name})" for uid, group in series.items()
    ]
    problem = f"holds {len(series)} DICOM series: {'; '.join(groups[:5])}{'; …' if len(groups) > 5 else ''}"
    raise InputError(folder, problem, "Move the series that you want to its own folder.")


def _check_slice(dataset: Dataset, first: Dataset) -> None:
    """Raise an InputError unless a slice is a grey image with a geometry, on a plane parallel to that of `first`."""

    def fail(problem: str, fix: str) -> None:
        raise InputError(dataset.filename, problem, fix)

    frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel", 1))
    colours = shorten(str(dataset.get("PhotometricInterpretation", "MONOCHROME2")))
    if frames != 1 or "SharedFunctionalGroupsSequence" in dataset:
        fail(f"a multi-frame DICOM file ({frames} frames)", "Convert it to .nii.gz, for example with dcm2niix.")
    if missing := [name for name in GEOMETRY if dataset.get(name) is None]:
        kind = shorten(str(dataset.get("Modality", "unknown modality")))
        fail(f"no {missing[0]} in this DICOM file ({kind})", "Remove files that are not slices of a scan.")
    if samples != 1 or colours != "MONOCHROME2":
        fail(f"voxels are {colours} with {samples} values each", "Export grey values (MONOCHROME2).")
    directions = _directions(dataset)
    spacing = np.array(dataset.PixelSpacing, float)
    is_usable = directions.shape == (2, 3) and spacing.shape == (2,) and _position(dataset).shape == (3,)
    is_usable = is_usable and np.isfinite([*directions.ravel(), *spacing, *_position(dataset)]).all()
    if not is_usable or (spacing <= 0).any():
        fail("position, orientation or pixel spacing is damaged", "Export the file again.")
    if np.abs(directions @ directions.T - np.eye(2)).max() > 2 * MAX_DIRECTION_ERROR:
        fail("ImageOrientationPatient is not two perpendicular unit vectors", "Export the file again.")
    if np.abs(directions - _directions(first)).max() > MAX_DIRECTION_ERROR:
        problem = f"a different orientation from {Path(first.filename).name}, as in localizer scans"
        fail(problem, "Move slices of other orientations out of the folder.")
    for name in ("Rows", "Columns", "PixelSpacing"):
        if dataset[name].value != first[name].value:
            problem = f"{name} is {dataset[name].value!s}, unlike {first[name].value!s} in {Path(first.filename).name}"
            fail(problem, "Leave only the slices of one scan in the folder.")


def _affine(folder: Path, slices: Sequence[Dataset]) -> np.ndarray:
    """Return the affine of sorted slices, voxel indices to mm (RAS+)."""
    rows, columns = _directions(slices[0])
    column_spacing, row_spacing = map(float, reversed(slices[0].PixelSpacing))
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = rows * column_spacing, columns * row_spacing
    lps[:3, 2] = slice_step(folder, slices)
    lps[:3, 3] = _position(slices[0])
    return affine_from_lps(folder, lps)


def slice_step(folder: Path, slices: Sequence[Dataset]) -> np.ndarray:
    """Return the vector [3] from one slice to the next, in mm.

    Raises:
        InputError: the slices do not lie on one line along their normal, with the same distance to each other.
    """
    normal = np.cross(*_directions(slices[0]))
    if len(slices) == 1:
        thickness = slices[0].get("SpacingBetweenSlices") or slices[0].get("SliceThickness")
        if not thickness:
            raise InputError(
                folder, "a single slice without SliceThickness", "Convert it to .nii.gz with its thickness."
            )
        return normal * abs(float(thickness))
    positions = np.array([_position(dataset) for dataset in slices])
    gaps = np.diff(positions @ normal)
    median_gap = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # the lower median

    def fail(problem: str, index: int, fix: str) -> None:
        files = " and ".join(Path(dataset.filename).name for dataset in slices[index : index + 2])
        raise InputError(folder, f"{problem} ({files})", fix)

    if gaps.min() < 1e-3:
        count = int((gaps < 1e-3).sum()) + 1
        problem = f"{count} slices have the same position as another, as in a time series or after copying files twice"
        fail(problem, int(gaps.argmin()), "Leave one file for each position in the folder.")
    if gaps.max() > MISSING_GAP * median_gap:
        problem = f"a slice is missing: a gap of {gaps.max():.4g} mm where others are {median_gap:.4g} mm"
        fail(problem, int(gaps.argmax()), "Complete the series.")
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    tilt = np.linalg.norm(step - normal * (step @ normal)) / (step @ normal)
    if tilt > MAX_TILT:
        problem = f"slices are tilted by {np.degrees(np.arctan(tilt)):.1f}° (gantry tilt)"
        fail(problem, 0, "Resample the scan onto a rectangular grid, for example with dcm2niix.")
    offsets = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1)
    if offsets.max() > MAX_OFFSET_FRACTION * median_gap:
        problem = f"slices are unevenly spaced: gaps from {gaps.min():.4g} to {gaps.max():.4g} mm"
        fail(problem, int(np.abs(gaps - median_gap).argmax()), "Resample the scan onto a regular grid.")
    return step


def _directions(dataset: Dataset) -> np.ndarray:
    """Return the unit vectors [2, 3] along a row and along a column of a slice."""
    return np.array(dataset.ImageOrientationPatient, float).reshape(2, -1)


def _position(dataset: Dataset) -> np.ndarray:
    return np.array(dataset.ImagePositionPatient, float)


def _require_decoder(dataset: Dataset) -> None:
    """Raise an InputError if the package that decompresses a slice is not installed."""
    from pydicom.pixels import get_decoder

    with report_damage(dataset.filename):
        syntax = dataset.file_meta.TransferSyntaxUID
        can_decode = not syntax.is_compressed or get_decoder(syntax).is_available
    if not can_decode:
        problem = f"compressed as {syntax.name}, which needs another package"
        raise InputError(dataset.filename, problem, "Run: pip install python-gdcm")


def _grey_values(dataset: Dataset) -> np.ndarray:
    """Return a slice [rows, columns] with its rescale slope and intercept applied."""
    from pydicom.pixels import apply_modality_lut

    unused = dataset.BitsAllocated - dataset.BitsStored  # these bits may have any value
    stored = dataset.pixel_array
    stored = (stored << unused) >> unused if unused else stored
    rescale = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    if rescale == (1, 0) and "ModalityLUTSequence" not in dataset:
        return stored
    return apply_modality_lut(stored, dataset)


@contextlib.contextmanager
def report_damage(path: str | Path) -> Iterator[None]:
    """Turn any error within the context into an InputError: on damaged files pydicom raises errors of many types.

    Its warnings about deviations from the standard are dropped: this module checks the elements that a volume needs.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except InputError:
        raise
    except Exception as error:
        reason = shorten(" ".join(str(error).split()), length=200)
        raise InputError(path, f"cannot be read as DICOM ({reason})", "Copy or export the file again.") from error
