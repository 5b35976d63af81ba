"""One sample is one random patch of a resampled scan, in 2D or 3D, as nnU-Net's plan specifies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import special

from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import track
from jaxla.config import Experiment, InputError, NetworkOptions, option
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.data.slices import SliceGeometry
from jaxla.distributed import barrier, is_first, local_items
from jaxla.inference.segment import Segmentation, SegmentSlices
from jaxla.models.networks.base import build_network
from jaxla.nnunet.augmentation import initial_patch_size, make_augment
from jaxla.nnunet.patches import PatchSource
from jaxla.nnunet.plan import ARCH_CONFIGURATIONS, Plan, describe_configuration, read_plan, write_plan
from jaxla.nnunet.planner import check_plan, plan_from_data, warn_unless_mri
from jaxla.nnunet.preprocessing import from_plan_axes, preprocess_image, preprocess_volumes
from jaxla.nnunet.tiles import count_tiles, make_tile_logits, resample_to_scan
from jaxla.tasks.base import Features, Sources, Task, make_loss
from jaxla.training.losses import Loss
from jaxla.training.step import Augment

PLAN = "plan.json"  # in the run folder
TRAIN_STEPS_PER_VAL_STEP = 5  # as in nnU-Net
TRAIN_STREAM, VAL_STREAM = 0, 1  # training and validation draw different patches


class PatchTask(Task):
    """Trains on random patches, and segments in overlapping tiles."""

    unit = "over all patches together"
    MIN_STEPS, MIN_BATCH_SIZE = 1, 0
    HAS_TIME_BUDGET = False

    def __init__(self, experiment: Experiment, outputs: int, plan: Plan) -> None:
        super().__init__(experiment, outputs)
        self.plan = plan
        self.configuration = self.model.configuration(plan, self.recipe.batch_size)
        depth = self.configuration.patch_size[0]
        size = "" if self._is_2d else f" of {depth} slices"
        self.sample = (f"patch{size}", f"patches{size}")

    @classmethod
    def from_data(cls, experiment: Experiment, data: PreparedData) -> Self:
        """Plan from the training and validation cases, or check the given plan on them.

        Test cases are not used, so the plan differs from one made from the whole folder.
        """
        model = experiment.method.model
        volumes = data.select_volumes(sorted(data.split.train + data.split.val))
        warn_unless_mri(data.dataset.root)
        if model.plan:
            plan = read_plan(Path(model.plan))
            check_plan(plan, ARCH_CONFIGURATIONS[model.arch], volumes, option("model.plan", model.plan))
        else:
            plan = plan_from_data(volumes, 1 + len(data.dataset.labels.names), model.memory_gb)
        return cls(experiment, data.dataset.labels.outputs, plan)

    @classmethod
    def from_run(cls, experiment: Experiment, outputs: int, extent: float, folder: Path) -> Self:
        return cls(experiment, outputs, read_plan(folder / PLAN))

    @property
    def _is_2d(self) -> bool:
        return len(self.configuration.patch_size) == 2

    @property
    def batch_size(self) -> int:
        return self.configuration.batch_size

    def save(self, folder: Path) -> None:
        """Write the plan, or raise an InputError if the run began with a different plan."""
        path = folder / PLAN
        if is_first() and not path.exists():
            with report_os_errors("written", path, "Fix this and rerun with --resume."):
                write_plan(path, self.plan)
        barrier()
        if read_plan(path)._replace(fingerprint=None) != self.plan._replace(fingerprint=None):
            problem = "differs from the plan that this command would use"
            raise InputError(path, problem, "Restore this file, or start a new run.")

    def describe(self, slice_counts: Collection[int]) -> str:
        return f"{self.model.arch}: {describe_configuration(self.configuration)}"

    def describe_input(self) -> str:
        sizes = (self.configuration.patch_size, self.configuration.spacing)
        patch, spacing = (" × ".join(f"{n:g}" for n in numbers) for numbers in sizes)
        return f"patches of {patch} voxels of {spacing} mm"

    def build_network(self, weights: str | None = None) -> nnx.Module:
        return build_network(self.model, self.outputs, self.experiment.seed, plan=self.plan)

    def make_sources(self, data: PreparedData, cache_dir: Path, features: Features | None = None) -> Sources:
        """Return random patches of the scans; scans that are not in the cache are resampled first."""
        ids = data.split.train + data.split.val
        ids = list(dict.fromkeys((*local_items(ids), *ids)))  # each process begins with different cases
        scans = track(data.select_volumes(ids), "resampling")
        planned = preprocess_volumes(scans, self.plan, self.configuration, cache_dir)
        by_id = {volume.id: volume for volume in planned}
        patch = self.configuration.patch_size
        steps = self.recipe.steps

        def make_source(ids: Sequence[str], stream: int, size: Sequence[int], steps: int) -> PatchSource:
            volumes = [by_id[name] for name in ids]
            seed = (self.experiment.seed, stream)
            return PatchSource(volumes, size, patch, self.batch_size, seed, steps * self.batch_size)

        read_size = initial_patch_size(patch) if self.experiment.method.augmentation.nnunet else patch
        train, val = data.split.train, data.split.val
        val_steps = max(1, steps // TRAIN_STEPS_PER_VAL_STEP)
        return Sources(
            make_source(train, TRAIN_STREAM, read_size, steps),
            make_source(val, VAL_STREAM, patch, val_steps) if val else None,
        )

    def samples_per_pass(self, volumes: Sequence[PreparedVolume]) -> int:
        return self.recipe.steps * self.batch_size

    @property
    def loss(self) -> Loss:
        return make_loss(self.recipe, self.configuration.batch_dice)

    @property
    def augment(self) -> Augment:
        if not self.experiment.method.augmentation.nnunet:
            return lambda key, images, masks: (images, jnp.maximum(masks, 0))  # outside the scan is background
        classes = max(1, self.outputs - 1)
        return make_augment(self.configuration.patch_size, classes, self.plan.use_mask_for_norm)

    def input_shape(self, slices: int) -> tuple[int, ...]:
        return (*self.configuration.patch_size, 1)

    def batches_to_segment(self, volumes: Sequence[PreparedVolume]) -> float:
        return count_tiles(volumes, self.plan, self.configuration) / self.batch_size

    @property
    def memory_advice(self) -> str:
        return f"Lower {option('model.memory_gb')}, or use a plan made for less memory."

    def make_segment(self, networks: Sequence[nnx.Module]) -> SegmentSlices:
        configuration = self.model.configuration(self.plan)
        tile_logits = make_tile_logits(networks, configuration)

        def segment(slices: np.ndarray, geometry: SliceGeometry, with_probabilities: bool = False) -> Segmentation:
            planned = preprocess_image(slices, geometry.axis, geometry.spacing, self.plan, configuration)
            classes = np.zeros(planned.shape, np.uint8)
            probabilities = None
            if with_probabilities:
                probabilities = np.zeros((*planned.shape, self.outputs), np.float32)
                if self.outputs > 1:
                    probabilities[..., 0] = 1  # the cropped part is background
            depth, *plane = planned.box
            rows = resample_to_scan(tile_logits(planned.image), planned)
            for z, logits in enumerate(rows, start=depth.start):
                classes[z, *plane] = logits[..., 0] > 0 if self.outputs == 1 else logits.argmax(-1)
                if probabilities is not None:
                    probabilities[z, *plane] = (
                        special.expit(logits) if self.outputs == 1 else special.softmax(logits, axis=-1)
                    )
            classes = from_plan_axes(classes, planned.order)
            return classes, probabilities if probabilities is None else from_plan_axes(probabilities, planned.order)

        return segment


def is_same_plan(model: NetworkOptions, folder: Path) -> bool:
    """Return whether a run in `folder` used the plan file in a network's options; true if there is none."""
    given, kept = getattr(model, "plan", ""), folder / PLAN
    return not given or not kept.exists() or read_plan(kept) == read_plan(Path(given))
