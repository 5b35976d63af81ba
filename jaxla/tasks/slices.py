"""One sample is one slice: networks that read images [B, H, W, 1]."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from jaxla.cli.terminal import plural
from jaxla.config import Experiment, option
from jaxla.data.batches import SliceSource
from jaxla.data.dataset import PreparedData
from jaxla.data.inputs import Canvas, Frame, input_to_slice, intensity_range, slice_to_input
from jaxla.data.prepared import PreparedVolume
from jaxla.data.slices import SliceGeometry
from jaxla.inference.segment import Segmentation, SegmentSlices, classify, mean_probabilities, pad_rows
from jaxla.memory import require_memory
from jaxla.mesh import device_count, local_rows, shard_batch
from jaxla.models.ops.tiles import tile_starts
from jaxla.tasks.base import Features, Sources, Task
from jaxla.training.features import CachedFeatures, FeatureCache
from jaxla.training.patches import cut_patches
from jaxla.training.step import Augment

# (inputs of a scan's slices, slice count) -> probabilities [size, size, K] of each slice, in the network's pixels
SliceProbabilities = Callable[[Iterable[Any], int], Iterable[np.ndarray]]


class SliceTask(Task):
    """Trains on slices, each placed on a square canvas with a side of `extent` mm, or its own side if that is 0.

    With `preprocessing.patch_size`, a step cuts a random patch from each slice, and inference averages tiles.
    """

    sample = ("slice", "slices")
    TRAINS_ON_SLICES = True

    def __init__(self, experiment: Experiment, outputs: int, extent: float = 0.0) -> None:
        super().__init__(experiment, outputs)
        preprocessing = experiment.method.preprocessing
        self.canvas, self.tile_size = Canvas(preprocessing.image_size, extent), preprocessing.patch_size
        if self.tile_size:
            self.sample = ("patch of a slice", "patches of slices")
            self.tile_count = len(tile_starts(self.canvas.size, self.tile_size)) ** 2

    @classmethod
    def from_data(cls, experiment: Experiment, data: PreparedData) -> Self:
        extent = data.canvas(experiment.method.preprocessing).extent
        return cls(experiment, data.dataset.labels.outputs, extent)

    @classmethod
    def from_run(cls, experiment: Experiment, outputs: int, extent: float, folder: Path) -> Self:
        return cls(experiment, outputs, extent)

    @property
    def extent(self) -> float:
        return self.canvas.extent

    def is_cut(self, shape: Sequence[int], spacing: Sequence[float]) -> bool:
        return self.canvas.frame(tuple(shape[1:]), tuple(spacing[1:])).is_cropped

    def check_batch_size(self) -> None:
        super().check_batch_size()
        images = -(-self.batch_size // device_count())
        image_bytes = 4 * self.canvas.size**2 * (1 + 2 * self.model.neighbours) * images
        require_memory(image_bytes, self.batch_size, self.memory_advice)

    def describe(self, slice_counts: Collection[int]) -> str:
        return ""

    def describe_input(self) -> str:
        side, patch = self.canvas.size, self.tile_size
        patches = f"patches of {patch} × {patch} pixels from slices of " if patch else ""
        extent = f", {self.extent:.0f} × {self.extent:.0f} mm" if self.extent else ""
        count = 2 * self.model.neighbours
        neighbours = f", with {plural(count, 'neighbouring slice')}" if count else ""
        return f"{patches}{side} × {side} pixels{extent}{neighbours}"

    def make_sources(self, data: PreparedData, cache_dir: Path, features: Features | None = None) -> Sources:
        def make_source(ids: Sequence[str], foreground: float) -> SliceSource:
            volumes = data.select_volumes(ids)
            with_images = bool(features and features.with_images)
            arrays = features and [features.by_case[volume.id] for volume in volumes]
            return SliceSource(volumes, self.canvas, arrays, with_images, self.model.neighbours, foreground)

        train, val = data.split.train, data.split.val
        return Sources(make_source(train, self.recipe.foreground_fraction), make_source(val, 0) if val else None)

    def samples_per_pass(self, volumes: Sequence[PreparedVolume]) -> int:
        return sum(volume.shape[0] for volume in volumes)

    @property
    def augment(self) -> Augment | None:
        """The augmentation of a batch: patches are cut last, so that augmentation leaves no borders within slices."""
        change = super().augment
        if not self.tile_size:
            return change
        fraction = self.recipe.foreground_fraction

        def augment_and_cut(key: jax.Array, images: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
            change_key, cut_key = jax.random.split(key)
            if change is not None:
                images, masks = change(change_key, images, masks)
            return cut_patches(self.tile_size, fraction, cut_key, images, masks)

        return augment_and_cut

    @property
    def memory_advice(self) -> str:
        if not self.tile_size:
            return super().memory_advice
        return f"Lower {option('preprocessing.patch_size')} or {option('preprocessing.image_size')}."

    def explain_uncached(self, network: nnx.Module) -> str:
        if self.tile_size and self.model.backbone == "frozen":
            return "The frozen backbone runs in every epoch, because features of random patches cannot be cached."
        return super().explain_uncached(network)

    def make_feature_cache(self, network: nnx.Module, cache_dir: Path) -> FeatureCache:
        return FeatureCache(cache_dir, network, self.model.arch, self.canvas)

    def reduce_network(self, network: nnx.Module) -> nnx.Module:
        return network.on_features((self.canvas.size, self.canvas.size))

    def input_shape(self, slices: int) -> tuple[int, ...]:
        side = self.tile_size or self.canvas.size
        return (side, side, 1 + 2 * self.model.neighbours)

    def batches_to_segment(self, volumes: Sequence[PreparedVolume]) -> float:
        return self.samples_per_pass(volumes) / self.batch_size

    def make_segment(self, networks: Sequence[nnx.Module]) -> SegmentSlices:
        slice_probabilities = self.make_slice_probabilities(networks)

        def segment(slices: np.ndarray, geometry: SliceGeometry, with_probabilities: bool = False) -> Segmentation:
            frame = self.canvas.frame(slices.shape[1:], geometry.spacing[1:])
            grey_range = intensity_range(slices)
            inputs = (
                slice_to_input(slices, i, geometry.spacing[0], grey_range, frame, self.model.neighbours)
                for i in range(len(slices))
            )
            return to_scan(slice_probabilities(inputs, len(slices)), frame, slices.shape, with_probabilities)

        return segment

    def make_segment_features(
        self, networks: Sequence[nnx.Module]
    ) -> Callable[[PreparedVolume, CachedFeatures], np.ndarray]:
        slice_probabilities = self.make_slice_probabilities([self.reduce_network(network) for network in networks])
        reads_images = networks[0].reads_images

        def segment(volume: PreparedVolume, features: CachedFeatures) -> np.ndarray:
            frame = self.canvas.frame(volume.shape[1:], volume.spacing[1:])
            inputs: Iterable[Any] = features
            if reads_images:
                inputs = zip(features, (volume.input(s, frame) for s in range(volume.shape[0])), strict=True)
            return to_scan(slice_probabilities(inputs, volume.shape[0]), frame, volume.shape)[0]

        return segment

    def make_slice_probabilities(self, networks: Sequence[nnx.Module]) -> SliceProbabilities:
        """Return a function that applies networks to the slices of one scan, given their inputs."""
        flips = self.experiment.method.postprocessing.flips
        batch_probabilities = mean_probabilities(networks, flips, self.tile_size)
        batch_size = self.batch_size

        def slice_probabilities(inputs: Iterable[Any], count: int) -> Iterator[np.ndarray]:
            inputs = iter(inputs)
            while chosen := list(islice(inputs, batch_size)):
                batch = jax.tree.map(lambda *rows: pad_rows(rows, len(local_rows(batch_size))), *chosen)
                yield from np.asarray(batch_probabilities(shard_batch(batch)))[: len(chosen)]

        return slice_probabilities


def to_scan(
    outputs: Iterable[np.ndarray], frame: Frame, shape: tuple[int, int, int], with_probabilities: bool = False
) -> Segmentation:
    """Return classes [S, H, W] = `shape` and, if requested, probabilities [S, H, W, K], from `SliceProbabilities`."""
    classes, probabilities = np.empty(shape, np.uint8), None
    for index, output in enumerate(outputs):
        resized = input_to_slice(output, frame, shape[1:])
        classes[index] = classify(resized)
        if with_probabilities:
            if probabilities is None:
                probabilities = np.empty((*shape, resized.shape[-1]), np.float32)
            probabilities[index] = resized
    return classes, probabilities
