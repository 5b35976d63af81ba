"""The file formats of scans: their endings, and what counts as one scan on disk."""

from pathlib import Path

NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")  # the voxels of .nhdr and .mhd are in a second file
SEG_ENDING = ".dcm"  # a DICOM segmentation; a DICOM scan is the folder of its slices
ENDINGS = (*NIFTI_ENDINGS, *ITK_ENDINGS)
FORMATS = ".nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, or a folder with one DICOM series"  # for messages

DICOM_INDEX = b"1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR file, which lists other files
DICOM_SEG = b"1.2.840.10008.5.1.4.1.1.66.4"
MAX_DICOM_META_BYTES = 1024  # the SOP class is among the first elements


def scan_ending(name: str) -> str:
    """Return the ending of a scan's file name as it is written, for example `.nii.gz` or `.NRRD`; empty if none."""
    lower = name.lower()
    return next((name[-len(ending) :] for ending in (*ENDINGS, SEG_ENDING) if lower.endswith(ending)), "")


def strip_ending(name: str) -> str:
    """Return the name of a scan's file or DICOM folder without the ending that its format has."""
    return name.removesuffix(scan_ending(name))


def is_scan(path: Path) -> bool:
    """Return whether a path is one scan or mask: a file with a known ending, or a folder that holds DICOM slices.

    The ending decides for all files but `.dcm`, so a damaged file or a dangling link counts. A file `.dcm` counts only
    if it is a DICOM segmentation; a single slice is part of its folder. Hidden files do not count.
    """
    if path.name.startswith("."):
        return False
    if scan_ending(path.name).lower() == SEG_ENDING and not path.is_dir():
        return DICOM_SEG in dicom_meta(path)
    return is_dicom_series(path) if path.is_dir() else bool(scan_ending(path.name))


def is_dicom_series(folder: Path) -> bool:
    """Return whether a path is a folder that directly holds a DICOM slice."""
    return folder.is_dir() and any(is_dicom_slice(path) for path in folder.iterdir())


def is_dicom_slice(path: Path) -> bool:
    """Return whether a path is a DICOM file that is neither an index nor a segmentation."""
    meta = dicom_meta(path)
    return bool(meta) and DICOM_INDEX not in meta and DICOM_SEG not in meta


def dicom_meta(path: Path) -> bytes:
    """Return the first bytes of a DICOM file, which name its SOP class; empty for any other file."""
    if path.name.startswith(".") or not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            start = file.read(MAX_DICOM_META_BYTES)
    except OSError:  # unreadable; the command that reads the scan says so
        return b""
    return start if start[128:132] == b"DICM" else b""
