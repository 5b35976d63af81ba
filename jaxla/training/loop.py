"""The training loop: epochs of steps, validation, early stopping, checkpoints."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from grain.python import DatasetIterator
from tqdm import tqdm

from jaxla.cli.process import Stopped, stop_requests
from jaxla.cli.terminal import format_duration
from jaxla.config import InputError, option
from jaxla.data.batches import Source, sample_batch, training_batches
from jaxla.distributed import process_count
from jaxla.mesh import global_max, local_rows
from jaxla.training.progress import Progress, TrainingCheckpoints
from jaxla.training.trainer import Trainer, Validation

log = logging.getLogger(__name__)

SAVE_SECONDS = 600  # an epoch that takes longer is also saved before it ends
SAVE, STOP = 1, 2  # requests that a process may make after a step


def fit(
    trainer: Trainer,
    train: Source,
    val: Source | None,
    folder: Path,
    *,
    epochs_done: int = 0,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> Progress:
    """Train, and leave the best and the latest checkpoint in `folder`; resume from the latest if there is one.

    The best epoch has the highest validation Dice, over the units of `val`, in the network's input pixels; with
    `checkpoint="last"`, it is the last epoch. Training ends early after `patience` epochs without a lower validation
    loss. On CPU, resumed training is bit for bit identical to uninterrupted training.

    Args:
        val: None without validation data; the recipe must then not depend on validation.
        epochs_done: epochs that earlier calls reported; training does not start if their checkpoints are missing.
        on_epoch: called with the metrics of all epochs so far, at the start and after each epoch.

    Raises:
        InputError: the loss is not finite, a step needs more memory than is available, or a file cannot be written.
        ValueError: `val` is None, but the recipe depends on validation.
        Stopped: the process was asked to stop; the latest checkpoint holds the current state.
    """
    recipe = trainer.recipe
    if val is None and (recipe.checkpoint == "best" or recipe.patience):
        raise ValueError("val is None: the recipe needs checkpoint='last' and patience=0")
    checkpoints = TrainingCheckpoints(folder)
    rows = local_rows(recipe.batch_size)
    batches = training_batches(train, recipe.batch_size, trainer.seed, rows)
    progress = checkpoints.resume(trainer, batches, epochs_done)
    progress.step_bytes = trainer.compile(sample_batch(train, rows))
    on_epoch(progress.history)

    with stop_requests() as stop_requested, closing(batches):
        while progress.epoch < recipe.epochs and not (0 < recipe.patience <= progress.epochs_since_lowest):
            _train_epoch(trainer, batches, progress, checkpoints, stop_requested)
            began = time.perf_counter()
            validation = None
            try:
                if val is not None:
                    validation = trainer.validate(val, lambda: bool(global_max(int(stop_requested()))))
            except Stopped:
                checkpoints.save_latest(trainer, batches, progress)
                raise
            _finish_epoch(trainer, progress, validation, time.perf_counter() - began, train.slices, folder)
            # Save the latest first: if the process is killed here, the best can be restored from it.
            checkpoints.save_latest(trainer, batches, progress)
            if progress.best_epoch == progress.epoch:
                checkpoints.save_best(trainer, progress)
            _log_epoch(trainer, progress, val.averaging if val else "")
            on_epoch(progress.history)

    if progress.epoch < recipe.epochs:
        log.info("stopped early: no lower validation loss for %d epochs", recipe.patience)
    checkpoints.close()
    return progress


def _train_epoch(
    trainer: Trainer,
    batches: DatasetIterator,
    progress: Progress,
    checkpoints: TrainingCheckpoints,
    stop_requested: Callable[[], bool],
) -> None:
    """Take the epoch's remaining steps, and save a checkpoint before its end if it takes long or a stop is requested.

    Raises:
        Stopped: a stop was requested.
    """
    began = time.perf_counter() - progress.seconds
    saved_at = time.monotonic()
    requests: deque[int | jax.Array] = deque()
    title = f"epoch {progress.epoch + 1}/{trainer.recipe.epochs}"
    is_quiet = not sys.stdout.isatty()
    steps, done = trainer.steps_per_epoch, len(progress.losses)
    for _ in tqdm(range(done, steps), title, steps, initial=done, leave=False, file=sys.stdout, disable=is_quiet):
        step = progress.epoch * steps + len(progress.losses)
        progress.losses.append(trainer.step(next(batches), step))
        request = STOP if stop_requested() else SAVE if time.monotonic() - saved_at > SAVE_SECONDS else 0
        requests.append(global_max(request))
        # Several processes act on the request of the previous step, so that none waits for the current step.
        request = int(requests.popleft()) if len(requests) == min(2, process_count()) else 0
        if request:
            progress.seconds = time.perf_counter() - began
            checkpoints.save_latest(trainer, batches, progress)
            saved_at = time.monotonic()
            requests.clear()
        if request == STOP:
            raise Stopped(f"in epoch {progress.epoch + 1}, after {len(progress.losses)} of {steps} steps")
    progress.losses = list(jax.device_get(progress.losses))
    progress.seconds = time.perf_counter() - began


def _finish_epoch(
    trainer: Trainer,
    progress: Progress,
    validation: Validation | None,
    validation_seconds: float,
    slices_per_sample: float,
    folder: Path,
) -> None:
    """Add the epoch's metrics to the history, and update the best; raise an InputError if a loss is not finite."""
    recipe = trainer.recipe
    train_loss = float(np.mean(np.asarray(progress.losses, np.float32)))
    scores = {f"val_{name}": value for name, value in validation._asdict().items()} if validation else {}
    if not np.isfinite([train_loss, scores.get("val_loss", 0.0)]).all():
        losses = f"training {train_loss}" + (f", validation {validation.loss}" if validation else "")
        problem = f"the loss is not finite in epoch {progress.epoch + 1} ({losses})"
        rate = option("training.learning_rate", f"{recipe.learning_rate:g}")
        raise InputError(rate, problem, f"Use a lower rate. Earlier epochs are kept in {folder}.")
    samples = trainer.steps_per_epoch * recipe.batch_size
    metrics = {
        "epoch": progress.epoch + 1,
        "train_loss": train_loss,
        **scores,
        "seconds": progress.seconds + validation_seconds,
        "slices_per_second": samples * slices_per_sample / progress.seconds,
    }
    progress.epoch, progress.losses, progress.seconds = progress.epoch + 1, [], 0.0
    progress.history.append(metrics)
    if recipe.checkpoint == "last":
        progress.best_epoch = progress.epoch
    if validation is None:
        return
    progress.epochs_since_lowest = 0 if validation.loss < progress.lowest_loss else progress.epochs_since_lowest + 1
    progress.lowest_loss = min(validation.loss, progress.lowest_loss)
    if validation.dice > progress.best_dice or recipe.checkpoint == "last":
        progress.best_dice, progress.best_epoch = validation.dice, progress.epoch


def _log_epoch(trainer: Trainer, progress: Progress, averaging: str) -> None:
    """Log the epoch's metrics; `averaging` says what validation averages Dice over, "" if there was no validation."""
    recipe, metrics = trainer.recipe, progress.history[-1]
    remaining = (recipe.epochs - progress.epoch) * np.mean([past["seconds"] for past in progress.history[-5:]])
    is_best = progress.best_epoch == progress.epoch and recipe.checkpoint == "best"
    scores = (
        f", val loss {metrics['val_loss']:.4f}, val Dice {metrics['val_dice']:.3f} {averaging}" if averaging else ""
    )
    log.info(
        "epoch %d/%d: train loss %.4f%s%s; %.0f slices/s, at most %s of training left",
        progress.epoch, recipe.epochs, metrics["train_loss"], scores, " (best)" if is_best else "",
        metrics["slices_per_second"], format_duration(remaining),
    )  # fmt: skip
