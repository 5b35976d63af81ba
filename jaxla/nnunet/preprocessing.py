"""Preprocess scans for a plan: order axes, crop zeros, normalise and resample; keep the results in the cache.

Axes are anatomical here, regardless of a file's orientation: head to foot, anterior to posterior and left to right,
reordered as in the plan. nnU-Net uses a file's own axes; for the orientation of most scanners, the two are the same.

A preprocessed volume is a folder named by a hash of its sources. It holds `image.npy` [D, H, W] float32, `mask.npy`
[D, H, W] int8 (int16 for more than 127 classes) of class indices, -1 where the scan is zero, `locations.npy` of sampled
voxels of each class, and `volume.json`. Reference code: nnunetv2 2.8.1, `DefaultPreprocessor`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from scipy import ndimage

from jaxla.cli.files import create_folder_once, has_files, report_os_errors
from jaxla.cli.json_files import read_json
from jaxla.config import option
from jaxla.data.arrays import open_array
from jaxla.data.prepared import PreparedVolume
from jaxla.data.slices import AXES, slice_row_column_axes
from jaxla.nnunet.plan import Configuration, Plan
from jaxla.nnunet.resampling import find_coarse_axis, resample_image, resample_mask, resampled_shape

VERSION = 1  # of the cached folders' content; part of their names
FILES = ("image.npy", "mask.npy", "locations.npy", "volume.json")
OUTSIDE = -1  # class index in a mask where the scan is zero
MIN_DEVIATION = 1e-8
MIN_LOCATIONS, LOCATIONS_FRACTION = 10_000, 0.01  # voxels to keep per class: this number or fraction, whichever is more
ANATOMICAL = (2, 1, 0)  # canonical axes, head-foot first

Box = tuple[slice, ...]


def axis_order(slice_axis: str, transpose_forward: Sequence[int] = (0, 1, 2)) -> tuple[int, int, int]:
    """Return the axes of slices [S, H, W], S along the anatomical `slice_axis`, in the plan's order."""
    canonical = slice_row_column_axes(AXES.index(slice_axis))
    return tuple(canonical.index(ANATOMICAL[axis]) for axis in transpose_forward)


