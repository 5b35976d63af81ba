"""Prepared volumes -> batches of slices, patches, or all of them, by Grain, in threads: arrays are memory-mapped."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from typing import NotRequired, Protocol, SupportsIndex, TypedDict

import grain.python as grain
import numpy as np

from jaxla.data.inputs import Canvas, mask_to_input
from jaxla.data.prepared import PreparedVolume

PASSES = 2**32  # over the data: as good as endless, and Grain can count the slices in them
READ_AHEAD, READ_AHEAD_BYTES = 4, 2**30  # batches, but not more than so many bytes of them: features may be large


class Batch(TypedDict):
    """One batch; the arrays' first axis is B."""

    input: np.ndarray  # [B, H, W, 1] float32, grey values in 0..1; or features [B, …]; patches and volumes have D
    image: NotRequired[np.ndarray]  # [B, H, W, 1], where the input is features and the network reads both
    mask: np.ndarray  # [B, H, W] uint8, class indices, or with D; of patches int8, -1 where the scan is zero
    volume: np.ndarray  # [B] int32, index of the volume the slice belongs to
    weight: np.ndarray  # [B] float32, 0 for slices that only fill the batch; of volumes [B, D]


class Source(Protocol):
    """What batches are read from.

    Attributes:
        units: how many there are of what Dice is averaged over; each row of a batch says which it belongs to.
        counted: that in words.
        rows: what one is called, and several are.
        slices: of a row, on average.
    """

    units: int
    counted: str
    rows: tuple[str, str]
    slices: float

    def __len__(self) -> int: ...

    def __getitem__(self, item: SupportsIndex) -> Batch: ...

    def order(self, seed: int) -> grain.MapDataset:
        """The rows that training reads, as good as endless."""
        ...


class ArraySource:
    """Images and masks that lie in memory, as a source of one-row batches without the axis B.

    Args:
        images: [N, H, W, C] float32.
        masks: [N, H, W] class indices.
    """

    counted, rows, slices = "per image", ("image", "images"), 1.0

    def __init__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self.images, self.masks, self.units = images, masks, len(images)

    def __len__(self) -> int:
        return self.units

    def order(self, seed: int) -> grain.MapDataset:
        """Return every image, in an order drawn anew in each pass."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(PASSES)

    def __getitem__(self, item: SupportsIndex) -> Batch:
        i = int(item)
        return Batch(input=self.images[i], mask=self.masks[i], volume=np.int32(i), weight=np.float32(1))


class SliceSource:
    """Every slice of the volumes, as a Grain random-access source of one-slice batches without the axis B.

    Args:
        canvas: the square that slices are laid on.
        features: of each volume, indexed by slice, where the network reads these instead of images.
        with_images: whether it reads the images beside the features.
    """

    counted, rows, slices = "per volume", ("slice", "slices"), 1.0

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        canvas: Canvas,
        features: Sequence[Sequence[np.ndarray]] | None = None,
        with_images: bool = False,
    ) -> None:
        self.volumes = volumes
        self.features, self.with_images = features, features is not None and with_images
        self.frames = [canvas.frame(v.shape[1:], v.spacing[1:]) for v in volumes]
        self.index = [(i, s) for i, volume in enumerate(volumes) for s in range(volume.shape[0])]
        self.units = len(volumes)

    def __len__(self) -> int:
        return len(self.index)

    def order(self, seed: int) -> grain.MapDataset:
        """Every slice, in an order drawn anew each pass."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(PASSES)

    def __getitem__(self, item: SupportsIndex) -> Batch:
        i, s = self.index[item]
        volume, frame = self.volumes[i], self.frames[i]
        image = {"image": volume.input(s, frame)} if self.with_images else {}
        return Batch(
            input=self.features[i][s] if self.features else volume.input(s, frame),
            mask=mask_to_input(volume.mask[s], frame),
            volume=np.int32(i),
            weight=np.float32(1),
            **image,
        )


class VolumeSource:
    """Whole volumes, as a Grain random-access source of one-volume batches without the axis B.

    Args:
        canvas: the square that slices are laid on.
        depth: D, up to which volumes are filled with empty slices, which come last and have weight 0.
        features: as of `SliceSource`.
    """

    counted, rows = "per volume", ("whole volume", "whole volumes")

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        canvas: Canvas,
        depth: int,
        features: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> None:
        self.of_slices, self.depth = SliceSource(volumes, canvas, features), depth
        self.units = len(volumes)
        self.firsts = np.cumsum([0, *(volume.shape[0] for volume in volumes)])
        self.slices = float(np.diff(self.firsts).mean())

    def __len__(self) -> int:
        return self.units

    def order(self, seed: int) -> grain.MapDataset:
        """Every volume, in an order drawn anew each pass."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(PASSES)

    def __getitem__(self, item: SupportsIndex) -> Batch:
        i = int(item)
        own = range(self.firsts[i], self.firsts[i + 1])
        volume = _read(self.of_slices, range(self.depth), np.arange(own.start, own.stop))
        return Batch(**{**volume, "volume": np.int32(i)})


def training_batches(source: Source, batch_size: int, seed: int, rows: range | None = None) -> grain.DatasetIterator:
    """An endless iterator of full batches, of slices in an order drawn anew each pass over them.

    Batches run on over the end of a pass, so no slice is dropped. The iterator's state can be saved and set; it is
    the same whatever rows are read.

    Args:
        rows: of each batch to read, where other processes read the others; those from `batch_size` on are fillers.
    """
    order = source.order(seed).batch(batch_size)
    rows = rows or range(batch_size)
    return iter(order.map(partial(_read, source, rows)).to_iter_dataset(_read_options(source, rows)))


def steps_per_epoch(source: Source, batch_size: int, asked: int = 0) -> int:
    """As many as are asked for; of 0, as many as take each row once."""
    return asked or -(-len(source) // batch_size)


def evaluation_batches(source: Source, batch_size: int, rows: range | None = None) -> Generator[Batch]:
    """Every slice once, in order; the last batch is filled up.

    To be closed by whoever leaves it early: its threads read ahead.

    Args:
        rows: as for `training_batches`.
    """
    order = grain.MapDataset.range(len(source)).batch(batch_size, drop_remainder=False)
    rows = rows or range(batch_size)
    read = order.map(partial(_read, source, rows)).to_iter_dataset(_read_options(source, rows))
    with closing(iter(read)) as batches:
        yield from batches


def sample_batch(source: Source, rows: range) -> Batch:
    """The first slice in every row, read-only: for what asks for shapes, before any batch is read."""
    return Batch(**{name: np.broadcast_to(value, (len(rows), *np.shape(value))) for name, value in source[0].items()})


def _read_options(source: Source, rows: range) -> grain.ReadOptions:
    """As many threads as batches are read ahead; each holds one."""
    of_batch = sum(array.nbytes for array in sample_batch(source, rows).values())
    ahead = min(max(1, READ_AHEAD_BYTES // of_batch), READ_AHEAD)
    return grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)


def _read(source: Source, rows: range, chosen: np.ndarray) -> Batch:
    """These rows of the batch of slices `chosen`; zeros, of weight 0, beyond its end."""
    own = chosen[rows.start : rows.stop]
    one = source[own[0] if len(own) else chosen[0]]
    batch = {key: np.zeros((len(rows), *np.shape(array)), array.dtype) for key, array in one.items()}
    for row, i in enumerate(own):  # one after the other: all slices beside their batch would be twice as much
        for key, array in (source[i] if row else one).items():
            batch[key][row] = array
    return Batch(**batch)
