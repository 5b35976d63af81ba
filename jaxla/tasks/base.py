"""The base class of tasks: everything in a run that depends on the kind of training sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx

from jaxla.config import Augmentation, Experiment, InputError, Training, option
from jaxla.data.batches import Source, steps_per_epoch
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import process_count
from jaxla.inference.segment import SegmentSlices
from jaxla.mesh import device_count
from jaxla.models.networks.base import build_network
from jaxla.training.augmentation import augment
from jaxla.training.features import CachedFeatures, FeatureCache
from jaxla.training.losses import Loss, cross_entropy, dice_cross_entropy
from jaxla.training.step import Augment, MakeGradient, make_gradient
from jaxla.training.trainer import Trainer


class Features(NamedTuple):
    """Features of a frozen backbone, computed before training."""

    by_case: Mapping[str, CachedFeatures]
    with_images: bool  # whether the rest of the network also reads the images


class Sources(NamedTuple):
    """The training samples of a run, and the samples that are evaluated after each epoch."""

    train: Source
    val: Source | None  # None if there are no validation cases


class TooFewSteps(InputError):
    """The run ends before its first parameter update."""


class Task(ABC):
    """Training and inference of one kind of sample: slices, volumes or patches.

    Args:
        experiment: the experiment, with every option resolved.
        outputs: K, channels of the logits.

    Attributes:
        sample: the words for one sample and for several.
        unit: what validation averages Dice over, in words.
        MIN_STEPS, MIN_BATCH_SIZE: lower bounds of these options; 0 means that the value follows from the data.
        TRAINS_ON_SLICES: whether a sample is a slice or a patch of a slice; some options have an effect only then.
        HAS_TIME_BUDGET: whether `training.minutes` can determine the epochs and steps.
        extent: side in mm of the square canvas that all slices share; 0 if there is none.
        tile_size: side in pixels of the tiles in which validation and inference read a sample; 0 reads it whole.
        tile_count: number of these tiles in a sample.
    """

    sample: tuple[str, str]
    unit: ClassVar[str] = "per volume"
    extent: float = 0.0
    tile_size: int = 0
    tile_count: int = 1
    MIN_STEPS: ClassVar[int] = 0
    MIN_BATCH_SIZE: ClassVar[int] = 1
    TRAINS_ON_SLICES: ClassVar[bool] = False
    HAS_TIME_BUDGET: ClassVar[bool] = True

    def __init__(self, experiment: Experiment, outputs: int) -> None:
        self.experiment, self.outputs = experiment, outputs
        self.model, self.recipe = experiment.method.model, experiment.method.training

    @classmethod
    @abstractmethod
    def from_data(cls, experiment: Experiment, data: PreparedData) -> Self:
        """Return the task of a new run; raise an InputError if the method does not fit the data."""

    @classmethod
    @abstractmethod
    def from_run(cls, experiment: Experiment, outputs: int, extent: float, folder: Path) -> Self:
        """Return the task of an earlier run, whose `folder` contains the files of `save`."""

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        return self.recipe.batch_size

    @property
    def resolved_recipe(self) -> Training:
        """The recipe, with the batch size in use."""
        return replace(self.recipe, batch_size=self.batch_size)

    def with_recipe(self, recipe: Training) -> Self:
        """Return a copy of this task that trains with another recipe."""
        task = copy(self)
        task.recipe = recipe
        return task

    def save(self, folder: Path) -> None:
        """Save what `from_run` needs besides the record in the run folder; on resuming, check that it is unchanged."""

    @property
    def memory_advice(self) -> str:
        """Advice on how a training step can use less memory, in sentences."""
        return f"Lower {option('preprocessing.image_size')}."

    def check_batch_size(self) -> None:
        """Raise an InputError unless each device gets a sample of every batch."""
        if self.batch_size >= (devices := device_count()):
            return
        per_process = self.batch_size // process_count() * process_count()
        fewer = f"use {option('devices', per_process)}" if per_process else "start fewer processes"
        problem = f"too small for {devices} devices, each of which needs a sample"
        fix = f"Use a larger batch size, or {fewer}."
        raise InputError(option("training.batch_size", self.batch_size), problem, fix)

    def check_scan(self, scan: str | Path, slices: int) -> None:
        """Raise an InputError if a scan has too few slices for the network."""

    def is_cut(self, shape: Sequence[int], spacing: Sequence[float]) -> bool:
        """Return whether the network sees only the centre of slices of this shape [S, H, W] and spacing in mm."""
        return False

    @abstractmethod
    def describe(self, slice_counts: Collection[int]) -> str:
        """Return a log line about what the network sees of scans with these slice counts; "" if none is needed."""

    @abstractmethod
    def describe_input(self) -> str:
        """Describe one input of the network, such as `448 × 448 pixels`."""

    def build_network(self, weights: str | None = None) -> nnx.Module:
        """Build the untrained network; `weights` replaces the weights in the options.

        Raises:
            InputError: weights are missing or do not fit.
        """
        model = self.model if weights is None else self.model.with_weights(weights)
        return build_network(model, self.outputs, self.experiment.seed)

    @abstractmethod
    def make_sources(self, data: PreparedData, cache_dir: Path, features: Features | None = None) -> Sources:
        """Return the samples for training and validation: images, or features if given."""

    @abstractmethod
    def samples_per_pass(self, volumes: Sequence[PreparedVolume]) -> int:
        """Return the number of training samples in volumes."""

    def steps_per_epoch(self, volumes: Sequence[PreparedVolume]) -> int:
        """Return the number of steps of an epoch on these training volumes."""
        return self.recipe.steps or -(-self.samples_per_pass(volumes) // self.batch_size)

    @property
    def loss(self) -> Loss:
        """The loss `(logits, mask, weight) -> value`."""
        return make_loss(self.recipe, batch_dice=True)

    @property
    def augment(self) -> Augment | None:
        """The augmentation of a batch, run on the device; None if there is none."""
        changes = self.experiment.method.augmentation
        return None if changes == Augmentation() else partial(augment, changes)

    @property
    def make_gradient(self) -> MakeGradient:
        """The function that makes the gradient of the loss."""
        return make_gradient

    def make_trainer(self, network: nnx.Module, train: Source, features: Features | None = None) -> Trainer:
        """Assemble the trainer of a run; raise an InputError if it would never update the parameters."""
        steps = steps_per_epoch(train, self.batch_size, self.recipe.steps)
        is_length_known = self.recipe.steps or not self.recipe.minutes
        if is_length_known and (accumulated := self.recipe.accumulated_steps) > (total := steps * self.recipe.epochs):
            where = option("training.accumulated_steps", accumulated)
            raise TooFewSteps(where, f"more than the {total} steps of this run", "Use fewer, or train longer.")
        return Trainer(
            self.reduce_network(network) if features else network,
            self.resolved_recipe,
            steps,
            loss=self.loss,
            augment=self.augment,
            tile_size=self.tile_size,
            make_gradient=self.make_gradient,
            train_backbone=self.model.backbone == "finetuned",
            has_pretrained_backbone=self.model.weights != "random",
            seed=self.experiment.seed,
            memory_advice=self.memory_advice,
        )

    def explain_uncached(self, network: nnx.Module) -> str:
        """Return a sentence that says why the whole network runs in every epoch; "" if features can be cached."""
        if self.model.backbone != "frozen":
            return "The whole network is trained, so all of it runs in every epoch."
        if not self.recipe.cache_features:
            return "The frozen backbone runs in every epoch, because training.cache_features is false."
        if not hasattr(network, "on_features"):
            return f"The frozen {self.model.arch} runs in every epoch: features at several scales are not cached."
        if self.augment is not None:
            return "The frozen backbone runs in every epoch, because slices are augmented and cannot be cached."
        return ""

    def make_feature_cache(self, network: nnx.Module, cache_dir: Path) -> FeatureCache:
        """Return the cache of the frozen backbone's features."""
        raise NotImplementedError(f"{type(self).__name__} does not cache features")

    def reduce_network(self, network: nnx.Module) -> nnx.Module:
        """Return the part of the network that runs on cached features."""
        raise NotImplementedError(f"{type(self).__name__} does not train on features")

    @abstractmethod
    def input_shape(self, slices: int) -> tuple[int, ...]:
        """Return the shape [H, W, C] or [D, H, W, C] of one input; `slices`: slice count of the deepest volume."""

    def weight_shape(self, slices: int) -> tuple[int, ...]:
        """Return the shape of one sample's weight: [], or [D] if each slice has its own; `slices` as above."""
        return ()

    @abstractmethod
    def make_segment(self, networks: Sequence[nnx.Module]) -> SegmentSlices:
        """Return a function that segments a scan's slices; the logits of several networks are averaged."""

    def make_segment_features(self, networks: Sequence[nnx.Module]) -> Any:
        """Return `(volume, features) -> classes [S, H, W]` for networks that read cached features."""
        raise NotImplementedError(f"{type(self).__name__} does not segment features")

    @abstractmethod
    def batches_to_segment(self, volumes: Sequence[PreparedVolume]) -> float:
        """Return how many batches of `batch_size` samples it takes to segment volumes, for the time estimate."""


def make_loss(recipe: Training, batch_dice: bool) -> Loss:
    """Return the loss that a recipe names; with `batch_dice`, Dice is computed over a whole batch, not per sample."""
    if recipe.loss == "cross_entropy":
        return cross_entropy
    return partial(dice_cross_entropy, batch_dice=batch_dice, false_negative_weight=recipe.false_negative_weight)
