"""The files of predicted masks: their formats, names and contents."""

from pathlib import Path

import numpy as np

from jaxla.config import InputError
from jaxla.data.dicom_seg import import_highdicom, write_segmentation
from jaxla.data.formats import SEG_ENDING, scan_ending
from jaxla.data.itk_files import import_itk
from jaxla.data.labels import Labels
from jaxla.data.volumes import Volume, write_volume

ENDINGS = {"nii.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom-seg": SEG_ENDING}
# Extension of a scan -> extension of its mask, which is a single file.
OWN_ENDINGS = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}


def mask_ending(scan: Path, file_format: str = "scan") -> str:
    """Return the file extension of a scan's mask in this format; `scan` means the scan's own format.

    Raises:
        InputError: the format needs a package that is not installed, or does not suit the scan.
    """
    default = SEG_ENDING if scan.is_dir() else OWN_ENDINGS.get(scan.suffix.lower(), ".nii.gz")
    ending = ENDINGS[file_format] if file_format != "scan" else default
    require_writable_format(ending, scan)
    return ending


def is_mask_file(target: Path) -> bool:
    """Return whether `--output` names a file for one mask."""
    return bool(scan_ending(target.name))


def require_mask_file(target: Path, scan: Path, file_format: str = "scan") -> None:
    """Raise an InputError unless the mask of a scan can be written to a file of this name, in this format."""
    ending = scan_ending(target.name).lower()
    where = f"--output={target}"
    if ending not in (".nii", *ENDINGS.values()):
        raise InputError(where, f"a mask cannot be written as {ending}", f"Use {', '.join(ENDINGS.values())}.")
    if file_format != "scan" and ending.removesuffix(".gz") != ENDINGS[file_format].removesuffix(".gz"):
        problem = f"the extension does not match --format={file_format}"
        raise InputError(where, problem, "Remove one of the two options.")
    require_writable_format(ending, scan, where)


def require_writable_format(ending: str, scan: Path, where: str = "--format=dicom-seg") -> None:
    """Raise an InputError unless a scan's masks can have this extension; `where` is the option that requests it."""
    if ending == SEG_ENDING:
        if not scan.is_dir():
            problem = f"a DICOM segmentation needs a DICOM series as input, which {scan} is not"
            raise InputError(where, problem, "Use nii.gz, nrrd or mha.")
        import_highdicom(scan)
    elif ending in OWN_ENDINGS:
        import_itk(Path(f"mask{ending}"))


def probabilities_ending(ending: str) -> str:
    """Return the extension for the probabilities of a mask; a DICOM segmentation cannot hold softmax probabilities."""
    return ".nii.gz" if ending.lower() == SEG_ENDING else ending


def write_mask(path: Path, classes: np.ndarray, labels: Labels, scan: Volume) -> None:
    """Write classes [X, Y, Z] in the format of the path's extension: as label values, or as segments of a DICOM-SEG.

    Raises:
        InputError: the folder cannot be written, or the DICOM series lacks attributes that a segmentation needs.
    """
    if path.suffix.lower() == SEG_ENDING:
        write_segmentation(path, classes, labels.names, scan.path)
    else:
        write_volume(path, labels.to_values(classes), scan)


def mask_classes(mask: Volume, labels: Labels) -> np.ndarray:
    """Return the classes [X, Y, Z] of a mask that `write_mask` wrote and `read_mask` read.

    Raises:
        InputError: the mask contains a value that belongs to no class.
    """
    is_segmentation = mask.path.suffix.lower() == SEG_ENDING and mask.array.max() <= len(labels.names)
    return mask.array.astype(np.uint8) if is_segmentation else labels.to_classes(mask.array, mask.path)
