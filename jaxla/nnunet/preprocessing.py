"""A scan as a plan wants it: zeros around it cut away, grey values normalised, resampled; kept in the cache folder.

A planned volume is a folder named by what it was made from, holding `image.npy` [D, H, W] float32, `mask.npy` [D, H, W]
int8 (of more than 127 classes int16) of class indices, -1 where the scan is zero, `places.npy`, where each class is,
and `volume.json`.
Reference code: nnunetv2 2.8.1, `DefaultPreprocessor`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple

import numpy as np

from jaxla.cli.files import create_folder_once, has_files, report_os_errors
from jaxla.config import InputError
from jaxla.data.arrays import open_array
from jaxla.data.prepared import PreparedVolume
from jaxla.nnunet.axes import planned_order, to_plan_axes
from jaxla.nnunet.fingerprint import Box, fingerprint, nonzero_box, nonzero_mask
from jaxla.nnunet.plan import Configuration, Plan
from jaxla.nnunet.planner import resampled_shape
from jaxla.nnunet.resampling import resample_image, resample_mask, separate_axis

VERSION = 1  # of what stands in a planned folder; another number makes other folders
FILES = ("image.npy", "mask.npy", "places.npy", "volume.json")
OUTSIDE = -1  # in a mask: where the scan is zero
LEAST_DEVIATION = 1e-8
PLACES, SHARE_OF_PLACES = 10_000, 0.01  # of a class that are kept: so many, or that share of them if it is more


class PlannedImage(NamedTuple):
    """A scan's image as a plan wants it, and the way back.

    Attributes:
        image: [D, H, W] float32.
        box: what was cut out of the scan, in the plan's axes.
        shape: of the scan in the plan's axes, before that.
        spacing: of the scan in the plan's axes, mm.
        target: its spacing now.
        order: which axis of its slices comes first, second, third.
    """

    image: np.ndarray
    box: Box
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    target: tuple[float, ...]
    order: tuple[int, int, int]

    @property
    def cropped(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(side.stop - side.start for side in self.box)

    @property
    def separate(self) -> int | None:
        """The axis along which it was resampled by itself."""
        return separate_axis(self.spacing, self.target)

    @property
    def separate_back(self) -> int | None:
        """The axis along which it goes back onto the scan by itself; another one where both have a coarse axis."""
        return separate_axis(self.target, self.spacing)


def plan_image(
    slices: np.ndarray,
    slice_axis: str,
    spacing: Sequence[float],
    plan: Plan,
    configuration: Configuration,
    mask: np.ndarray | None = None,
) -> PlannedImage:
    """A scan's slices [S, H, W] in its own grey values, as the plan wants them.

    Args:
        slice_axis: anatomical name of S.
        spacing: mm along slices, rows and columns.
        mask: class indices [S, H, W], where there are any: what has a class counts as not zero.
    """
    order = planned_order(slice_axis, plan.transpose_forward)
    whole = to_plan_axes(slices, order)
    mm = tuple(spacing[axis] for axis in order)
    target = target_spacing(mm, configuration)
    box = nonzero_box(whole)
    inside = ...
    if plan.use_mask_for_norm:
        inside = nonzero_mask(whole[box])
        if mask is not None:
            inside |= to_plan_axes(mask, order)[box] > 0
    image = _normalised(whole[box].astype(np.float32), inside)
    shape = resampled_shape(image.shape, mm, target)
    image = resample_image(image, shape, separate_axis(mm, target))
    return PlannedImage(np.ascontiguousarray(image), box, whole.shape, mm, target, order)


def planned_shape(volume: PreparedVolume, plan: Plan, configuration: Configuration) -> tuple[int, ...]:
    """The shape of a scan at the plan's spacing, in its axes, with the zeros around it."""
    order = planned_order(volume.slice_axis, plan.transpose_forward)
    mm = [volume.spacing[axis] for axis in order]
    return resampled_shape([volume.shape[axis] for axis in order], mm, target_spacing(mm, configuration))


def target_spacing(spacing: Sequence[float], configuration: Configuration) -> tuple[float, ...]:
    """The spacing that a scan is brought to; in two dimensions its slices stay apart as they are."""
    along_slices = spacing[: 3 - len(configuration.spacing)]
    return (*along_slices, *configuration.spacing)


def _normalised(image: np.ndarray, inside: np.ndarray | EllipsisType) -> np.ndarray:
    """Mean 0 and standard deviation 1 of what is inside, changed in place."""
    part = image[inside]
    image[inside] = (part - part.mean()) / max(part.std(), LEAST_DEVIATION)
    return image


