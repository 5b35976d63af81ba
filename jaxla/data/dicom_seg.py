"""DICOM segmentations (DICOM-SEG), written and read by highdicom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from jaxla.cli.files import atomic_file, report_os_errors
from jaxla.config import InputError
from jaxla.data.affines import affine_from_lps
from jaxla.data.dicom import import_pydicom, is_segmentation, read_slices, report_damage, slice_step

if TYPE_CHECKING:
    import highdicom as hd
    from pydicom import Dataset

# Elements that anonymisation often removes. highdicom requires them in the slices, but accepts empty ones.
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
LEFT_ATRIUM_NAMES = ("la", "left atrium", "left_atrium")


def import_highdicom(where: object) -> ModuleType:
    """Import highdicom.

    Raises:
        InputError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        fix = "Run: pip install highdicom. Or choose another format, such as --format=nii.gz."
        raise InputError(where, "DICOM segmentations need the package highdicom", fix) from error
    return highdicom


def write_segmentation(path: Path, classes: np.ndarray, names: Sequence[str], series: Path) -> None:
    """Write a segmentation that refers to the slices of a DICOM series.

    The file gets its name only after it has been read back.

    Args:
        classes: [X, Y, Z] uint8, 0 is background; class n becomes segment n.
        names: names of the foreground classes.
        series: folder with the slices that were segmented.

    Raises:
        InputError: highdicom is not installed, the series lacks something that a segmentation refers to, or the folder
            cannot be written.
    """
    hd = import_highdicom(path)
    slices, _ = read_slices(series, with_voxels=False)
    _complete_elements(slices, series)
    frames = np.ascontiguousarray(classes.T)  # [Z, Y, X], as slices of rows and columns
    try:
        segmentation = _make_segmentation(hd, slices, frames, names)
    except (AttributeError, KeyError, ValueError, TypeError) as error:  # highdicom names the missing attribute
        reason = " ".join(str(error).split())
        problem = f"no DICOM segmentation can refer to this series ({reason})"
        raise InputError(series, problem, "Choose another format, such as --format=nii.gz.") from error
    with report_os_errors("written", path, "Use another output folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            segmentation.save_as(temporary)
            if not np.array_equal(read_segmentation(temporary)[0], classes):
                raise AssertionError(f"{path}: the file differs from the mask that was written to it")


def _make_segmentation(
    hd: ModuleType, slices: Sequence[Dataset], frames: np.ndarray, names: Sequence[str]
) -> hd.seg.Segmentation:
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name="jaxla", family=codes.DCM.ArtificialIntelligence, version=version("jaxla")
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=(
                codes.SCT.LeftAtrium if name.lower() in LEFT_ATRIUM_NAMES else codes.SCT.AnatomicalStructure
            ),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    with warnings.catch_warnings(action="ignore"):
        return hd.seg.Segmentation(
            source_images=slices,
            pixel_array=frames,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=1000,
            series_description=f"jaxla: {', '.join(names)}"[:64],  # the maximum length of a DICOM string
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="jaxla",
            manufacturer_model_name="jaxla",
            software_versions=version("jaxla"),
            device_serial_number="1",
            omit_empty_frames=False,  # so that the file holds the whole grid of the scan
        )


def _complete_elements(slices: Sequence[Dataset], folder: Path) -> None:
    """Set, in memory, the elements that highdicom copies from the slices, because they may be missing or wrong."""
    from pydicom.valuerep import DSfloat

    distance = DSfloat(np.linalg.norm(slice_step(folder, slices)), auto_format=True)
    for dataset in slices:
        dataset.update({name: None for name in MAY_BE_EMPTY if name not in dataset})
        dataset.SliceThickness = dataset.get("SliceThickness") or distance
        dataset.SpacingBetweenSlices = distance


def read_segmentation(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a segmentation's segment numbers [X, Y, Z] (0: background) and affine [4, 4], voxel indices to mm (RAS+).

    X, Y and Z run as in `jaxla.data.dicom.read_dicom`.

    Raises:
        InputError: highdicom is not installed, the file is damaged, or its segments overlap.
    """
    hd = import_highdicom(path)
    import_pydicom(path)
    if not is_segmentation(path):
        raise InputError(path, "not a DICOM segmentation", "For a scan, pass the folder with all its slices.")
    with report_damage(path):
        volume = hd.seg.segread(path).get_volume(combine_segments=True)
        array, lps = volume.array.T, volume.affine[:, [2, 1, 0, 3]]
    if np.linalg.det(lps[:3, :3]) < 0:  # highdicom may order slices against the normal of their rows and columns
        lps[:3, 3] += lps[:3, 2] * (array.shape[2] - 1)
        lps[:3, 2] *= -1
        array = array[:, :, ::-1]
    return array, affine_from_lps(path, lps)
