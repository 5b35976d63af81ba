"""The optimisers of the recipes: Adam and nnU-Net's SGD, and the running mean of the trained parameters."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxla.config import BackboneTraining, Training

# nnU-Net's SGD, and the exponent of its learning rate schedule.
MOMENTUM, WEIGHT_DECAY, MAX_GRADIENT_NORM, POLY_POWER = 0.99, 3e-5, 12.0, 0.9
WARMUP_FRACTION = 0.02  # of all steps, in the cosine schedule


def make_optimiser(
    recipe: Training, steps: int, has_pretrained_backbone: bool, statistics: Any = None
) -> optax.GradientTransformation:
    """Return the recipe's optimiser for `steps` steps, with its own learning rate for a pretrained backbone.

    A running mean is the last state in the optimiser's chain, initialised with the `statistics` of BatchNorm.
    """
    rates = {"rest": recipe.learning_rate}
    if isinstance(recipe, BackboneTraining):
        rates["backbone"] = recipe.backbone_learning_rate
    has_backbone_rate = has_pretrained_backbone and "backbone" in rates

    def group_name(path: tuple, _: Any) -> str:
        return "backbone" if has_backbone_rate and path[0].key == "backbone" else "rest"

    groups = {name: _update_rule(recipe, _schedule(recipe, rate, steps)) for name, rate in rates.items()}
    optimiser = optax.multi_transform(groups, partial(jax.tree_util.tree_map_with_path, group_name))
    if largest_norm := recipe.max_gradient_norm if recipe.optimiser == "adam" else MAX_GRADIENT_NORM:
        optimiser = optax.chain(optax.clip_by_global_norm(largest_norm), optimiser)
    if recipe.accumulated_steps > 1:
        optimiser = optax.MultiSteps(optimiser, recipe.accumulated_steps).gradient_transformation()
    if not recipe.average_decay:
        return optimiser
    return optax.chain(optimiser, average_parameters(recipe.average_decay, statistics))


class AverageState(NamedTuple):
    """State of `average_parameters`."""

    count: jax.Array  # number of steps
    average: Any  # running mean of the parameters
    statistics: Any  # running mean of BatchNorm's statistics


def average_parameters(decay: float, statistics: Any = None) -> optax.GradientTransformationExtraArgs:
    """Return the last part of an optimiser, which keeps an exponential running mean of the parameters in its state.

    BatchNorm's statistics, first `statistics` and then an argument of each update, are averaged in the same way.
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


def _update_rule(recipe: Training, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    if recipe.optimiser == "adam":
        return optax.adamw(rate, weight_decay=recipe.weight_decay) if recipe.weight_decay else optax.adam(rate)
    # PyTorch's SGD: weight decay is added to the gradient, and the learning rate is applied after momentum.
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.trace(MOMENTUM, nesterov=True),
        optax.scale_by_learning_rate(rate),
    )


def _schedule(recipe: Training, rate: float, steps: int) -> optax.ScalarOrSchedule:
    """Return the learning rate as a function of the number of earlier parameter updates."""
    if recipe.schedule == "constant":
        return rate
    if recipe.schedule == "poly":
        steps_per_epoch = steps // recipe.epochs
        return lambda count: (
            rate * (1 - count * recipe.accumulated_steps // steps_per_epoch / recipe.epochs) ** POLY_POWER
        )
    updates = steps // recipe.accumulated_steps
    warmup = max(1, round(WARMUP_FRACTION * updates))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, updates + 1)
    return lambda count: schedule(count + 1)  # neither the first nor the last update has a rate of 0