@dataclass(frozen=True)
class PlannedVolume:
    """A case as a plan wants it, opened from disk only when indexed.

    Attributes:
        id: of the case.
        folder: where its arrays lie.
        shape: D, H, W.
        class_places: how many places of each class are kept, background left out.
    """

    id: str
    folder: Path
    shape: tuple[int, int, int]
    class_places: tuple[int, ...]

    @property
    def image(self) -> np.ndarray:
        return open_array(self.folder / "image.npy")

    @property
    def mask(self) -> np.ndarray:
        return open_array(self.folder / "mask.npy")

    def place(self, of_class: int, number: int) -> tuple[int, ...]:
        """One of the places of a class, 1 the first."""
        places = open_array(self.folder / "places.npy")
        place = places[sum(self.class_places[: of_class - 1]) + number]
        return tuple(int(i) for i in np.unravel_index(place, self.shape))


def prepare_planned(
    volumes: Sequence[PreparedVolume],
    plan: Plan,
    configuration: Configuration,
    cache_dir: Path,
    track: Callable[[Iterable[PreparedVolume]], Iterable[PreparedVolume]] = iter,
) -> list[PlannedVolume]:
    """Every case as the plan wants it; those that are not in the cache yet are made.

    Args:
        track: wraps the iteration over volumes, for a progress bar.

    Raises:
        InputError: the cache folder cannot be written.
    """
    return [_prepare(volume, plan, configuration, cache_dir / "planned") for volume in track(volumes)]


def _prepare(volume: PreparedVolume, plan: Plan, configuration: Configuration, store: Path) -> PlannedVolume:
    order = planned_order(volume.slice_axis, plan.transpose_forward)
    target = target_spacing([volume.spacing[axis] for axis in order], configuration)
    made_from = [VERSION, volume.slices_sha256, volume.content_key, order, target, plan.use_mask_for_norm]
    folder = store / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    if not has_files(folder, FILES):
        with report_os_errors("written", f"--cache-dir={store.parent}"):
            _write(folder, volume, plan, configuration)
    described = json.loads((folder / "volume.json").read_text())
    return PlannedVolume(volume.id, folder, tuple(described["shape"]), tuple(described["class_places"]))


def _write(folder: Path, volume: PreparedVolume, plan: Plan, configuration: Configuration) -> None:
    planned = plan_image(volume.image, volume.slice_axis, volume.spacing, plan, configuration, volume.mask)
    classes = len(volume.class_voxels) - 1
    kind = np.int8 if classes <= np.iinfo(np.int8).max else np.int16
    mask = to_plan_axes(volume.mask, planned.order)[planned.box].astype(kind)
    nonzero = nonzero_mask(to_plan_axes(volume.image, planned.order)[planned.box])
    mask[(mask == 0) & ~nonzero] = OUTSIDE
    mask = np.ascontiguousarray(resample_mask(mask, planned.image.shape, planned.separate))
    draw = np.random.default_rng(0)
    places = [_some(np.flatnonzero(mask == k), draw) for k in range(1, len(volume.class_voxels))]
    described = {"shape": mask.shape, "class_places": [len(of_class) for of_class in places]}
    with create_folder_once(folder, FILES) as beside:
        np.save(beside / "image.npy", planned.image)
        np.save(beside / "mask.npy", mask)
        np.save(beside / "places.npy", np.concatenate(places))
        (beside / "volume.json").write_text(json.dumps(described))


def _some(places: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    kept = min(len(places), max(PLACES, int(np.ceil(len(places) * SHARE_OF_PLACES))))
    return draw.choice(places, kept, replace=False)


def require_fitting(plan: Plan, configuration: Configuration, volumes: Sequence[PreparedVolume], where: str) -> None:
    """Raise an InputError if a plan is of another kind of scans: of sides that differ by more than twice.

    Args:
        where: what to call the plan in the message.
    """
    data, axes, shapes = fingerprint(volumes), len(configuration.spacing), []
    for spacing, shape in zip(data.spacings, data.shapes_after_crop, strict=True):
        mm, size = ([of_axis[axis] for axis in plan.transpose_forward] for of_axis in (spacing, shape))
        shapes.append(resampled_shape(size, mm, target_spacing(mm, configuration)))
    found, planned = np.median(shapes, 0)[-axes:], np.array(configuration.median_image_size_in_voxels)
    if (np.maximum(found / planned, planned / found) > 2).any():
        here, there = ("×".join(f"{side:g}" for side in sides) for sides in (found, planned))
        raise InputError(
            f"{where}: does not fit the data: at its spacing the scans have {here} voxels (median), and it was made "
            f"for {there}; leave --model.plan out to plan anew, or give the plan of these data"
        )
