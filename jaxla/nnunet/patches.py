"""Random patches of planned volumes, as nnU-Net draws them: a third of a batch is sure to hold a structure.

Reference code: nnunetv2 2.8.1, `nnUNetDataLoader`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import grain.python as grain
import numpy as np

from jaxla.data.batches import MAX_PASSES, Batch
from jaxla.nnunet.preprocessing import OUTSIDE, PlannedVolume

SHARE_OF_STRUCTURES = 0.33  # of a batch's rows, the last ones, which lie around a voxel of some class


class PatchSource:
    """Patches by number, each drawn from the seed and its number alone, as one-row batches without the axis B.

    A patch lies in a volume drawn anew, anywhere in it, or around a voxel of one of its classes, each as likely. What
    of it lies beyond the volume is 0, in the mask -1.

    Args:
        volumes: to draw from.
        size: of what is read, [D, H, W] or [H, W] of slices.
        inner: of the part that is seen in the end, when the patch has been turned and scaled: a patch may reach so far
            beyond a volume that this part lies at its border.
        batch_size: rows of a batch.
        seed: numbers, of all patches.
        length: how many of them are read to judge an epoch.
    """

    units, counted = 1, "over all patches together"

    def __init__(
        self,
        volumes: Sequence[PlannedVolume],
        size: Sequence[int],
        inner: Sequence[int],
        batch_size: int,
        seed: Sequence[int],
        length: int,
    ) -> None:
        self.volumes, self.batch_size, self.seed, self.length = volumes, batch_size, seed, length
        self.of_slices = len(size) == 2
        self.size = np.array((1, *size) if self.of_slices else size)
        self.slices = 1.0 if self.of_slices else float(inner[0])
        self.rows = ("slice", "slices")
        if not self.of_slices:
            self.rows = tuple(f"{word} of {inner[0]} slices" for word in ("patch", "patches"))
        self.margin = self.size - np.array((1, *inner) if self.of_slices else inner)
        self.drawn_anywhere = round(batch_size * (1 - SHARE_OF_STRUCTURES))  # the first rows of a batch

    def __len__(self) -> int:
        return self.length

    def order(self, seed: int) -> grain.MapDataset:
        """One patch after the other; none comes twice."""
        return grain.MapDataset.range(MAX_PASSES)

    def __getitem__(self, item: SupportsIndex) -> Batch:
        number = int(item)
        draw = np.random.default_rng([*self.seed, number])
        volume = self.volumes[draw.integers(len(self.volumes))]
        around_structure = number % self.batch_size >= self.drawn_anywhere
        start = self._start(volume, draw, around_structure)
        image, mask = (
            _cut(array, start, self.size, fill) for array, fill in ((volume.image, 0), (volume.mask, OUTSIDE))
        )
        if self.of_slices:
            image, mask = image[0], mask[0]
        return Batch(input=image[..., None], mask=mask, volume=np.int32(0), weight=np.float32(1))

    def _start(self, volume: PlannedVolume, draw: np.random.Generator, around_structure: bool) -> np.ndarray:
        """The first voxel of a patch along each axis; it may lie before the volume's."""
        shape = np.array(volume.shape)
        beyond = np.maximum(self.margin, self.size - shape)
        first, last = -((beyond + 1) // 2), shape + (beyond + 1) // 2 - self.size
        present = [k for k, count in enumerate(volume.class_places, start=1) if count]
        if not around_structure or not present:
            return draw.integers(first, last + 1)
        chosen = present[draw.integers(len(present))]
        place = volume.place(chosen, int(draw.integers(volume.class_places[chosen - 1])))
        return np.maximum(first, np.array(place) - self.size // 2)


def _cut(array: np.ndarray, start: np.ndarray, size: np.ndarray, fill: int) -> np.ndarray:
    """The part of an array from `start`, which may lie beyond it."""
    part = np.full(size, fill, array.dtype)
    first, last = np.maximum(start, 0), np.minimum(start + size, array.shape)
    if (first < last).all():
        inside = tuple(slice(a, b) for a, b in zip(first - start, last - start, strict=True))
        part[inside] = array[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    return part
