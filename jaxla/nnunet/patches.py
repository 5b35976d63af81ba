"""Random patches of preprocessed volumes, as nnU-Net draws them: about a third are centred on a structure.

Reference code: nnunetv2 2.8.1, `nnUNetDataLoader`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import grain.python as grain
import numpy as np

from jaxla.data.batches import MAX_PASSES, Batch, Source
from jaxla.nnunet.preprocessing import OUTSIDE, PreprocessedVolume

FOREGROUND_FRACTION = 0.33  # fraction of the rows of a batch, the last ones, that are centred on a voxel of a class


class PatchSource(Source):
    """Patches by index, as one-row batches without the axis B; each depends only on the seed and its index.

    A patch is drawn from a random volume: anywhere in it, or around a voxel of a random class. Beyond the volume the
    image is 0 and the mask -1.

    Args:
        volumes: volumes to draw from.
        initial_size: voxels to read, [D, H, W], or [H, W] for slices; see `augmentation.initial_patch_size`.
        patch_size: voxels that remain in the centre after augmentation. Patches reach beyond the volume only as far as
            needed for this centre to touch its border.
        batch_size: rows per batch.
        seed: the seed of all patches.
        length: number of patches that validation reads.
    """

    units = 1
    averaging = "over all patches together"

    def __init__(
        self,
        volumes: Sequence[PreprocessedVolume],
        initial_size: Sequence[int],
        patch_size: Sequence[int],
        batch_size: int,
        seed: Sequence[int],
        length: int,
    ) -> None:
        self.volumes, self.batch_size, self.seed, self.length = volumes, batch_size, seed, length
        self.is_2d = len(patch_size) == 2
        self.size = np.array((1, *initial_size) if self.is_2d else initial_size)
        self.margin = self.size - np.array((1, *patch_size) if self.is_2d else patch_size)
        self.slices = 1.0 if self.is_2d else float(patch_size[0])
        self.random_rows = round(batch_size * (1 - FOREGROUND_FRACTION))  # the first rows, drawn from anywhere

    def __len__(self) -> int:
        return self.length

    def order(self, seed: int) -> grain.MapDataset:
        """Return the indices of patches; none repeats."""
        return grain.MapDataset.range(MAX_PASSES)

    def __getitem__(self, item: SupportsIndex) -> Batch:
        patch_index = int(item)
        rng = np.random.default_rng([*self.seed, patch_index])
        volume = self.volumes[rng.integers(len(self.volumes))]
        start = self._draw_start(volume, rng, needs_foreground=patch_index % self.batch_size >= self.random_rows)
        image, mask = _cut(volume.image, start, self.size, 0), _cut(volume.mask, start, self.size, OUTSIDE)
        if self.is_2d:
            image, mask = image[0], mask[0]
        return Batch(input=image[..., None], mask=mask, volume=np.int32(0), weight=np.float32(1))

    def _draw_start(self, volume: PreprocessedVolume, rng: np.random.Generator, needs_foreground: bool) -> np.ndarray:
        """Return a patch's first voxel along each axis, which may lie before the volume's."""
        shape = np.array(volume.shape)
        overhang = (np.maximum(self.margin, self.size - shape) + 1) // 2
        first, last = -overhang, shape + overhang - self.size
        classes = [k for k, count in enumerate(volume.location_counts, start=1) if count]
        if not needs_foreground or not classes:
            return rng.integers(first, last + 1)
        chosen = classes[rng.integers(len(classes))]
        location = volume.location(chosen, int(rng.integers(volume.location_counts[chosen - 1])))
        return np.maximum(first, np.array(location) - self.size // 2)


def _cut(array: np.ndarray, start: np.ndarray, size: np.ndarray, fill: int) -> np.ndarray:
    """Return the part of an array with this start and size, filled with `fill` where it reaches beyond the array."""
    part = np.full(size, fill, array.dtype)
    first, last = np.maximum(start, 0), np.minimum(start + size, array.shape)
    if (first < last).all():
        inside = tuple(slice(a, b) for a, b in zip(first - start, last - start, strict=True))
        part[inside] = array[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    return part
