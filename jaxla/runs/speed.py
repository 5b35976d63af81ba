"""The training speed on this machine, from a few measured steps, and the epochs and steps that fit a time budget."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxla.cli.terminal import format_duration
from jaxla.config import Training
from jaxla.data.batches import evaluation_batches, sample_batch, training_batches
from jaxla.distributed import broadcast, is_first
from jaxla.memory import catch_out_of_memory
from jaxla.mesh import local_rows, on_host
from jaxla.tasks import Features, Task
from jaxla.tasks.base import Sources
from jaxla.training.step import count_parameters

log = logging.getLogger(__name__)

MEASURED_STEPS, MAX_MEASURED_SECONDS = 3, 5.0
FORWARD_PASSES_PER_STEP = 3  # a training step takes about as long as this many forward passes
MAX_VALIDATION_FRACTION = 0.2  # fraction of the time budget


class Speed(NamedTuple):
    """Sizes and times of training on this machine."""

    trained: int  # number of trained parameters
    checkpoint_bytes: int  # size of the latest and the best checkpoint together
    step_bytes: int  # device memory of a step, as reported by XLA
    steps: int  # steps per epoch
    compile_seconds: float  # time to set up and compile the step, and to take one
    step_seconds: float
    batch_seconds: float  # time to evaluate one batch; estimated without validation
    validation_seconds: float  # time per epoch; 0 without validation


def measure_speed(
    task: Task, network: nnx.Module, sources: Sources, features: Features | None, seconds: float = 0.0
) -> Speed:
    """Take a few steps, or as many as take about `seconds`; the network cannot be used afterwards.

    Raises:
        InputError: a step needs more memory than is available.
    """
    began = time.perf_counter()
    trainer = task.make_trainer(network, sources.train, features)
    trained, trained_bytes = count_parameters(trainer.trainable), _tree_bytes(trainer.trainable)
    checkpoint_bytes = 2 * trained_bytes + _tree_bytes(trainer.optimiser_state)
    rows = local_rows(task.batch_size)
    step_bytes = trainer.compile(sample_batch(sources.train, rows))
    with closing(training_batches(sources.train, task.batch_size, trainer.seed, rows)) as batches:
        jax.block_until_ready(trainer.step(next(batches), 0))
        compile_seconds = time.perf_counter() - began
        step_seconds = mean_seconds(lambda: trainer.step(next(batches), 0), MEASURED_STEPS)
        if (step_count := broadcast(round(seconds / step_seconds))) > MEASURED_STEPS:  # the same in all processes
            step_seconds = mean_seconds(lambda: trainer.step(next(batches), 0), step_count)
    batch_seconds = step_seconds / FORWARD_PASSES_PER_STEP * task.tile_count
    if sources.val:
        with closing(evaluation_batches(sources.val, task.batch_size, rows)) as batches:
            batch = next(batches)
        batch_seconds = mean_seconds(lambda: trainer.evaluate(batch), 2)
    return Speed(
        trained,
        checkpoint_bytes,
        step_bytes,
        trainer.steps_per_epoch,
        compile_seconds,
        step_seconds,
        batch_seconds,
        validation_seconds=-(-len(sources.val or ()) // task.batch_size) * batch_seconds,
    )


def measuring_seconds(recipe: Training) -> float:
    """Return the seconds that a run with a time limit spends on timed steps before training.

    Training then finds the step in the cache of compiled programs; without this cache it compiles again.
    """
    return min(MAX_MEASURED_SECONDS, 60 * recipe.minutes)


def measure_and_fit(task: Task, sources: Sources, features: Features | None) -> Training:
    """Return the task's recipe with the epochs and steps that fit into its `minutes` on this machine.

    Raises:
        InputError: a step needs more memory than is available.
    """
    seconds = 60 * task.recipe.minutes
    with on_host():
        network = task.build_network()
    with catch_out_of_memory(task.batch_size, task.memory_advice):
        speed = measure_speed(task, network, sources, features, min(MAX_MEASURED_SECONDS, seconds))
    gc.collect()  # arrays in reference cycles would take memory from training
    mixed_steps = speed.steps / (1 - task.recipe.foreground_fraction)  # further slices are mixed into a pass
    pass_seconds = mixed_steps * speed.step_seconds + speed.validation_seconds
    if pass_seconds > seconds and is_first():
        log.warning(
            "--training.minutes=%g: too short for one pass over the training data, which takes %s. Part of the data "
            "is not used. Use more minutes.", task.recipe.minutes, format_duration(pass_seconds),
        )  # fmt: skip
    fitted = fit_to_minutes(task.recipe, speed)
    epochs, steps = broadcast((fitted.epochs, fitted.steps))  # the same in all processes
    return replace(fitted, epochs=epochs, steps=steps)


def fit_to_minutes(recipe: Training, speed: Speed) -> Training:
    """Return the recipe with as many steps as fit into its `minutes` together with validation.

    It has fewer epochs if their validation would take more than 20 % of the time. At least one step is taken.
    """
    seconds = 60 * recipe.minutes
    max_epochs = seconds / (speed.step_seconds + speed.validation_seconds)  # if each epoch had one step
    if speed.validation_seconds:
        max_epochs = min(max_epochs, MAX_VALIDATION_FRACTION * seconds / speed.validation_seconds)
    epochs = max(1, min(recipe.epochs, math.floor(max_epochs)))
    steps = math.floor((seconds / epochs - speed.validation_seconds) / speed.step_seconds)
    return replace(recipe, epochs=epochs, steps=max(1, steps))


def mean_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the mean seconds of a call, after a first call that compiles."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / repeats


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
