"""What a run trains on and is judged by: slices, or patches as a plan has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxla.config import Augmentation, Experiment, Training
from jaxla.data.batches import SliceSource, Source
from jaxla.data.patches import PatchSource
from jaxla.data.planned import prepare_planned
from jaxla.devices.processes import share
from jaxla.models.build import configuration_of
from jaxla.pipeline.data import PreparedData
from jaxla.planning.plan import Plan
from jaxla.shell.terminal import track
from jaxla.training.augmentation import augment
from jaxla.training.losses import Loss, dice_cross_entropy, pixel_loss
from jaxla.training.nnunet_augmentation import make_augment, read_size
from jaxla.training.step import Augment

VALIDATION_STEPS = 5  # steps of training to one of validation, as nnU-Net has them
TRAIN, VAL = 0, 1  # so that the two draw other patches


class Sources(NamedTuple):
    """What the loop is given.

    Attributes:
        recipe: with the size of a batch as it is.
        augment: what is done to a batch on the device.
        loss_of: what is lowered.
    """

    train: Source
    val: Source
    recipe: Training
    augment: Augment | None
    loss_of: Loss


def slice_sources(
    experiment: Experiment,
    data: PreparedData,
    features: Mapping[str, Sequence[np.ndarray]] | None = None,
    with_images: bool = False,
) -> Sources:
    """Slices, all of them.

    Args:
        features: by case id, where the network reads these; `with_images` beside their images.
    """
    canvas = data.canvas(experiment.preprocessing)

    def source(ids: Sequence[str]) -> SliceSource:
        return SliceSource(data.of(ids), canvas, features and [features[name] for name in ids], with_images)

    changes = experiment.augmentation
    return Sources(
        source(data.split.train),
        source(data.split.val),
        experiment.training,
        None if changes == Augmentation() else partial(augment, changes),
        loss_of(experiment.training, batch_dice=True),
    )


def patch_sources(experiment: Experiment, data: PreparedData, plan: Plan, cache_dir: Path) -> Sources:
    """Random patches; the scans are brought to the plan's spacing first, where the cache has them not yet.

    Raises:
        InputError: the cache folder cannot be written.
    """
    recipe = experiment.training
    configuration = configuration_of(experiment.model, plan, recipe.batch_size)
    recipe = replace(recipe, batch_size=configuration.batch_size)
    ids = data.split.train + data.split.val
    first = share(ids)  # while other processes begin with others
    ids = list(dict.fromkeys((*first, *ids)))
    volumes = prepare_planned(
        data.of(ids), plan, configuration, cache_dir, lambda volumes: track(volumes, "resampling")
    )
    by_id = {volume.id: volume for volume in volumes}
    patch, augmented = configuration.patch_size, experiment.augmentation.nnunet

    def source(part: Sequence[str], stream: int, size: Sequence[int], steps: int) -> PatchSource:
        length = steps * recipe.batch_size
        return PatchSource(
            [by_id[name] for name in part], size, patch, recipe.batch_size, (experiment.seed, stream), length
        )

    size = read_size(patch) if augmented else patch
    names = data.dataset.labels.names
    return Sources(
        source(data.split.train, TRAIN, size, recipe.steps),
        source(data.split.val, VAL, patch, max(1, recipe.steps // VALIDATION_STEPS)),
        recipe,
        make_augment(patch, len(names), plan.use_mask_for_norm) if augmented else background_inside,
        loss_of(recipe, configuration.batch_dice),
    )


def background_inside(key: jax.Array, images: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Patches as they are, but that a mask has no places outside of the scan."""
    return images, jnp.maximum(masks, 0)


def loss_of(recipe: Training, batch_dice: bool) -> Loss:
    """The loss that a recipe names."""
    return pixel_loss if recipe.loss == "cross_entropy" else partial(dice_cross_entropy, batch_dice=batch_dice)
