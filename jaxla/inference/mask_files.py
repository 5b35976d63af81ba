"""The files of predicted masks: their formats, names and contents."""

from pathlib import Path

import numpy as np

from jaxla.config import InputError
from jaxla.data.dicom_seg import import_highdicom, write_segmentation
from jaxla.data.formats import SEG_EXTENSION, scan_extension
from jaxla.data.itk_files import import_itk
from jaxla.data.labels import Labels
from jaxla.data.volumes import Volume, write_volume

EXTENSIONS = {"nii.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom-seg": SEG_EXTENSION}
# Extension of a scan -> extension of its mask, which is a single file.
MASK_EXTENSIONS = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}


def mask_extension(scan: Path, file_format: str = "scan") -> str:
    """Return the file extension of a scan's mask in this format; `scan` means the scan's own format.

    Raises:
        InputError: the format needs a package that is not installed, or does not suit the scan.
    """
    default = SEG_EXTENSION if scan.is_dir() else MASK_EXTENSIONS.get(scan.suffix.lower(), ".nii.gz")
    extension = EXTENSIONS[file_format] if file_format != "scan" else default
    require_writable_format(extension, scan)
    return extension


def is_mask_file(target: Path) -> bool:
    """Return whether `--output` names a file for one mask."""
    return bool(scan_extension(target.name))


def require_mask_file(target: Path, scan: Path, file_format: str = "scan") -> None:
    """Raise an InputError unless the mask of a scan can be written to a file of this name, in this format."""
    extension = scan_extension(target.name).lower()
    where = f"--output={target}"
    if extension not in (".nii", *EXTENSIONS.values()):
        *others, last = EXTENSIONS.values()
        raise InputError(where, f"a mask cannot be written as {extension}", f"Use {', '.join(others)} or {last}.")
    if file_format != "scan" and extension.removesuffix(".gz") != EXTENSIONS[file_format].removesuffix(".gz"):
        problem = f"the extension does not match --format={file_format}"
        raise InputError(where, problem, "Remove one of the two options.")
    require_writable_format(extension, scan, where)


def require_writable_format(extension: str, scan: Path, where: str = "--format=dicom-seg") -> None:
    """Raise an InputError unless a scan's masks can have this extension; `where` is the option that requests it."""
    if extension == SEG_EXTENSION:
        if not scan.is_dir():
            problem = f"a DICOM segmentation needs a DICOM series as input, which {scan} is not"
            raise InputError(where, problem, "Use nii.gz, nrrd or mha.")
        import_highdicom(scan)
    elif extension in MASK_EXTENSIONS:
        import_itk(Path(f"mask{extension}"))


def probabilities_extension(extension: str) -> str:
    """Return the extension for the probabilities of a mask; a DICOM segmentation cannot hold softmax probabilities."""
    return ".nii.gz" if extension.lower() == SEG_EXTENSION else extension


def write_mask(path: Path, classes: np.ndarray, labels: Labels, scan: Volume) -> None:
    """Write classes [X, Y, Z] in the format of the path's extension: as label values, or as segments of a DICOM-SEG.

    Raises:
        InputError: the folder cannot be written, or the DICOM series lacks attributes that a segmentation needs.
    """
    if path.suffix.lower() == SEG_EXTENSION:
        write_segmentation(path, classes, labels.names, scan.path)
    else:
        write_volume(path, labels.to_values(classes), scan)


def mask_classes(mask: Volume, labels: Labels) -> np.ndarray:
    """Return the classes [X, Y, Z] of a mask that `write_mask` wrote and `read_mask` read.

    Raises:
        InputError: the mask contains a value that belongs to no class.
    """
    is_segmentation = mask.path.suffix.lower() == SEG_EXTENSION and mask.array.max() <= len(labels.names)
    return mask.array.astype(np.uint8) if is_segmentation else labels.to_classes(mask.array, mask.path)
