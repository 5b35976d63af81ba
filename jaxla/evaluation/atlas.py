"""The floor every result has to clear: where the structure usually lies, said without a look at the image.

The training masks are averaged in normalised coordinates, each axis of a case running from 0 to 1, and the average is
cut at the threshold that does best on the validation masks. A network that does not beat this has learned the position
of the structure and nothing about its picture.

Voxel i of n lies at (i + ½) / n, on the way in and on the way back.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxla.config import InputError

GRID = 48  # cells per axis of the atlas: finer than masks of different patients agree
THRESHOLDS = np.round(np.arange(0.05, 0.951, 0.05), 2)


@dataclass(frozen=True)
class Atlas:
    """How often each place belongs to each class.

    probabilities: [K - 1, GRID, GRID, GRID] float32, one map per foreground class.
    threshold: a voxel is foreground where the classes' probabilities sum up to at least this.
    """

    probabilities: np.ndarray
    threshold: float = 0.5


def build_atlas(masks: Iterable[np.ndarray], classes: int) -> Atlas:
    """The mean of the training masks, one at a time, so that memory does not grow with their number.

    Args:
        masks: class indices [X, Y, Z], of any shapes, all in the same orientation.
        classes: how many foreground classes there are.

    Raises:
        InputError: there are no masks.
    """
    total = np.zeros((classes, GRID, GRID, GRID), np.float64)
    count = 0
    for count, mask in enumerate(masks, start=1):  # noqa: B007  (the count is read after the loop)
        for index in range(classes):
            total[index] += _to_grid(mask == index + 1)
    if count == 0:
        raise InputError("an atlas needs at least one training mask")
    return Atlas((total / count).astype(np.float32))


def choose_threshold(atlas: Atlas, validation_masks: Iterable[np.ndarray]) -> Atlas:
    """The same atlas with the threshold of the best mean foreground Dice over the validation masks (ties: the lowest).

    A class that is neither predicted nor present counts as 1, as in the metrics' default.

    Raises:
        InputError: there are no masks.
    """
    dice = [_dice_at_thresholds(atlas, mask) for mask in validation_masks]
    if not dice:
        raise InputError("choosing the atlas threshold needs at least one validation mask")
    return replace(atlas, threshold=float(THRESHOLDS[np.argmax(np.mean(dice, axis=0))]))


def apply_atlas(atlas: Atlas, shape: tuple[int, int, int]) -> np.ndarray:
    """The atlas as a prediction for a volume of that shape: class indices [X, Y, Z] uint8.

    A voxel is foreground where the foreground probabilities sum up to at least the threshold, and then gets the most
    probable of the foreground classes.
    """
    labels = np.empty(shape, np.uint8)
    for slab, probabilities in _slabs(atlas, shape):
        foreground = probabilities.sum(axis=0) >= atlas.threshold
        labels[slab] = np.where(foreground, probabilities.argmax(axis=0) + 1, 0)
    return labels


def _dice_at_thresholds(atlas: Atlas, mask: np.ndarray) -> np.ndarray:
    """Mean foreground Dice of the atlas against one mask at each of `THRESHOLDS`, from one pass over the voxels."""
    classes = len(atlas.probabilities)
    # Voxels counted by how many thresholds they pass; summed from the top, that is how many pass each threshold.
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
    both = predicted + present
    return np.where(both == 0, 1.0, 2 * common / np.maximum(both, 1)).mean(axis=0)


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """A binary mask over its whole extent, resampled to the atlas grid: [GRID, GRID, GRID]."""
    occupied = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not occupied[0].size:
        return np.zeros((GRID, GRID, GRID))
    box = tuple(slice(places[0], places[-1] + 1) for places in occupied)  # zeros outside it add nothing
    values = mask[box].astype(np.float32)
    for axis in range(3):
        weights = _resampling(mask.shape[axis], GRID)[:, box[axis]]
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values


def _slabs(atlas: Atlas, shape: tuple[int, int, int], rows: int = 32) -> Iterator[tuple[slice, np.ndarray]]:
    """The atlas at the size of a volume, some rows of its first axis at a time: (rows, [K - 1, rows, Y, Z])."""
    weights, along_y, along_z = (_resampling(GRID, size) for size in shape)
    planes = np.matmul(np.matmul(along_y, atlas.probabilities), along_z.T)  # [K - 1, GRID, Y, Z]
    planes = planes.reshape(len(planes), GRID, -1)
    for start in range(0, shape[0], rows):
        slab = slice(start, min(start + rows, shape[0]))
        values = np.matmul(weights[slab], planes)
        yield slab, values.reshape(len(planes), -1, *shape[1:])


def _resampling(source: int, target: int) -> np.ndarray:
    """Linear interpolation of `source` samples to `target` ones, half-voxel centred, as a matrix [target, source].

    To fewer samples the triangle is widened to the step, so that every source voxel counts. Rows sum to 1.
    """
    step = source / target
    centres = (np.arange(target) + 0.5) * step - 0.5
    distance = np.abs(centres[:, None] - np.arange(source))
    weights = np.maximum(0, 1 - distance / max(1.0, step))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
