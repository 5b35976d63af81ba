"""Segmentation metrics of one unit and one class: a volume, or a slice of it, as a pair of binary masks.

The surface of a mask is its border voxels: the mask minus its erosion with the face neighbourhood (6 voxels in 3D, 4
pixels in 2D), where everything outside the array is background. Distances run between the centres of border voxels, in
millimetres, from each one to the nearest of the other mask's. These are the definitions of MONAI's metrics, without
sub-voxel surfaces; `METRICS` says them one by one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

from jaxla.config import InputError

EmptyPolicy = Literal["one", "zero", "skip"]


class Metric(NamedTuple):
    """A row of a table of metrics.

    Attributes:
        title: of its column where people read it.
        definition: in a line.
        perfect: its value for two equal masks, and for two empty ones where these count as perfect.
        worst: what a missed structure counts; None: the diagonal of the unit in mm.
        digits: that are printed after the point.
    """

    title: str
    definition: str
    perfect: float = 1.0
    worst: float | None = 0.0
    digits: int = 3


_distance = partial(Metric, perfect=0.0, worst=None, digits=2)
_size = partial(Metric, digits=2)

METRICS = {  # in the order of the columns
    "dice": Metric("Dice", "2 |P ∩ R| / (|P| + |R|) over voxels of prediction P and reference R"),
    "iou": Metric("IoU", "|P ∩ R| / |P ∪ R| over voxels"),
    "precision": Metric("Precision", "|P ∩ R| / |P| over voxels"),
    "recall": Metric("Recall", "|P ∩ R| / |R| over voxels"),
    "nsd_1mm": Metric(
        "NSD at 1 mm", "normalised surface Dice: share of both masks' border voxels within 1 mm of the other's border"
    ),
    "nsd_2mm": Metric(
        "NSD at 2 mm", "normalised surface Dice: share of both masks' border voxels within 2 mm of the other's border"
    ),
    "hd_mm": _distance(
        "HD, mm",
        "Hausdorff distance: the largest distance from a border voxel of either mask to the other's border, in mm",
    ),
    "hd95_mm": _distance(
        "HD95, mm",
        "larger of the two directed 95th percentiles of border distances, in mm (not that of the pooled ones)",
    ),
    "assd_mm": _distance(
        "ASSD, mm",
        "average symmetric surface distance: mean of the border distances of both directions pooled, in mm",
    ),
}
SIZES = {  # by dimensions of the unit: of the prediction, of the reference
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

_WORST = "worst (overlaps 0, distances the diagonal of the unit in mm)"
EMPTY_POLICIES = {
    "one": f"both masks empty counts as perfect (overlaps 1, distances 0), one of them empty as {_WORST}",
    "zero": f"one or both masks empty counts as {_WORST}",
    "skip": f"units with an empty reference are left out, a missed structure counts as {_WORST}",
}


def score(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], empty: EmptyPolicy = "one"
) -> dict[str, float | None]:
    """All metrics of one binary mask against its reference.

    Args:
        prediction: boolean mask of 2 or 3 dimensions.
        reference: boolean mask of the same shape.
        spacing: millimetres per voxel along each axis, in the order of the array.
        empty: how a unit with an empty reference counts, a key of `EMPTY_POLICIES`.

    Returns:
        Those of `METRICS`, and the two `SIZES` of that number of dimensions. Every value is a finite number, except
        under "skip" with an empty reference: there all but the sizes are None.

    Raises:
        InputError: shapes differ, the number of dimensions is not 2 or 3, or `empty` is no policy.
    """
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        raise InputError(f"a prediction of shape {prediction.shape} cannot be scored against one of {reference.shape}")
    if reference.ndim not in SIZES or len(spacing) != reference.ndim:
        raise InputError(f"masks have 2 or 3 axes and as many spacings, not {reference.ndim} and {len(spacing)}")
    if empty not in EMPTY_POLICIES:
        raise InputError(f"unknown policy for empty masks: {empty!r}; choose one of {', '.join(EMPTY_POLICIES)}")

    extent = np.multiply(reference.shape, spacing)
    box = _bounding_box(prediction, reference)
    prediction, reference = prediction[box], reference[box]
    predicted, referenced = np.count_nonzero(prediction), np.count_nonzero(reference)

    if predicted and referenced:
        values = _overlaps(prediction, reference) | _surface_metrics(prediction, reference, spacing)
    else:
        values = _without_overlap(predicted + referenced == 0, referenced == 0, float(np.linalg.norm(extent)), empty)
    voxel = float(np.prod(spacing)) / (1000 if reference.ndim == 3 else 1)  # ml in 3D, mm² in 2D
    size, reference_size = SIZES[reference.ndim]
    return values | {size: predicted * voxel, reference_size: referenced * voxel}


def _without_overlap(both_empty: bool, reference_empty: bool, diagonal: float, empty: EmptyPolicy) -> dict:
    """The one place that says what a unit counts when at least one of its masks is empty."""
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
    # Nearest neighbours between border points: the very distances of a Euclidean distance transform, but time and
    # memory follow the borders and not the box around them, which one stray voxel can blow up to the whole volume.
    forth, _ = cKDTree(reference_border, balanced_tree=False).query(border)
    back, _ = cKDTree(border, balanced_tree=False).query(reference_border)
    pooled = np.concatenate([forth, back])
    return {
        "hd_mm": float(pooled.max()),
        "hd95_mm": float(max(np.percentile(forth, 95), np.percentile(back, 95))),
        "assd_mm": float(pooled.mean()),
        # A nanometre of grace: a distance that is 1 mm on paper may be 1.0000000000000002 in floating point.
        "nsd_1mm": float(np.mean(pooled <= 1 + 1e-6)),
        "nsd_2mm": float(np.mean(pooled <= 2 + 1e-6)),
    }


def _border(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Centres of the border voxels of a mask, in mm: [N, dimensions]."""
    return np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing, float)


def _bounding_box(*masks: np.ndarray) -> tuple[slice, ...]:
    """The box around all masks, one voxel wider where the array goes on, so that erosion sees the background there."""
    box = []
    for axis in range(masks[0].ndim):
        others = tuple(other for other in range(masks[0].ndim) if other != axis)
        occupied = np.flatnonzero(np.any([mask.any(axis=others) for mask in masks], axis=0))
        box.append(slice(max(occupied[0] - 1, 0), occupied[-1] + 2) if occupied.size else slice(0, 0))
    return tuple(box)
