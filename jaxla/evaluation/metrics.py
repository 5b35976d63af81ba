"""Segmentation metrics for one unit (a volume or a slice) and one class: a pair of binary masks.

The border of a mask is the mask minus its erosion with the face neighbourhood (6 voxels in 3D, 4 pixels in 2D);
everything outside the array is background. In a volume of one slice, the border lies in the plane of the slice, as in
2D; otherwise every voxel would be border. Distances are in millimetres, from the centre of each border voxel to the
nearest border voxel of the other mask. `METRICS` defines each metric; the definitions are MONAI's, without sub-voxel
surfaces.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

from jaxla.cli.terminal import plural
from jaxla.config import InputError, option

EmptyPolicy = Literal["one", "zero", "skip"]


class Metric(NamedTuple):
    """Description of a metric."""

    title: str  # title of its column in reports
    definition: str  # one line
    perfect: float = 1.0  # value for two equal masks, and for two empty masks if they count as perfect
    worst: float | None = 0.0  # value of a missed structure; None is the diagonal, in mm, of the volume or slice
    maximum: float = 1.0  # the largest possible value; the smallest is 0
    digits: int = 3  # number of printed decimals


def _surface_dice(mm: int) -> Metric:
    definition = f"fraction of both masks' border voxels within {mm} mm of the other's border"
    return Metric(f"NSD at {mm} mm", f"normalised surface Dice: {definition}")


_distance = partial(Metric, perfect=0.0, worst=None, maximum=math.inf, digits=2)
_size = partial(Metric, maximum=math.inf, digits=2)

METRICS = {  # in column order
    "dice": Metric("Dice", "2 |P ∩ R| / (|P| + |R|) over voxels of prediction P and reference R"),
    "iou": Metric("IoU", "|P ∩ R| / |P ∪ R| over voxels"),
    "precision": Metric("Precision", "|P ∩ R| / |P| over voxels"),
    "recall": Metric("Recall", "|P ∩ R| / |R| over voxels"),
    "nsd_1mm": _surface_dice(1),
    "nsd_2mm": _surface_dice(2),
    "hd_mm": _distance(
        "HD, mm",
        "Hausdorff distance: the largest distance from a border voxel of either mask to the other's border, in mm",
    ),
    "hd95_mm": _distance(
        "HD95, mm",
        "larger of the two directed 95th percentiles of border distances, in mm (not the percentile of all distances)",
    ),
    "assd_mm": _distance(
        "ASSD, mm", "average symmetric surface distance: mean of the border distances of both directions pooled, in mm"
    ),
}
SIZES = {  # by number of dimensions: prediction, reference
    3: {
        "volume_ml": _size("Volume, ml", "volume of the predicted mask, in ml"),
        "reference_volume_ml": _size("Reference volume, ml", "volume of the reference mask, in ml"),
    },
    2: {
        "area_mm2": _size("Area, mm²", "area of the predicted mask, in mm²"),
        "reference_area_mm2": _size("Reference area, mm²", "area of the reference mask, in mm²"),
    },
}
COLUMNS = METRICS | SIZES[3] | SIZES[2]

_WORST = "worst (overlaps 0, distances the diagonal of the volume or slice in mm)"
EMPTY_POLICIES = {
    "one": f"two empty masks count as perfect (overlaps 1, distances 0), one empty mask as {_WORST}",
    "zero": f"one or two empty masks count as {_WORST}",
    "skip": f"units with an empty reference are left out, a missed structure counts as {_WORST}",
}


def score(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], empty: EmptyPolicy = "one"
) -> dict[str, float | None]:
    """Compute all metrics of one binary mask against its reference.

    Args:
        prediction: boolean mask with 2 or 3 dimensions.
        reference: boolean mask of the same shape.
        spacing: millimetres per voxel along each axis, in the order of the array.
        empty: how a unit with an empty reference counts, a key of `EMPTY_POLICIES`.

    Returns:
        The `METRICS` and the two `SIZES` for that number of dimensions. All values are finite numbers, except with
        `skip` and an empty reference: all but the sizes are then None.

    Raises:
        InputError: the shapes differ, the masks do not have 2 or 3 dimensions, or the policy is unknown.
    """
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        shapes = f"the prediction has shape {prediction.shape}, the reference {reference.shape}"
        raise InputError("masks", shapes, "Resample the prediction onto the grid of the reference.")
    if reference.ndim not in SIZES or len(spacing) != reference.ndim:
        problem = f"{plural(reference.ndim, 'dimension')} and {plural(len(spacing), 'spacing')}"
        raise InputError("masks", problem, "Pass 2D or 3D masks, and one spacing for each dimension.")
    if empty not in EMPTY_POLICIES:
        raise InputError(option("empty", repr(empty)), "unknown policy", f"Use one of {', '.join(EMPTY_POLICIES)}.")

    extent = np.multiply(reference.shape, spacing)
    box = _bounding_box(prediction, reference)
    prediction, reference = prediction[box], reference[box]
    predicted, referenced = np.count_nonzero(prediction), np.count_nonzero(reference)

    if predicted and referenced:
        values = _overlaps(prediction, reference) | _surface_metrics(prediction, reference, spacing)
    else:
        values = _empty_mask_metrics(predicted + referenced == 0, referenced == 0, float(np.linalg.norm(extent)), empty)
    voxel_size = float(np.prod(spacing)) / (1000 if reference.ndim == 3 else 1)  # ml in 3D, mm² in 2D
    size, reference_size = SIZES[reference.ndim]
    return values | {size: predicted * voxel_size, reference_size: referenced * voxel_size}


def _empty_mask_metrics(both_empty: bool, reference_empty: bool, diagonal: float, empty: EmptyPolicy) -> dict:
    """Return the metrics of a unit with at least one empty mask."""
    if reference_empty and empty == "skip":
        return dict.fromkeys(METRICS)
    if both_empty and empty == "one":
        return {name: metric.perfect for name, metric in METRICS.items()}
    return {name: diagonal if metric.worst is None else metric.worst for name, metric in METRICS.items()}


def _overlaps(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    common = np.count_nonzero(prediction & reference)
    predicted, referenced = np.count_nonzero(prediction), np.count_nonzero(reference)
    return {
        "dice": 2 * common / (predicted + referenced),
        "iou": common / (predicted + referenced - common),
        "precision": common / predicted,
        "recall": common / referenced,
    }


def _surface_metrics(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    border, reference_border = _border(prediction, spacing), _border(reference, spacing)
    # Nearest neighbours give the same distances as a Euclidean distance transform, but time and memory grow with the
    # borders instead of the box around them, which a single stray voxel can extend to the whole volume.
    forth, _ = cKDTree(reference_border, balanced_tree=False).query(border)
    back, _ = cKDTree(border, balanced_tree=False).query(reference_border)
    pooled = np.concatenate([forth, back])
    return {
        "hd_mm": float(pooled.max()),
        "hd95_mm": float(max(np.percentile(forth, 95), np.percentile(back, 95))),
        "assd_mm": float(pooled.mean()),
        # A tolerance of a nanometre: a distance of 1 mm may be 1.0000000000000002 in floating point.
        "nsd_1mm": float(np.mean(pooled <= 1 + 1e-6)),
        "nsd_2mm": float(np.mean(pooled <= 2 + 1e-6)),
    }


def _border(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Return the centres of the border voxels of a mask, in mm: [N, dimensions]."""
    plane = np.squeeze(mask) if mask.ndim == 3 and mask.size > 1 else mask  # without the axis of a single slice
    interior = binary_erosion(plane).reshape(mask.shape)
    return np.argwhere(mask & ~interior) * np.asarray(spacing, float)


def _bounding_box(*masks: np.ndarray) -> tuple[slice, ...]:
    """Return the box around all masks plus one voxel, as far as the array reaches, so that erosion sees background."""
    box = []
    for axis in range(masks[0].ndim):
        other_axes = tuple({*range(masks[0].ndim)} - {axis})
        occupied = np.flatnonzero(np.any([mask.any(axis=other_axes) for mask in masks], axis=0))
        box.append(slice(max(occupied[0] - 1, 0), occupied[-1] + 2) if occupied.size else slice(0, 0))
    return tuple(box)
