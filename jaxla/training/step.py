"""The training step. Every gradient function is `(trainable, frozen, batch, key) -> loss, gradients, auxiliary`.

Frozen parameters are a separate argument and are never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxla.mesh import constrain_sharding, device_count, replicate
from jaxla.models.ops.tiles import apply_in_tiles
from jaxla.training.losses import Loss, count_overlap, cross_entropy, deep_supervision, row_weights

# (key, images, masks) -> (images, masks)
Augment = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Gradient = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any, dict[str, Any]]]
MakeGradient = Callable[[nnx.GraphDef, Augment | None, Loss], Gradient]


class Frozen(NamedTuple):
    """State that a step reads without differentiating it.

    `statistics` are BatchNorm's statistics, which each step returns updated, and buffers of the trainable part.
    """

    parameters: nnx.State
    statistics: nnx.State


class SplitNetwork(NamedTuple):
    """A network as graph definitions for training and for evaluation, and its state."""

    training: nnx.GraphDef
    evaluation: nnx.GraphDef
    trainable: nnx.State
    frozen: Frozen


def split_network(network: nnx.Module, train_backbone: bool) -> SplitNetwork:
    """Split a network once: `jax.jit` over its state is faster than `nnx.jit` over the object.

    Raises:
        ValueError: the network draws random numbers (dropout), which a step does not provide.
    """
    if jax.tree.leaves(nnx.state(network, nnx.RngState)):
        raise ValueError("the network draws random numbers during training (dropout), which a step does not provide")
    frozen = nnx.Nothing() if train_backbone else nnx.PathContains("backbone")
    filters = (nnx.All(nnx.Param, nnx.Not(frozen)), frozen, ...)
    network.train()
    if not train_backbone and hasattr(network, "backbone"):
        network.backbone.eval()  # the statistics of its BatchNorm stay as loaded
    training, *_ = nnx.split(network, *filters)
    network.eval()
    evaluation, trainable, parameters, statistics = nnx.split(network, *filters)
    return SplitNetwork(training, evaluation, trainable, Frozen(parameters, statistics))


def count_parameters(state: nnx.State) -> int:
    """Return the number of values in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def network_inputs(batch: Any) -> Any:
    """Return the network's argument: images or features, or a pair of features and their images."""
    return (batch["input"], batch["image"]) if "image" in batch else batch["input"]


def valid_rows(batch: Any) -> jax.Array | None:
    """Return the mask of rows, or of slices of volumes, that are data rather than padding; None if all are."""
    weight = batch["weight"]
    return weight > 0 if weight.ndim > 1 or device_count() > 1 else None


def apply_network(network: Callable[..., Any], batch: Any) -> Any:
    """Call the network on a batch; networks that need no mask of valid rows need not accept one."""
    valid = valid_rows(batch)
    return network(network_inputs(batch)) if valid is None else network(network_inputs(batch), valid)


def apply_augmentation(augment: Augment | None, batch: Any, key: jax.Array) -> Any:
    """Return the batch with augmented images and masks."""
    if augment is None:
        return batch
    images, mask = augment(key, batch["input"], batch["mask"])
    return batch | {"input": images, "mask": mask}


def make_gradient(graph: nnx.GraphDef, augment: Augment | None = None, loss: Loss = cross_entropy) -> Gradient:
    """Return the gradient function of the loss of whole batches, which it augments first."""

    def batch_loss(trainable: nnx.State, frozen: Frozen, batch: Any) -> tuple[jax.Array, nnx.State]:
        network = nnx.merge(graph, trainable, *frozen, copy=True)  # a copy, because its statistics change
        logits = apply_network(network, batch)
        # The statistics of a frozen backbone are among its parameters, and do not change.
        new = dict(nnx.to_flat_state(nnx.state(network, nnx.BatchStat)))
        old = nnx.to_flat_state(frozen.statistics)
        statistics = nnx.from_flat_state([(path, new.get(path, value)) for path, value in old])
        if isinstance(logits, list):
            return deep_supervision(loss, logits, batch["mask"], batch["weight"]), statistics
        return loss(logits, batch["mask"], batch["weight"]), statistics

    def gradient(trainable: nnx.State, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Any, dict]:
        batch = apply_augmentation(augment, batch, key)
        (value, statistics), gradients = jax.value_and_grad(batch_loss, has_aux=True)(trainable, frozen, batch)
        return value, gradients, {"statistics": statistics}

    return gradient


def make_step(gradient: Gradient, optimiser: optax.GradientTransformationExtraArgs) -> Callable:
    """Return `(trainable, frozen, optimiser state, batch, key, rates) -> (trainable, statistics, state, loss)`."""

    def step(trainable: Any, frozen: Frozen, state: Any, batch: Any, key: jax.Array, rates: Any) -> tuple:
        loss, gradients, auxiliary = gradient(trainable, frozen, batch, key)
        statistics = auxiliary["statistics"]
        to_average = nnx.filter_state(statistics, nnx.BatchStat)
        updates, state = optimiser.update(gradients, state, trainable, statistics=to_average, rates=rates)
        trainable = optax.apply_updates(trainable, updates)
        return *constrain_sharding((trainable, statistics, state)), loss

    return jax.jit(step, donate_argnums=(0, 2))


class Evaluation(NamedTuple):
    """The evaluation of a batch, complete in every process."""

    loss: jax.Array
    counts: jax.Array  # [B, classes, 3]
    volume: jax.Array  # [B]
    weight: jax.Array  # [B]


def make_evaluation(graph: nnx.GraphDef, loss: Loss = cross_entropy, tile_size: int = 0) -> Callable[..., Evaluation]:
    """Return `(trainable, frozen, batch) -> Evaluation`, compiled.

    With `tile_size`, the network reads images in overlapping tiles of that side (`apply_in_tiles`).
    """

    def evaluate(trainable: Any, frozen: Frozen, batch: Any) -> Evaluation:
        network = nnx.merge(graph, trainable, *frozen)
        logits = apply_network(partial(apply_in_tiles, network, tile_size) if tile_size else network, batch)
        mask = jnp.maximum(batch["mask"], 0)  # voxels outside the scan count as background
        value, rows = loss(logits, mask, batch["weight"]), row_weights(batch["weight"])
        return replicate(Evaluation(value, count_overlap(logits, mask, rows), batch["volume"], rows))

    return jax.jit(evaluate)
