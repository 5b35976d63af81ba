"""Prepared volumes -> batches of slices, volumes or patches, read by Grain in threads from memory-mapped arrays."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from typing import NotRequired, SupportsIndex, TypedDict

import grain.python as grain
import numpy as np

from jaxla.data.inputs import Canvas, mask_to_input
from jaxla.data.prepared import PreparedVolume

MAX_PASSES = 2**32  # passes over the data: practically endless, but few enough for Grain to count the rows
MAX_BATCHES_AHEAD, MAX_BYTES_AHEAD = 4, 2**30  # limits on reading ahead; batches of features can be large


class Batch(TypedDict):
    """One batch; the first axis of every array is B. Volumes and 3D patches have an axis D after it."""

    input: np.ndarray  # [B, H, W, 1] float32, grey values in 0..1; or features [B, …]
    image: NotRequired[np.ndarray]  # [B, H, W, 1], if the input is features and the network reads images as well
    mask: np.ndarray  # [B, H, W] uint8, class indices; for patches int8, -1 where the scan is zero
    volume: np.ndarray  # [B] int32, index of the volume that the row belongs to
    weight: np.ndarray  # [B] float32, 0 for padding; for volumes [B, D]


class Source(ABC):
    """Random access to the rows of batches, each without the axis B."""

    units: int  # number of units over which Dice is averaged; a row's `volume` is the index of its unit
    averaging = "per volume"  # what Dice is averaged over, for messages
    slices = 1.0  # mean number of slices in a row

    def __len__(self) -> int:
        return self.units

    @abstractmethod
    def __getitem__(self, item: SupportsIndex) -> Batch: ...

    def order(self, seed: int) -> grain.MapDataset:
        """Return the order in which training reads the rows: practically endless, drawn anew for each pass."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(MAX_PASSES)


class ArraySource(Source):
    """Images [N, H, W, C] float32 and masks [N, H, W] of class indices in memory; a row is one of them."""

    averaging = "per image"

    def __init__(self, images: np.ndarray, masks: np.ndarray) -> None:
        self.images, self.masks, self.units = images, masks, len(images)

    def __getitem__(self, item: SupportsIndex) -> Batch:
        i = int(item)
        return Batch(input=self.images[i], mask=self.masks[i], volume=np.int32(i), weight=np.float32(1))


class SliceSource(Source):
    """All slices of the volumes; a row is one slice.

    Args:
        canvas: the square to which slices are padded.
        features: the features of each volume, indexed by slice, if the network reads these instead of images.
        with_images: whether the network reads the images as well as the features.
        neighbours: number of slices on each side that the network reads as further channels.
        foreground: fraction of the training rows that are drawn only from slices with a structure.
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        canvas: Canvas,
        features: Sequence[Sequence[np.ndarray]] | None = None,
        with_images: bool = False,
        neighbours: int = 0,
        foreground: float = 0.0,
    ) -> None:
        self.volumes, self.units = volumes, len(volumes)
        self.neighbours, self.foreground = neighbours, foreground
        self.features, self.with_images = features, features is not None and with_images
        self.frames = [canvas.frame(v.shape[1:], v.spacing[1:]) for v in volumes]
        self.index = [(i, s) for i, volume in enumerate(volumes) for s in range(volume.shape[0])]

    def __len__(self) -> int:
        return len(self.index)

    def order(self, seed: int) -> grain.MapDataset:
        """Return the order of all slices, with further slices that contain a structure at regular intervals."""
        order = super().order(seed)
        if not self.foreground:
            return order
        rows = np.flatnonzero(np.concatenate([volume.mask.any((1, 2)) for volume in self.volumes])).tolist()
        with_structure = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(MAX_PASSES)
        return grain.MapDataset.mix([order, with_structure], [1 - self.foreground, self.foreground])

    def __getitem__(self, item: SupportsIndex) -> Batch:
        i, s = self.index[item]
        volume, frame = self.volumes[i], self.frames[i]
        image = {"image": volume.input(s, frame)} if self.with_images else {}
        return Batch(
            input=self.features[i][s] if self.features else volume.input(s, frame, self.neighbours),
            mask=mask_to_input(volume.mask[s], frame),
            volume=np.int32(i),
            weight=np.float32(1),
            **image,
        )


class VolumeSource(Source):
    """All volumes; a row is one volume [D, …].

    Args:
        canvas, features: see `SliceSource`.
        depth: D, to which volumes are padded at the end with empty slices of weight 0.
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        canvas: Canvas,
        depth: int,
        features: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> None:
        self.slice_source = SliceSource(volumes, canvas, features)
        self.depth = depth
        self.units = len(volumes)
        self.starts = np.cumsum([0, *(volume.shape[0] for volume in volumes)])  # index of each volume's first slice
        self.slices = float(np.diff(self.starts).mean())

    def __getitem__(self, item: SupportsIndex) -> Batch:
        i = int(item)
        volume = _read_rows(self.slice_source, range(self.depth), np.arange(self.starts[i], self.starts[i + 1]))
        return Batch(**{**volume, "volume": np.int32(i)})


def training_batches(source: Source, batch_size: int, seed: int, rows: range | None = None) -> grain.DatasetIterator:
    """Return an endless iterator of full batches in the source's order.

    Batches continue across the end of a pass, so no row is dropped. The iterator's state can be saved and restored; it
    does not depend on `rows`.

    Args:
        rows: the rows of each batch to read, if other processes read the rest; rows from `batch_size` on are padding.
    """
    return iter(_read_batches(source, source.order(seed).batch(batch_size), rows or range(batch_size)))


def evaluation_batches(source: Source, batch_size: int, rows: range | None = None) -> Generator[Batch]:
    """Yield every row once, in order; the last batch is padded. For `rows`, see `training_batches`.

    Close the generator if you leave it early: its threads read ahead.
    """
    order = grain.MapDataset.range(len(source)).batch(batch_size, drop_remainder=False)
    with closing(iter(_read_batches(source, order, rows or range(batch_size)))) as batches:
        yield from batches


def steps_per_epoch(source: Source, batch_size: int, requested: int = 0) -> int:
    """Return the requested number of steps; 0 stands for as many as it takes to read each row once."""
    return requested or -(-len(source) // batch_size)


def sample_batch(source: Source, rows: range) -> Batch:
    """Return a read-only batch that repeats the first row, for code that needs the shapes before any batch is read."""
    return Batch(**{name: np.broadcast_to(value, (len(rows), *np.shape(value))) for name, value in source[0].items()})


def _read_batches(source: Source, order: grain.MapDataset, rows: range) -> grain.IterDataset:
    batch_bytes = sum(array.nbytes for array in sample_batch(source, rows).values())
    ahead = min(max(1, MAX_BYTES_AHEAD // batch_bytes), MAX_BATCHES_AHEAD)
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)  # each thread holds one batch
    return order.map(partial(_read_rows, source, rows)).to_iter_dataset(options)


def _read_rows(source: Source, rows: range, indices: np.ndarray) -> Batch:
    """Return `rows` of the batch with `indices` into the source; rows past the batch's end are zero, with weight 0."""
    local = indices[rows.start : rows.stop]
    first = source[local[0] if len(local) else indices[0]]
    batch = {name: np.zeros((len(rows), *np.shape(array)), array.dtype) for name, array in first.items()}
    for row, i in enumerate(local):  # one at a time: stacking a list of rows would need twice the memory
        for name, array in (source[i] if row else first).items():
            batch[name][row] = array
    return Batch(**batch)
