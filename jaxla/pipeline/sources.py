"""What a run trains on and is judged by: slices, whole volumes, or patches as a plan has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxla.cli.terminal import track
from jaxla.config import Augmentation, Experiment, Training
from jaxla.data.batches import SliceSource, Source, VolumeSource
from jaxla.data.dataset import PreparedData
from jaxla.distributed import local_items
from jaxla.models.build import configuration_of, reads_volumes
from jaxla.nnunet.augmentation import initial_patch_size, make_augment
from jaxla.nnunet.patches import PatchSource
from jaxla.nnunet.plan import Plan
from jaxla.nnunet.preprocessing import preprocess_volumes
from jaxla.training.augmentation import augment
from jaxla.training.losses import Loss, cross_entropy, dice_cross_entropy, per_volume
from jaxla.training.step import Augment, Gradient, make_gradient
from jaxla.training.two_pass import make_two_pass_gradient

VALIDATION_STEPS = 5  # steps of training to one of validation, as nnU-Net has them
GRADIENTS = {"whole": make_gradient, "two_pass": make_two_pass_gradient}  # by the recipe's word for them
TRAIN, VAL = 0, 1  # so that the two draw other patches


class Sources(NamedTuple):
    """What the loop is given.

    Attributes:
        recipe: with the size of a batch as it is.
        augment: what is done to a batch on the device.
        loss_of: what is lowered.
        gradient_of: how its gradient is taken, as `fit` is given it.
    """

    train: Source
    val: Source
    recipe: Training
    augment: Augment | None
    loss_of: Loss
    gradient_of: Callable[..., Gradient] = make_gradient


def image_sources(
    experiment: Experiment,
    data: PreparedData,
    features: Mapping[str, Sequence[np.ndarray]] | None = None,
    with_images: bool = False,
) -> Sources:
    """Slices or whole volumes, as the network reads them; arguments as of `slice_sources`."""
    if reads_volumes(experiment.model):
        return volume_sources(experiment, data, features)
    return slice_sources(experiment, data, features, with_images)


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

    return Sources(
        source(data.split.train),
        source(data.split.val),
        experiment.training,
        _augment_of(experiment.augmentation),
        loss_of(experiment.training, batch_dice=True),
    )


def volume_sources(
    experiment: Experiment, data: PreparedData, features: Mapping[str, Sequence[np.ndarray]] | None = None
) -> Sources:
    """Whole volumes, all of them, filled up with empty slices to as many as the deepest has.

    Args:
        features: of their slices by case id, where the network reads these.
    """
    canvas, recipe = data.canvas(experiment.preprocessing), experiment.training
    deepest = max(volume.shape[0] for volume in data.of(data.split.train + data.split.val))

    def source(ids: Sequence[str]) -> VolumeSource:
        return VolumeSource(data.of(ids), canvas, deepest, features and [features[name] for name in ids])

    return Sources(
        source(data.split.train),
        source(data.split.val),
        recipe,
        _augment_of(experiment.augmentation),
        per_volume(loss_of(recipe, batch_dice=True)),
        GRADIENTS[recipe.gradient],
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
    first = local_items(ids)  # while other processes begin with others
    ids = list(dict.fromkeys((*first, *ids)))
    volumes = preprocess_volumes(track(data.of(ids), "resampling"), plan, configuration, cache_dir)
    by_id = {volume.id: volume for volume in volumes}
    patch, augmented = configuration.patch_size, experiment.augmentation.nnunet

    def source(part: Sequence[str], stream: int, size: Sequence[int], steps: int) -> PatchSource:
        length = steps * recipe.batch_size
        return PatchSource(
            [by_id[name] for name in part], size, patch, recipe.batch_size, (experiment.seed, stream), length
        )

    size = initial_patch_size(patch) if augmented else patch
    names = data.dataset.labels.names
    return Sources(
        source(data.split.train, TRAIN, size, recipe.steps),
        source(data.split.val, VAL, patch, max(1, recipe.steps // VALIDATION_STEPS)),
        recipe,
        make_augment(patch, len(names), plan.use_mask_for_norm) if augmented else background_inside,
        loss_of(recipe, configuration.batch_dice),
    )


def _augment_of(changes: Augmentation) -> Augment | None:
    return None if changes == Augmentation() else partial(augment, changes)


def background_inside(key: jax.Array, images: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Patches as they are, but that a mask has no places outside of the scan."""
    return images, jnp.maximum(masks, 0)


def loss_of(recipe: Training, batch_dice: bool) -> Loss:
    """The loss that a recipe names."""
    return cross_entropy if recipe.loss == "cross_entropy" else partial(dice_cross_entropy, batch_dice=batch_dice)
