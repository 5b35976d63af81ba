"""Cases -> prepared volumes: each case is read and checked once, then memory-mapped from the shared cache folder.

A prepared volume is a folder named by a hash of its content. It holds `image.npy` [S, H, W] in the scan's own
intensities and resolution, `mask.npy` [S, H, W] with class indices, and `volume.json`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from jaxla.cli.files import create_folder_once, has_files, report_os_errors
from jaxla.cli.json_files import read_json
from jaxla.config import InputError, option
from jaxla.data.arrays import open_array
from jaxla.data.cases import Case, Dataset
from jaxla.data.formats import scan_sha256
from jaxla.data.inputs import Frame, intensity_range, slice_to_input
from jaxla.data.labels import Labels, require_one_value
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.volumes import (
    Volume,
    hash_voxels,
    log_warnings,
    read_grid,
    read_image,
    read_mask,
    require_same_grid,
)

VERSION = 5  # part of the folders' names; increase it when their content changes
FILES = ("image.npy", "mask.npy", "volume.json")
MAX_MASK_VALUES = 10


@dataclass(frozen=True)
class PreparedVolume:
    """A case as slices [S, H, W], read from disk only when indexed."""

    id: str  # case id
    folder: Path  # folder with the arrays
    case: Case  # the original files
    content_key: str  # hash of these files and of the labels
    shape: tuple[int, int, int]  # S, H, W
    spacing: tuple[float, float, float]  # mm along slices, rows and columns
    slice_axis: str  # anatomical name of the slice axis
    intensity_range: tuple[float, float]  # 0.5th and 99.5th percentiles of the scan's intensities
    image_sha256: str  # hash of the scan's voxels
    slices_sha256: str  # hash of the slices and their spacing, which determine the network's inputs
    mask_values: tuple[int, ...]  # the non-zero values of the mask, at most `MAX_MASK_VALUES`
    class_voxels: tuple[int, ...]  # number of voxels of each class, background first

    # Arrays are opened on each access, because a process cannot keep hundreds of files mapped at once.

    @property
    def image(self) -> np.ndarray:
        """[S, H, W] in the scan's own intensities."""
        return open_array(self.folder / "image.npy")

    @property
    def mask(self) -> np.ndarray:
        """[S, H, W] uint8, class indices."""
        return open_array(self.folder / "mask.npy")

    def input(self, index: int, frame: Frame, neighbours: int = 0) -> np.ndarray:
        """Return a slice as the network reads it, [size, size, 1 + 2 · neighbours] float32 in 0..1."""
        return slice_to_input(self.image, index, self.spacing[0], self.intensity_range, frame, neighbours)


def prepare_cases(
    dataset: Dataset,
    cache_dir: Path,
    track: Callable[[Iterable[Case]], Iterable[Case]] = iter,
    first: Sequence[Case] = (),
) -> list[PreparedVolume]:
    """Prepare the cases of a data set that are not in the cache yet.

    Args:
        track: wraps the iteration over cases, for a progress bar.
        first: cases to begin with, while other processes begin with others.

    Raises:
        InputError: a file fails a check, two cases have the same image, or the cache folder cannot be written.
    """
    volumes: dict[str, PreparedVolume] = {}
    case_by_image: dict[str, str] = {}
    for case in track(list({case.id: case for case in (*first, *dataset.cases)}.values())):
        volumes[case.id] = volume = _prepare_case(case, dataset.labels, cache_dir / "volumes")
        if (first_case := case_by_image.setdefault(volume.image_sha256, case.id)) != case.id:
            raise InputError(case.image, *describe_duplicate(first_case))
    prepared = [volumes[case.id] for case in dataset.cases]
    require_one_value(dataset.labels, dataset.root, {v.id: v.mask_values for v in prepared})
    return prepared


def describe_duplicate(first: str) -> tuple[str, str]:
    """Return problem and fix for a case that has the same image as the case `first`."""
    fix = "Remove one of the two, so that no patient is in two parts of the split."
    return f"the same image as case {first}", fix


def content_key(case: Case, labels: Labels) -> str:
    """Return a hash of a case's two files and of the labels, the same in all versions of this package.

    Raises:
        InputError: a file cannot be read.
    """
    hashes = []
    for path in (case.image, case.mask):
        with report_os_errors("read", path, "Make the file readable."):
            hashes.append(scan_sha256(path))
    content = json.dumps([*hashes, asdict(labels)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


class _Description(TypedDict):
    """The content of `volume.json`, as the attributes of `PreparedVolume`."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    slice_axis: str
    intensity_range: tuple[float, float]
    image_sha256: str
    slices_sha256: str
    mask_values: tuple[int | float, ...]
    class_voxels: tuple[int, ...]


def _prepare_case(case: Case, labels: Labels, store: Path) -> PreparedVolume:
    key = content_key(case, labels)
    folder = store / f"{key}-v{VERSION}"
    for path in (case.image, case.mask):  # also if the case is in the cache
        log_warnings(path, read_grid(path).warnings)
    if not has_files(folder, FILES):
        image, mask = read_image(case.image), read_mask(case.mask)
        require_same_grid(mask, image)
        with report_os_errors("written", option("cache-dir", store.parent), "Use another folder."):
            _write_prepared(folder, image, mask, labels)
    fix = f"Remove the folder {folder}; it will be written again."
    description = read_json(folder / "volume.json", _Description, fix)
    return PreparedVolume(id=case.id, folder=folder, case=case, content_key=key, **description)


def _write_prepared(folder: Path, image: Volume, mask: Volume, labels: Labels) -> None:
    geometry = slice_geometry(image.affine)
    classes = labels.to_classes(mask.array, mask.path)
    slices = np.ascontiguousarray(to_slices(image.array, geometry))
    grid = f"{slices.shape} {slices.dtype} {geometry.spacing}"
    description = {
        "shape": to_slices(classes, geometry).shape,
        "spacing": geometry.spacing,
        "slice_axis": geometry.axis,
        "intensity_range": intensity_range(image.array),
        "image_sha256": hash_voxels(image.array),
        "slices_sha256": hashlib.sha256(grid.encode() + slices.tobytes()).hexdigest(),
        "mask_values": np.unique(mask.array[mask.array != 0])[:MAX_MASK_VALUES].tolist(),
        "class_voxels": np.bincount(classes.ravel(), minlength=len(labels.names) + 1).tolist(),
    }
    with create_folder_once(folder, FILES) as temporary:
        np.save(temporary / "image.npy", slices)
        np.save(temporary / "mask.npy", np.ascontiguousarray(to_slices(classes, geometry)))
        (temporary / "volume.json").write_text(json.dumps(description))