def from_plan_axes(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Undo `transpose(order)` (a view); further axes stay last."""
    return array.transpose(*np.argsort(order), *range(3, array.ndim))


def nonzero_box(image: np.ndarray) -> Box:
    """Return the smallest box that contains all nonzero voxels."""
    return ndimage.find_objects((image != 0).view(np.int8))[0]


def nonzero_mask(image: np.ndarray) -> np.ndarray:
    """Return the mask of voxels that are nonzero or enclosed by nonzero voxels."""
    return ndimage.binary_fill_holes(image != 0)


class PreprocessedImage(NamedTuple):
    """An image preprocessed for a plan, and the geometry for mapping a segmentation back to the scan."""

    image: np.ndarray  # [D, H, W] float32
    box: Box  # the part of the scan that was kept, in the plan's axes
    shape: tuple[int, ...]  # shape of the scan before cropping, in the plan's axes
    spacing: tuple[float, ...]  # spacing of the scan in mm, in the plan's axes
    new_spacing: tuple[float, ...]  # spacing of `image` in mm
    order: tuple[int, int, int]  # see `axis_order`


def preprocess_image(
    slices: np.ndarray,
    slice_axis: str,
    spacing: Sequence[float],
    plan: Plan,
    configuration: Configuration,
    mask: np.ndarray | None = None,
) -> PreprocessedImage:
    """Crop, normalise and resample a scan.

    Args:
        slices: [S, H, W] in the scan's own grey values, S along the anatomical `slice_axis`.
        spacing: mm along slices, rows and columns.
        mask: class indices [S, H, W], if known: voxels of a class count as nonzero.
    """
    order = axis_order(slice_axis, plan.transpose_forward)
    scan = slices.transpose(order)
    old_spacing = tuple(spacing[axis] for axis in order)
    new_spacing = resampled_spacing(old_spacing, configuration)
    box = nonzero_box(scan)
    inside = ...  # all voxels
    if plan.use_mask_for_norm:
        inside = nonzero_mask(scan[box])
        if mask is not None:
            inside |= mask.transpose(order)[box] > 0
    image = scan[box].astype(np.float32)
    part = image[inside]
    image[inside] = (part - part.mean()) / max(part.std(), MIN_DEVIATION)
    shape = resampled_shape(image.shape, old_spacing, new_spacing)
    image = resample_image(image, shape, find_coarse_axis(old_spacing, new_spacing))
    return PreprocessedImage(np.ascontiguousarray(image), box, scan.shape, old_spacing, new_spacing, order)


def preprocessed_shape(volume: PreparedVolume, plan: Plan, configuration: Configuration) -> tuple[int, ...]:
    """Return the shape of a scan in the plan's axes and spacing, without cropping."""
    order = axis_order(volume.slice_axis, plan.transpose_forward)
    spacing = [volume.spacing[axis] for axis in order]
    return resampled_shape([volume.shape[axis] for axis in order], spacing, resampled_spacing(spacing, configuration))


def resampled_spacing(spacing: Sequence[float], configuration: Configuration) -> tuple[float, ...]:
    """Return the spacing after resampling; a 2D configuration keeps the distance between slices."""
    return (*spacing[: 3 - len(configuration.spacing)], *configuration.spacing)


@dataclass(frozen=True)
class PreprocessedVolume:
    """A case preprocessed for a plan; its arrays are opened from disk only while they are used."""

    id: str  # case id
    folder: Path  # folder of its arrays
    shape: tuple[int, int, int]  # D, H, W
    location_counts: tuple[int, ...]  # number of voxels kept in `locations.npy` for each class, without background

    @property
    def image(self) -> np.ndarray:
        return open_array(self.folder / "image.npy")

    @property
    def mask(self) -> np.ndarray:
        return open_array(self.folder / "mask.npy")

    def location(self, class_index: int, i: int) -> tuple[int, ...]:
        """Return the i-th kept voxel of a class; the first class is 1."""
        locations = open_array(self.folder / "locations.npy")
        flat_index = locations[sum(self.location_counts[: class_index - 1]) + i]
        return tuple(int(i) for i in np.unravel_index(flat_index, self.shape))


def preprocess_volumes(
    volumes: Iterable[PreparedVolume], plan: Plan, configuration: Configuration, cache_dir: Path
) -> list[PreprocessedVolume]:
    """Preprocess every case that is not in the cache yet; raise an InputError if the cache cannot be written."""
    return [_preprocess(volume, plan, configuration, cache_dir) for volume in volumes]


def _preprocess(
    volume: PreparedVolume, plan: Plan, configuration: Configuration, cache_dir: Path
) -> PreprocessedVolume:
    order = axis_order(volume.slice_axis, plan.transpose_forward)
    new_spacing = resampled_spacing([volume.spacing[axis] for axis in order], configuration)
    sources = [VERSION, volume.slices_sha256, volume.content_key, order, new_spacing, plan.use_mask_for_norm]
    folder = cache_dir / "planned" / hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:32]
    if not has_files(folder, FILES):
        with report_os_errors("written", option("cache-dir", cache_dir), "Use another folder."):
            _write_folder(folder, volume, plan, configuration)
    content = read_json(folder / "volume.json", _Content, f"Remove the folder {folder}; it will be written again.")
    return PreprocessedVolume(volume.id, folder, content["shape"], content["location_counts"])


class _Content(TypedDict):
    """The content of `volume.json`."""

    shape: tuple[int, ...]
    location_counts: tuple[int, ...]


def _write_folder(folder: Path, volume: PreparedVolume, plan: Plan, configuration: Configuration) -> None:
    result = preprocess_image(volume.image, volume.slice_axis, volume.spacing, plan, configuration, volume.mask)
    classes = range(1, len(volume.class_voxels))
    dtype = np.int8 if len(classes) <= np.iinfo(np.int8).max else np.int16
    scan, mask = (array.transpose(result.order)[result.box] for array in (volume.image, volume.mask))
    mask = mask.astype(dtype)
    mask[(mask == 0) & ~nonzero_mask(scan)] = OUTSIDE
    coarse_axis = find_coarse_axis(result.spacing, result.new_spacing)
    mask = np.ascontiguousarray(resample_mask(mask, result.image.shape, coarse_axis))
    rng = np.random.default_rng(0)
    locations = [_sample_locations(np.flatnonzero(mask == k), rng) for k in classes]
    content = {"shape": mask.shape, "location_counts": [len(kept) for kept in locations]}
    with create_folder_once(folder, FILES) as temporary:
        np.save(temporary / "image.npy", result.image)
        np.save(temporary / "mask.npy", mask)
        np.save(temporary / "locations.npy", np.concatenate(locations))
        (temporary / "volume.json").write_text(json.dumps(content))


def _sample_locations(indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = min(len(indices), max(MIN_LOCATIONS, int(np.ceil(len(indices) * LOCATIONS_FRACTION))))
    return rng.choice(indices, count, replace=False)
