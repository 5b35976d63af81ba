"""The optimisers of the recipes: Adam and nnU-Net's SGD, and the running mean of the trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxla.config import BackboneTraining, Training

# nnU-Net's SGD, and the exponent of its learning rate schedule.
MOMENTUM, WEIGHT_DECAY, MAX_GRADIENT_NORM, POLY_POWER = 0.99, 3e-5, 12.0, 0.9
WARMUP_FRACTION = 0.02  # fraction of the parameter updates, in the cosine schedule


def make_optimiser(
    recipe: Training, has_pretrained_backbone: bool, statistics: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Return the recipe's optimiser, with its own learning rate for a pretrained backbone.

    Each update takes the step's `rates` (see `make_rates`), so one compiled step works for schedules of any length.
    A running mean is the last state in the optimiser's chain, initialised with the `statistics` of BatchNorm.
    """
    names = _base_rates(recipe)
    has_backbone_rate = has_pretrained_backbone and "backbone" in names

    def group_name(path: tuple, _: Any) -> str:
        return "backbone" if has_backbone_rate and path[0].key == "backbone" else "rest"

    groups = {name: _update_rule(recipe, name) for name in names}
    optimiser = optax.multi_transform(groups, partial(jax.tree_util.tree_map_with_path, group_name))
    if largest_norm := recipe.max_gradient_norm if recipe.optimiser == "adam" else MAX_GRADIENT_NORM:
        optimiser = optax.chain(optax.clip_by_global_norm(largest_norm), optimiser)
    if recipe.accumulated_steps > 1:
        accumulation = optax.MultiSteps(optimiser, recipe.accumulated_steps)
        optimiser = optax.GradientTransformationExtraArgs(accumulation.init, accumulation.update)
    if not recipe.average_decay:
        return optimiser
    return optax.chain(optimiser, average_parameters(recipe.average_decay, statistics))


def make_rates(recipe: Training, steps: int) -> Callable[[int], dict[str, jax.Array]]:
    """Return `step -> rates`: the learning rate of each group of parameters, for training with `steps` steps."""
    schedules = {name: _schedule(recipe, rate, steps) for name, rate in _base_rates(recipe).items()}

    @jax.jit  # compiled, the rates are rounded as they would be within a compiled step
    def rates(step: jax.Array) -> dict[str, jax.Array]:
        updates = step // recipe.accumulated_steps
        return {name: jnp.float32(schedule(updates)) for name, schedule in schedules.items()}

    return lambda step: rates(np.int32(step))


class AverageState(NamedTuple):
    """State of `average_parameters`."""

    count: jax.Array  # number of steps
    average: Any  # running mean of the parameters
    statistics: Any  # running mean of BatchNorm's statistics


def average_parameters(decay: float, statistics: Any = None) -> optax.GradientTransformationExtraArgs:
    """Return the last part of an optimiser, which keeps an exponential running mean of the parameters in its state.

    BatchNorm's statistics are averaged in the same way: the initial `statistics`, and those passed to each update.
    Step n, from 0, keeps at most (1 + n) / (10 + n) of the mean, so that initial parameters are soon forgotten
    (TensorFlow's `ExponentialMovingAverage` with `num_updates`).
    """

    def init(parameters: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), *jax.tree.map(jnp.copy, (parameters, statistics)))

    def update(
        updates: Any, state: AverageState, parameters: Any, *, statistics: Any = None, **_: Any
    ) -> tuple[Any, AverageState]:
        kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        before, new = (state.average, state.statistics), (optax.apply_updates(parameters, updates), statistics)
        means = jax.tree.map(lambda mean, value: kept * mean + (1 - kept) * value, before, new)
        return updates, AverageState(state.count + 1, *means)

    return optax.GradientTransformationExtraArgs(init, update)


def _base_rates(recipe: Training) -> dict[str, float]:
    """Return the learning rates that the recipe names, by groups of parameters."""
    rates = {"rest": recipe.learning_rate}
    return rates | {"backbone": recipe.backbone_learning_rate} if isinstance(recipe, BackboneTraining) else rates


def _update_rule(recipe: Training, group: str) -> optax.GradientTransformation:
    if recipe.optimiser == "adam":
        decay = [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
        return optax.chain(optax.scale_by_adam(), *decay, _scale_by_rate(group))
    # PyTorch's SGD: weight decay is added to the gradient, and the learning rate is applied after momentum.
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.trace(MOMENTUM, nesterov=True), _scale_by_rate(group)
    )


def _scale_by_rate(group: str) -> optax.GradientTransformationExtraArgs:
    """Return the last part of an update rule: multiply the updates by minus the group's learning rate."""

    def update(updates: Any, state: Any, parameters: Any, *, rates: dict[str, jax.Array], **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda value: -rates[group] * value, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _schedule(recipe: Training, rate: float, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of earlier parameter updates."""
    if recipe.schedule == "constant":
        return lambda count: rate
    if recipe.schedule == "poly":
        steps_per_epoch = steps // recipe.epochs
        return lambda count: (
            rate * (1 - count * recipe.accumulated_steps // steps_per_epoch / recipe.epochs) ** POLY_POWER
        )
    updates = max(1, steps // recipe.accumulated_steps)
    warmup = max(1, round(WARMUP_FRACTION * updates))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, updates + 1)
    return lambda count: schedule(count + 1)  # neither the first nor the last update has a rate of 0
