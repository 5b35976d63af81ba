"""One sample is one whole volume: networks that read all slices of a scan together, [B, D, H, W, 1]."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxla.config import option
from jaxla.data.batches import VolumeSource
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.inference.segment import mean_probabilities, pad_rows
from jaxla.mesh import local_rows, shard_batch
from jaxla.tasks.base import Features, Sources
from jaxla.tasks.slices import SliceProbabilities, SliceTask
from jaxla.training.losses import Loss, per_volume
from jaxla.training.step import MakeGradient, make_gradient
from jaxla.training.two_pass import make_two_pass_gradient

DEPTH_STEP = 16  # volumes are padded to a multiple of this many slices, so that few depths are compiled
GRADIENTS: dict[str, MakeGradient] = {"whole": make_gradient, "two_pass": make_two_pass_gradient}


class VolumeTask(SliceTask):
    """Trains on whole volumes, padded with empty slices to the depth of the deepest, with each slice on a canvas."""

    sample = ("whole volume", "whole volumes")
    TRAINS_ON_SLICES = False

    def check_scan(self, scan: str | Path, slices: int) -> None:
        self.model.check_depth(scan, slices)

    def describe(self, slice_counts: Collection[int]) -> str:
        return self.model.describe_depth(slice_counts)

    def describe_input(self) -> str:
        return f"whole volumes of {super().describe_input()}, windows: {self.model.windows}"

    def make_sources(self, data: PreparedData, cache_dir: Path, features: Features | None = None) -> Sources:
        parts = [data.select_volumes(ids) for ids in (data.split.train, data.split.val)]
        depth = max(volume.shape[0] for volumes in parts for volume in volumes)

        def make_source(volumes: Sequence[PreparedVolume]) -> VolumeSource:
            arrays = features and [features.by_case[volume.id] for volume in volumes]
            return VolumeSource(volumes, self.canvas, depth, arrays)

        train, val = parts
        return Sources(make_source(train), make_source(val) if val else None)

    def samples_per_pass(self, volumes: Sequence[PreparedVolume]) -> int:
        return len(volumes)

    @property
    def loss(self) -> Loss:
        return per_volume(super().loss)

    @property
    def make_gradient(self) -> MakeGradient:
        return GRADIENTS[self.recipe.gradient]

    @property
    def memory_advice(self) -> str:
        windows = f"Use {option('training.gradient', 'two_pass')} or more {option('model.windows')}."
        return f"{super().memory_advice} {windows}"

    def weight_shape(self, slices: int) -> tuple[int, ...]:
        return (slices,)

    def input_shape(self, slices: int) -> tuple[int, ...]:
        return (slices, *super().input_shape(slices))

    def make_slice_probabilities(self, networks: Sequence[nnx.Module]) -> SliceProbabilities:
        batch_probabilities = mean_probabilities(networks, self.experiment.method.postprocessing.flips)

        def slice_probabilities(inputs: Iterable[Any], count: int) -> np.ndarray:
            depth = -(-count // DEPTH_STEP) * DEPTH_STEP
            volume, present = pad_rows(list(inputs), depth), np.arange(depth) < count
            batch = [shard_batch(pad_rows([array], len(local_rows(1)))) for array in (volume, present)]
            return np.asarray(batch_probabilities(*batch)[0])[:count]

        return slice_probabilities
