"""The atlas baseline: the mean training mask, placed without using the image.

The training masks are averaged in normalised coordinates, in which each axis of a case runs from 0 to 1. The mean is
thresholded at the value that is best on the validation masks. A network that does not beat the atlas baseline has
learned where the structure usually lies, but not what it looks like.

Voxel i of n lies at (i + ½) / n, both when masks are averaged and when the atlas is applied.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxla.config import InputError

GRID_SIZE = 48  # cells per axis of the atlas: finer than the anatomical variation between patients
THRESHOLDS = np.round(np.arange(0.05, 0.951, 0.05), 2)


@dataclass(frozen=True)
class Atlas:
    """The fraction of training masks in which each position belongs to each class."""

    probabilities: np.ndarray  # [K - 1, GRID_SIZE, GRID_SIZE, GRID_SIZE] float32, one map per foreground class
    threshold: float = 0.5  # a voxel is foreground if the probabilities of its classes sum to at least this


def build_atlas(masks: Iterable[np.ndarray], classes: int) -> Atlas:
    """Average the training masks, holding one at a time in memory.

    Args:
        masks: class indices [X, Y, Z], of any shape, all in the same orientation.
        classes: number of foreground classes.

    Raises:
        InputError: there are no masks.
    """
    total = np.zeros((classes, GRID_SIZE, GRID_SIZE, GRID_SIZE), np.float64)
    count = 0
    for mask in masks:
        count += 1
        for index in range(classes):
            total[index] += _to_grid(mask == index + 1)
    if count == 0:
        raise InputError("atlas baseline", "there is no training mask", "Add a training case.")
    return Atlas((total / count).astype(np.float32))


def choose_threshold(atlas: Atlas, validation_masks: Iterable[np.ndarray]) -> Atlas:
    """Return the atlas with the threshold of the best mean foreground Dice on the validation masks (ties: the lowest).

    A class that is neither predicted nor present counts as Dice 1, as by default in the metrics.

    Raises:
        InputError: there are no masks.
    """
    dice = [_dice_at_thresholds(atlas, mask) for mask in validation_masks]
    if not dice:
        raise InputError("atlas baseline", "there is no validation mask", "Add a validation case.")
    return replace(atlas, threshold=float(THRESHOLDS[np.argmax(np.mean(dice, axis=0))]))


def apply_atlas(atlas: Atlas, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the atlas as a prediction for a volume of shape [X, Y, Z]: class indices, uint8.

    A foreground voxel (see `Atlas.threshold`) gets the most probable foreground class.
    """
    classes = np.empty(shape, np.uint8)
    for slab, probabilities in _slabs(atlas, shape):
        foreground = probabilities.sum(axis=0) >= atlas.threshold
        classes[slab] = np.where(foreground, probabilities.argmax(axis=0) + 1, 0)
    return classes


def _dice_at_thresholds(atlas: Atlas, mask: np.ndarray) -> np.ndarray:
    """Return the mean foreground Dice of the atlas against one mask for each of `THRESHOLDS`, in a single pass."""
    classes = len(atlas.probabilities)
    # Voxels are counted by the number of thresholds that they pass. Summing these counts from the highest number down
    # gives the voxels that pass each threshold.
    predicted, common = (np.zeros((classes, len(THRESHOLDS) + 1), np.int64) for _ in range(2))
    for slab, probabilities in _slabs(atlas, mask.shape):
        passed = np.searchsorted(THRESHOLDS.astype(np.float32), probabilities.sum(axis=0), side="right")
        likeliest = probabilities.argmax(axis=0)
        for index in range(classes):
            chosen = likeliest == index
            predicted[index] += np.bincount(passed[chosen], minlength=len(THRESHOLDS) + 1)
            common[index] += np.bincount(passed[chosen & (mask[slab] == index + 1)], minlength=len(THRESHOLDS) + 1)
    predicted, common = (counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] for counts in (predicted, common))
    present = np.array([[np.count_nonzero(mask == index + 1)] for index in range(classes)])
    total = predicted + present
    return np.where(total == 0, 1.0, 2 * common / np.maximum(total, 1)).mean(axis=0)


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """Resample a binary mask to the atlas grid: [GRID_SIZE, GRID_SIZE, GRID_SIZE]."""
    occupied = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not occupied[0].size:
        return np.zeros((GRID_SIZE, GRID_SIZE, GRID_SIZE))
    box = tuple(slice(indices[0], indices[-1] + 1) for indices in occupied)  # zeros outside add nothing
    values = mask[box].astype(np.float32)
    for axis in range(3):
        weights = _interpolation_matrix(mask.shape[axis], GRID_SIZE)[:, box[axis]]
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values


def _slabs(atlas: Atlas, shape: tuple[int, int, int], rows: int = 32) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the atlas at the size of a volume in slabs of its first axis: (slab, [K - 1, rows, Y, Z])."""
    weights, along_y, along_z = (_interpolation_matrix(GRID_SIZE, size) for size in shape)
    planes = np.matmul(np.matmul(along_y, atlas.probabilities), along_z.T)  # [K - 1, GRID_SIZE, Y, Z]
    planes = planes.reshape(len(planes), GRID_SIZE, -1)
    for start in range(0, shape[0], rows):
        slab = slice(start, min(start + rows, shape[0]))
        values = np.matmul(weights[slab], planes)
        yield slab, values.reshape(len(planes), -1, *shape[1:])


def _interpolation_matrix(source: int, target: int) -> np.ndarray:
    """Return the matrix [target, source] of linear interpolation between voxel centres.

    For fewer target voxels, the triangular kernel is as wide as the step, so that every source voxel counts. Rows sum
    to 1.
    """
    step = source / target
    centres = (np.arange(target) + 0.5) * step - 0.5
    distance = np.abs(centres[:, None] - np.arange(source))
    weights = np.maximum(0, 1 - distance / max(1.0, step))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
