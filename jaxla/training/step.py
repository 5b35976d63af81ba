"""One step of training, behind one seam: `(trainable, frozen, batch, key) -> loss, gradients, auxiliary`.

What is frozen is an argument of its own and never differentiated. The loop knows only the seam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxla.config import Training
from jaxla.distributed import constrain_sharding, device_count, place_on_devices, replicate
from jaxla.training.losses import Loss, cross_entropy, deep_supervision, overlap_counts, row_weights

Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # (key, images, masks) -> the same
Gradient = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any, dict[str, Any]]]


# nnU-Net's: of SGD, and the power of the decay of its rate
MOMENTUM, WEIGHT_DECAY, LARGEST_NORM, POWER = 0.99, 3e-5, 12.0, 0.9


class Frozen(NamedTuple):
    """What a step reads but does not differentiate."""

    parameters: nnx.State
    statistics: nnx.State  # of BatchNorm, of which a step returns new ones as an auxiliary; buffers of what is trained


class SplitNetwork(NamedTuple):
    """A network as a graph for training, one for evaluation, and its state."""

    training: nnx.GraphDef
    evaluation: nnx.GraphDef
    trainable: nnx.State
    frozen: Frozen


def split_network(network: nnx.Module, train_backbone: bool) -> SplitNetwork:
    """Take a network apart, once: jitting over its state is faster than over the object.

    Raises:
        ValueError: it draws random numbers (dropout), of which a step would draw the same each time.
    """
    if jax.tree.leaves(nnx.state(network, nnx.RngState)):
        raise ValueError("the network draws random numbers while it trains, which no step here gives it")
    frozen = nnx.Nothing() if train_backbone else nnx.PathContains("backbone")
    filters = (nnx.All(nnx.Param, nnx.Not(frozen)), frozen, ...)
    network.train()
    if not train_backbone and hasattr(network, "backbone"):
        network.backbone.eval()  # its BatchNorm's statistics too stay as they were loaded
    training, *_ = nnx.split(network, *filters)
    network.eval()
    evaluation, trainable, parameters, statistics = nnx.split(network, *filters)
    return SplitNetwork(training, evaluation, trainable, Frozen(parameters, statistics))


def count_parameters(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


@dataclass
class TrainingState:
    """Training between two steps."""

    trainable: Any
    frozen: Frozen
    optimiser: Any


def initial_state(network: SplitNetwork, optimiser: optax.GradientTransformation) -> TrainingState:
    """Before the first step, on the devices of the mesh; the optimiser's part is divided as the parameters are.

    A step gives away the memory of what is trained: where there is no mesh that is the network's own, once.
    """
    trainable = place_on_devices(network.trainable)
    moments = jax.jit(lambda trainable: constrain_sharding(optimiser.init(trainable)))(trainable)
    return TrainingState(trainable, place_on_devices(network.frozen), moments)


def compile_step(step: Callable, state: TrainingState, batch: Any, key: jax.Array) -> jax.stages.Compiled:
    """A step of `make_step`, compiled for batches like this one."""
    return step.lower(state.trainable, state.frozen, state.optimiser, batch, key).compile()


def take_step(step: Callable, state: TrainingState, batch: Any, key: jax.Array) -> jax.Array:
    """Move `state` on by a step; -> the loss, which is not waited for."""
    state.trainable, statistics, state.optimiser, loss = step(
        state.trainable, state.frozen, state.optimiser, batch, key
    )
    state.frozen = state.frozen._replace(statistics=statistics)
    return loss


def network_inputs(batch: Any) -> Any:
    """What the network is called with: images or features, or features and their images."""
    return (batch["input"], batch["image"]) if "image" in batch else batch["input"]


def valid_rows(batch: Any) -> jax.Array | None:
    """What the network is told of the rows that only fill a batch up, or of the slices that fill up its volumes."""
    weight = batch["weight"]
    return weight > 0 if weight.ndim > 1 or device_count() > 1 else None


def apply_augmentation(augment: Augment | None, batch: Any, key: jax.Array) -> Any:
    """The batch with its images and masks changed."""
    if augment is None:
        return batch
    images, mask = augment(key, batch["input"], batch["mask"])
    return batch | {"input": images, "mask": mask}


def make_gradient(graph: nnx.GraphDef, augment: Augment | None = None, loss_of: Loss = cross_entropy) -> Gradient:
    """The seam for a network trained on whole batches.

    Args:
        augment: what is done to images and masks before.
    """

    def loss(trainable: nnx.State, frozen: Frozen, batch: Any) -> tuple[jax.Array, nnx.State]:
        network = nnx.merge(graph, trainable, *frozen, copy=True)  # its statistics change
        logits = network(network_inputs(batch), valid_rows(batch))
        # those of a frozen backbone are among its parameters, and stay
        new = dict(nnx.to_flat_state(nnx.state(network, nnx.BatchStat)))
        old = nnx.to_flat_state(frozen.statistics)
        statistics = nnx.from_flat_state([(path, new.get(path, value)) for path, value in old])
        if isinstance(logits, list):
            return deep_supervision(loss_of, logits, batch["mask"], batch["weight"]), statistics
        return loss_of(logits, batch["mask"], batch["weight"]), statistics

    def gradient(trainable: nnx.State, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Any, dict]:
        batch = apply_augmentation(augment, batch, key)
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
        return value, gradients, {"statistics": statistics}

    return gradient


def make_step(gradient: Gradient, optimiser: optax.GradientTransformation) -> Callable:
    """`(trainable, frozen, optimiser state, batch, key) -> (trainable, statistics, optimiser state, loss)`, jitted."""

    def step(trainable: Any, frozen: Frozen, state: Any, batch: Any, key: jax.Array) -> tuple:
        loss, gradients, auxiliary = gradient(trainable, frozen, batch, key)
        updates, state = optimiser.update(gradients, state, trainable)
        trainable, statistics = optax.apply_updates(trainable, updates), auxiliary["statistics"]
        return *constrain_sharding((trainable, statistics, state)), loss

    return jax.jit(step, donate_argnums=(0, 2))


class Evaluated(NamedTuple):
    """What comes of a batch; whichever process holds its rows, all have the whole of this."""

    loss: jax.Array
    counts: jax.Array  # [B, classes, 3]
    volume: jax.Array  # [B]
    weight: jax.Array  # [B]


def make_evaluation(graph: nnx.GraphDef, loss_of: Loss = cross_entropy) -> Callable[..., Evaluated]:
    """`(trainable, frozen, batch) -> Evaluated`, jitted."""

    def evaluate(trainable: Any, frozen: Frozen, batch: Any) -> Evaluated:
        network, present = nnx.merge(graph, trainable, *frozen), valid_rows(batch)
        logits = network(network_inputs(batch)) if present is None else network(network_inputs(batch), present)
        mask = jnp.maximum(batch["mask"], 0)  # where a scan is zero there is background
        loss, rows = loss_of(logits, mask, batch["weight"]), row_weights(batch["weight"])
        return replicate(Evaluated(loss, overlap_counts(logits, mask, rows), batch["volume"], rows))

    return jax.jit(evaluate)


def make_optimiser(recipe: Training, steps: int, pretrained_backbone: bool) -> optax.GradientTransformation:
    """The recipe's optimiser, with a rate of its own for a pretrained backbone.

    Args:
        steps: of the whole training, for the schedule.
        pretrained_backbone: whether what is trained of the backbone takes `backbone_learning_rate`.
    """

    def rate_of(rate: float) -> float | optax.Schedule:
        if recipe.schedule == "constant":
            return rate
        if recipe.schedule == "poly":
            of_epoch = steps // recipe.epochs
            return lambda count: rate * (1 - count // of_epoch / recipe.epochs) ** POWER
        warmup = max(1, round(0.02 * steps))
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps + 1)
        return lambda count: schedule(count + 1)  # so that neither the first nor the last step has rate 0

    def of_rate(rate: float) -> optax.GradientTransformation:
        if recipe.optimiser == "adam":
            return optax.adam(rate_of(rate))
        # PyTorch's SGD: the decay is of the gradient, and rates come after momentum
        return optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.trace(MOMENTUM, nesterov=True),
            optax.scale_by_learning_rate(rate_of(rate)),
        )

    def group(state: nnx.State) -> Any:
        def name(path: tuple, _: Any) -> str:
            return "backbone" if pretrained_backbone and path[0].key == "backbone" else "rest"

        return jax.tree_util.tree_map_with_path(name, state)

    rates = {"rest": recipe.learning_rate, "backbone": recipe.backbone_learning_rate}
    optimiser = optax.multi_transform({name: of_rate(rate) for name, rate in rates.items()}, group)
    return optimiser if recipe.optimiser == "adam" else optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optimiser)
