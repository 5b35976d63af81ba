"""Cases -> prepared volumes: read and checked once, then memory-mapped from the cache folder that all runs share.

A prepared volume is a folder named by what it was made from, holding `image.npy` [S, H, W] in the scan's own
intensities and resolution, `mask.npy` [S, H, W] of class indices, and `volume.json`. A slice is an index into it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxla.cli.files import create_folder_once, file_sha256, has_files, report_os_errors
from jaxla.config import InputError
from jaxla.data.arrays import open_array
from jaxla.data.cases import Case, Dataset
from jaxla.data.inputs import Frame, image_to_input, intensity_range
from jaxla.data.labels import Labels, require_one_value
from jaxla.data.volumes import (
    Volume,
    read_image,
    read_mask,
    require_same_grid,
    slice_geometry,
    to_slices,
    voxels_sha256,
)

log = logging.getLogger(__name__)

VERSION = 4  # of what stands in a prepared folder; another number makes other folders
FILES = ("image.npy", "mask.npy", "volume.json")


@dataclass(frozen=True)
class PreparedVolume:
    """A case as slices [S, H, W], opened from disk only when indexed.

    Attributes:
        id: of the case.
        folder: where its arrays lie.
        case: the files it was made from.
        content_key: hash of these, and of the classes.
        shape: S, H, W.
        spacing: mm along slices, rows and columns.
        slice_axis: anatomical name of the slice axis.
        intensity_range: the 0.5 and 99.5 percentile of the scan's intensities.
        image_sha256: of the scan's voxels.
        slices_sha256: of the slices and their spacing: all that the network's inputs depend on.
        mask_values: the values of its mask besides 0, at most ten.
        class_voxels: number of voxels of each class, background first.
    """

    id: str
    folder: Path
    case: Case
    content_key: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    slice_axis: str
    intensity_range: tuple[float, float]
    image_sha256: str
    slices_sha256: str
    mask_values: tuple[int, ...]
    class_voxels: tuple[int, ...]

    # Opened at each use, then closed: the maps of some hundred cases are more than a process may keep open.

    @property
    def image(self) -> np.ndarray:
        return open_array(self.folder / "image.npy")

    @property
    def mask(self) -> np.ndarray:
        return open_array(self.folder / "mask.npy")

    def input(self, index: int, frame: Frame) -> np.ndarray:
        """A slice as the network reads it: [size, size, 1] float32 in 0..1."""
        return image_to_input(self.image[index], self.intensity_range, frame)


def prepare_cases(
    dataset: Dataset,
    cache_dir: Path,
    track: Callable[[Iterable[Case]], Iterable[Case]] = iter,
    first: Sequence[Case] = (),
) -> list[PreparedVolume]:
    """Prepare every case of a data set that is not in the cache yet.

    Args:
        track: wraps the iteration over cases, for a progress bar.
        first: cases to begin with, while other processes begin with others.

    Raises:
        InputError: a file fails its checks, two cases hold one image, or the cache folder cannot be written.
    """
    volumes: dict[str, PreparedVolume] = {}
    cases_of_image: dict[str, str] = {}
    for case in track(list({case.id: case for case in (*first, *dataset.cases)}.values())):
        volume = _prepare_case(case, dataset.labels, cache_dir / "volumes")
        twin = cases_of_image.setdefault(volume.image_sha256, case.id)
        if twin != case.id:
            raise InputError(
                f"{case.image}: the same image as case {twin}; remove one, a patient must not cross splits"
            )
        volumes[case.id] = volume
    prepared = [volumes[case.id] for case in dataset.cases]
    require_one_value(dataset.labels, dataset.root, {v.id: v.mask_values for v in prepared})
    return prepared


def content_key(case: Case, labels: Labels) -> str:
    """A hash of a case's scan and mask, as files, and of the classes: the same in all versions of this package.

    Raises:
        InputError: a file cannot be read.
    """
    sums = []
    for path in (case.image, case.mask):
        with report_os_errors("read", path):
            sums.append(file_sha256(path))
    content = json.dumps([*sums, asdict(labels)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _prepare_case(case: Case, labels: Labels, store: Path) -> PreparedVolume:
    key = content_key(case, labels)
    folder = store / f"{key}-v{VERSION}"
    if not has_files(folder, FILES):
        image, mask = read_image(case.image), read_mask(case.mask)
        require_same_grid(mask, image)
        with report_os_errors("written", f"--cache-dir={store.parent}"):
            _write_prepared(folder, image, mask, labels)
    described = json.loads((folder / "volume.json").read_text())
    described = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
    return PreparedVolume(id=case.id, folder=folder, case=case, content_key=key, **described)


def _write_prepared(folder: Path, image: Volume, mask: Volume, labels: Labels) -> None:
    geometry = slice_geometry(image.affine)
    classes = labels.to_classes(mask.array, mask.path)
    slices = np.ascontiguousarray(to_slices(image.array, geometry))
    grid = f"{slices.shape} {slices.dtype} {geometry.spacing}"
    described = {
        "shape": to_slices(classes, geometry).shape,
        "spacing": geometry.spacing,
        "slice_axis": geometry.axis,
        "intensity_range": intensity_range(image.array),
        "image_sha256": voxels_sha256(image.array),
        "slices_sha256": hashlib.sha256(grid.encode() + slices.tobytes()).hexdigest(),
        "mask_values": np.unique(mask.array[mask.array != 0])[:10].tolist(),
        "class_voxels": np.bincount(classes.ravel(), minlength=len(labels.names) + 1).tolist(),
    }
    with create_folder_once(folder, FILES) as beside:
        np.save(beside / "image.npy", slices)
        np.save(beside / "mask.npy", np.ascontiguousarray(to_slices(classes, geometry)))
        (beside / "volume.json").write_text(json.dumps(described))
