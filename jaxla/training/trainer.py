"""The trainer: a network with its loss, optimiser, compiled step and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxla.cli.process import Stopped
from jaxla.cli.terminal import show_elapsed
from jaxla.config import Training
from jaxla.data.batches import Source, evaluation_batches
from jaxla.hardware import require_float32
from jaxla.memory import program_bytes, require_memory
from jaxla.mesh import constrain_sharding, local_rows, place_on_devices, shard_batch
from jaxla.training.losses import Loss, cross_entropy
from jaxla.training.optimisers import make_optimiser, make_rates
from jaxla.training.step import Augment, Frozen, MakeGradient, make_evaluation, make_gradient, make_step, split_network


class Validation(NamedTuple):
    """Loss per sample; Dice and IoU per unit of the source, such as a volume, in the network's input pixels."""

    loss: float
    dice: float
    iou: float


class Trainer:
    """Trains one network, step by step, as a recipe describes.

    Args:
        network: a Flax NNX module, called with the `input` of batches, such as images [B, H, W, C], and returning
            logits [B, H, W, K]; see `jaxla.models.networks`.
        recipe: optimiser, schedule and batch size.
        steps_per_epoch: number of steps per epoch, for the schedule.
        loss: `(logits, mask, weight) -> value`.
        augment: `(key, images, masks) -> (images, masks)`, run on the device as part of the step.
        tile_size: side of the tiles that validation averages, if `augment` cuts patches; 0 reads whole images.
        make_gradient: makes the function that computes the gradient.
        train_backbone: whether the network's attribute `backbone` is trained; ignored if there is none.
        has_pretrained_backbone: whether the backbone has its own learning rate.
        seed: seed of augmentation.
        memory_advice: advice on using less memory, for the error message if a step needs too much.

    Attributes:
        trainable, frozen, optimiser_state: the state between two steps.

    Raises:
        InputError: JAX computes in float64.
        ValueError: the network draws random numbers during training.
    """

    def __init__(
        self,
        network: nnx.Module,
        recipe: Training,
        steps_per_epoch: int,
        *,
        loss: Loss = cross_entropy,
        augment: Augment | None = None,
        tile_size: int = 0,
        make_gradient: MakeGradient = make_gradient,
        train_backbone: bool = True,
        has_pretrained_backbone: bool = False,
        seed: int = 0,
        memory_advice: str = "",
    ) -> None:
        require_float32()
        self.memory_advice = memory_advice
        self.recipe, self.steps_per_epoch, self.seed = recipe, steps_per_epoch, seed
        parts = split_network(network, train_backbone)
        statistics = nnx.filter_state(parts.frozen.statistics, nnx.BatchStat)
        optimiser = make_optimiser(recipe, has_pretrained_backbone, statistics)
        gradient = make_gradient(parts.training, augment, loss)
        self._gradient = jax.jit(gradient)
        self._step: Callable = make_step(gradient, optimiser)
        self._evaluate = make_evaluation(parts.evaluation, loss, tile_size)
        self._rates = make_rates(recipe, steps_per_epoch * recipe.epochs)
        self._graph = parts.evaluation
        self._key = jax.random.key(seed)
        # The optimiser's state is sharded like the parameters. A step donates the buffers of what it trains:
        # without a mesh, these are the buffers of the given network, which can no longer be used.
        self.trainable = place_on_devices(parts.trainable)
        self.optimiser_state = jax.jit(lambda trainable: constrain_sharding(optimiser.init(trainable)))(self.trainable)
        self.frozen: Frozen = place_on_devices(parts.frozen)

    @property
    def kept_state(self) -> tuple[Any, Frozen]:
        """The evaluated and saved state: `trainable` and `frozen`, or their running mean if the recipe averages."""
        if not self.recipe.average_decay:
            return self.trainable, self.frozen
        state = self.optimiser_state[-1]
        statistics = nnx.merge_state(self.frozen.statistics, state.statistics)
        return state.average, self.frozen._replace(statistics=statistics)

    def compile(self, batch: Any) -> int:
        """Compile the step for batches like this one, and return the bytes of device memory that it needs.

        Raises:
            InputError: the device has less memory.
        """
        arguments = (self.trainable, self.frozen, self.optimiser_state, shard_batch(batch), self._key, self._rates(0))
        with show_elapsed("compiling the training step"):
            self._step = self._step.lower(*arguments).compile()
        needed = program_bytes(self._step)
        require_memory(needed, self.recipe.batch_size, self.memory_advice)
        return needed

    def step(self, batch: Any, step_index: int) -> jax.Array:
        """Take a step on a batch and return its loss, without waiting for it.

        Args:
            step_index: index of the step since the start of training; sets its augmentation and learning rate.
        """
        key = jax.random.fold_in(self._key, step_index)
        self.trainable, statistics, self.optimiser_state, loss = self._step(
            self.trainable, self.frozen, self.optimiser_state, shard_batch(batch), key, self._rates(step_index)
        )
        self.frozen = self.frozen._replace(statistics=statistics)
        return loss

    def gradients(self, batch: Any) -> tuple[jax.Array, Any]:
        """Return the loss of a batch and its gradients with respect to `trainable`, without taking a step."""
        loss, gradients, _ = self._gradient(self.trainable, self.frozen, shard_batch(batch), self._key)
        return loss, gradients

    def evaluate(self, batch: Any) -> Any:
        """Return the loss and overlap counts of a batch (see `Evaluation`)."""
        return self._evaluate(*self.kept_state, shard_batch(batch))

    def validate(self, source: Source, stop_requested: Callable[[], bool] = lambda: False) -> Validation:
        """Evaluate all samples of a source.

        Classes are averaged within a unit, then units; a class absent from both mask and prediction counts as 1.

        Raises:
            Stopped: a stop was requested before the end.
        """
        counts: np.ndarray | None = None
        loss_sum = weight_sum = 0.0
        batch_size = self.recipe.batch_size
        with closing(evaluation_batches(source, batch_size, local_rows(batch_size))) as batches:
            for batch in batches:
                if stop_requested():
                    raise Stopped("during validation")
                found = jax.device_get(self.evaluate(batch))
                weight = float(found.weight.sum())
                loss_sum, weight_sum = loss_sum + float(found.loss) * weight, weight_sum + weight
                if counts is None:
                    counts = np.zeros((source.units, *found.counts.shape[1:]))
                np.add.at(counts, found.volume, found.counts)
        predicted, reference, both = np.moveaxis(counts, -1, 0)
        total = predicted + reference
        dice = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
        iou = np.where(total > 0, both / np.maximum(total - both, 1), 1.0)
        return Validation(loss_sum / weight_sum, float(dice.mean()), float(iou.mean()))

    def network(self) -> nnx.Module:
        """Return the network in its current state, in evaluation mode."""
        trainable, frozen = self.kept_state
        return nnx.merge(self._graph, trainable, *frozen, copy=True)
