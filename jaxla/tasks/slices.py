"""One sample is one slice: networks that read images [B, H, W, 1]."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from jaxla.config import Experiment
from jaxla.data.batches import SliceSource
from jaxla.data.dataset import PreparedData
from jaxla.data.inputs import Canvas, Frame, image_to_input, input_to_slice, intensity_range
from jaxla.data.prepared import PreparedVolume
from jaxla.data.volumes import SliceGeometry
from jaxla.distributed import device_count, local_rows, shard_batch
from jaxla.inference.segment import Segmented, SegmentSlices, classify, mean_probabilities, pad_rows
from jaxla.memory import require_memory
from jaxla.tasks.base import Features, Sources, Task
from jaxla.training.features import CachedFeatures, FeatureCache

# (inputs of the slices in turn, frame, (S, H, W), with_probabilities) -> classes [S, H, W], probabilities [S, H, W, K]
SegmentInputs = Callable[[Iterable[Any], Frame, tuple[int, int, int], bool], Segmented]


class SliceTask(Task):
    """Trains on slices, each laid on a square canvas.

    Args:
        extent: side of the canvas in mm; 0 if each slice has its own square.
    """

    sample = ("slice", "slices")

    def __init__(self, experiment: Experiment, outputs: int, extent: float = 0.0) -> None:
        super().__init__(experiment, outputs)
        self.canvas = Canvas(experiment.method.preprocessing.image_size, extent)

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
        require_memory(4 * self.canvas.size**2 * images, self.batch_size)  # the images alone

    def describe(self, slice_counts: Collection[int]) -> str:
        return ""

    def describe_input(self) -> str:
        side = self.canvas.size
        extent = f", {self.extent:.0f} × {self.extent:.0f} mm" if self.extent else ""
        return f"{side} × {side} pixels{extent}"

    def make_sources(self, data: PreparedData, cache_dir: Path, features: Features | None = None) -> Sources:
        def make_source(volumes: Sequence[PreparedVolume]) -> SliceSource:
            arrays = features and [features.by_case[volume.id] for volume in volumes]
            return SliceSource(volumes, self.canvas, arrays, with_images=bool(features and features.with_images))

        return Sources(*(make_source(data.select_volumes(ids)) for ids in (data.split.train, data.split.val)))

    def samples_per_pass(self, volumes: Sequence[PreparedVolume]) -> int:
        return sum(volume.shape[0] for volume in volumes)

    def make_feature_cache(self, network: nnx.Module, cache_dir: Path) -> FeatureCache:
        return FeatureCache(cache_dir, network, self.model.arch, self.canvas)

    def reduce_network(self, network: nnx.Module) -> nnx.Module:
        return network.on_features((self.canvas.size, self.canvas.size))

    def input_shape(self, slices: int) -> tuple[int, ...]:
        return (self.canvas.size, self.canvas.size, 1)

    def batches_to_segment(self, volumes: Sequence[PreparedVolume]) -> float:
        return self.samples_per_pass(volumes) / self.batch_size

    def make_segment(self, networks: Sequence[nnx.Module]) -> SegmentSlices:
        segment_inputs = self.make_segment_inputs(networks)

        def segment(slices: np.ndarray, geometry: SliceGeometry, with_probabilities: bool = False) -> Segmented:
            frame = self.canvas.frame(slices.shape[1:], geometry.spacing[1:])
            grey_range = intensity_range(slices)
            inputs = (image_to_input(pixels, grey_range, frame) for pixels in slices)
            return segment_inputs(inputs, frame, slices.shape, with_probabilities)

        return segment

    def make_segment_features(
        self, networks: Sequence[nnx.Module]
    ) -> Callable[[PreparedVolume, CachedFeatures], np.ndarray]:
        segment_inputs = self.make_segment_inputs([self.reduce_network(network) for network in networks])
        reads_images = networks[0].READS_IMAGES

        def segment(volume: PreparedVolume, features: CachedFeatures) -> np.ndarray:
            frame = self.canvas.frame(volume.shape[1:], volume.spacing[1:])
            inputs: Iterable[Any] = features
            if reads_images:
                inputs = zip(features, (volume.input(s, frame) for s in range(volume.shape[0])), strict=True)
            return segment_inputs(inputs, frame, volume.shape, False)[0]

        return segment

    def make_segment_inputs(self, networks: Sequence[nnx.Module]) -> SegmentInputs:
        """Return a function that segments the slices of one scan, given the network's input for each."""
        probabilities_of_batch = mean_probabilities(networks)
        batch_size = self.batch_size

        def segment_inputs(
            inputs: Iterable[Any], frame: Frame, shape: tuple[int, int, int], with_probabilities: bool
        ) -> Segmented:
            inputs = iter(inputs)
            result = SlicesResult(frame, shape, with_probabilities)
            for start in range(0, shape[0], batch_size):
                chosen = list(islice(inputs, batch_size))
                batch = jax.tree.map(lambda *rows: pad_rows(rows, len(local_rows(batch_size))), *chosen)
                outputs = np.asarray(probabilities_of_batch(shard_batch(batch)))
                for i in range(len(chosen)):
                    result.add(start + i, outputs[i])
            return result.classes, result.probabilities

        return segment_inputs


class SlicesResult:
    """Classes [S, H, W] and, if asked for, probabilities [S, H, W, K] of a scan, collected slice by slice."""

    def __init__(self, frame: Frame, shape: tuple[int, int, int], with_probabilities: bool) -> None:
        self.frame, self.shape, self.with_probabilities = frame, shape, with_probabilities
        self.classes = np.empty(shape, np.uint8)
        self.probabilities: np.ndarray | None = None

    def add(self, index: int, output: np.ndarray) -> None:
        """Add a slice's probabilities [size, size, K] in the network's input pixels."""
        probabilities = input_to_slice(output, self.frame, self.shape[1:])
        self.classes[index] = classify(probabilities)
        if self.with_probabilities:
            if self.probabilities is None:
                self.probabilities = np.empty((*self.shape, probabilities.shape[-1]), np.float32)
            self.probabilities[index] = probabilities
