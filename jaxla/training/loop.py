"""The loop: epochs of steps, validation per volume, early stopping, checkpoints, one line of metrics per epoch."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxla.config import InputError, Training
from jaxla.data.batches import SliceSource, evaluation_batches, steps_per_epoch, training_batches
from jaxla.training.checkpoints import Checkpoints
from jaxla.training.step import Frozen, SplitNetwork, make_evaluation, make_gradient, make_optimiser, make_step

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where training stands, apart from arrays."""

    epoch: int = 0  # epochs completed
    best_epoch: int = 0
    best_dice: float = -1.0
    lowest_loss: float = float("inf")
    epochs_since_lowest: int = 0


def fit(
    network: SplitNetwork,
    train: SliceSource,
    val: SliceSource,
    recipe: Training,
    *,
    seed: int,
    pretrained_backbone: bool,
    folder: Path,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> Progress:
    """Train and leave the best and the latest checkpoint in `folder`.

    The best epoch is that of the highest validation Dice, per volume, in the network's input pixels; training ends
    after `recipe.patience` epochs without a lower validation loss.

    Args:
        on_epoch: called with the metrics of all epochs so far.

    Raises:
        InputError: the loss is no longer finite.
    """
    steps = steps_per_epoch(train, recipe.batch_size)
    optimiser = make_optimiser(recipe, steps * recipe.epochs, pretrained_backbone)
    step = make_step(make_gradient(network.training), optimiser)
    evaluate = make_evaluation(network.evaluation)
    best, latest = (Checkpoints(folder / "checkpoints" / name) for name in ("best", "latest"))

    batches = training_batches(train, recipe.batch_size, seed)
    trainable, frozen = network.trainable, network.frozen
    optimiser_state = jax.jit(optimiser.init)(trainable)
    key = jax.random.key(seed)
    progress, history = Progress(), []

    while progress.epoch < recipe.epochs and progress.epochs_since_lowest < recipe.patience:
        began = time.perf_counter()
        losses = []
        for i in _bar(steps, f"epoch {progress.epoch + 1}/{recipe.epochs}"):
            key_of_step = jax.random.fold_in(key, progress.epoch * steps + i)
            trainable, statistics, optimiser_state, loss = step(
                trainable, frozen, optimiser_state, next(batches), key_of_step
            )
            frozen = frozen._replace(statistics=statistics)
            losses.append(loss)
        train_loss = float(np.mean(jax.device_get(losses)))
        trained_for = time.perf_counter() - began
        val_loss, val_dice, val_iou = validate(evaluate, trainable, frozen, val, recipe.batch_size)
        if not np.isfinite([train_loss, val_loss]).all():
            raise InputError(
                f"training loss {train_loss}, validation loss {val_loss} in epoch {progress.epoch + 1}; lower "
                f"--training.learning_rate (now {recipe.learning_rate:g}). Epochs before it are kept in {folder}"
            )
        progress.epoch += 1

        metrics = {
            "epoch": progress.epoch,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_dice": val_dice,
            "val_iou": val_iou,
            "seconds": time.perf_counter() - began,
            "slices_per_second": steps * recipe.batch_size / trained_for,
        }
        if val_loss < progress.lowest_loss:
            progress.lowest_loss, progress.epochs_since_lowest = val_loss, 0
        else:
            progress.epochs_since_lowest += 1
        weights = checkpointed(trainable, frozen, include_frozen=not pretrained_backbone)
        if val_dice > progress.best_dice:
            progress.best_dice, progress.best_epoch = val_dice, progress.epoch
            best.save(progress.epoch, weights, vars(progress))
        latest.save(
            progress.epoch,
            {**weights, "optimiser": optimiser_state},
            {**vars(progress), "batches": batches.get_state()},
        )
        history.append(metrics)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
        remaining = (recipe.epochs - progress.epoch) * np.mean([m["seconds"] for m in history[-5:]])
        log.info(
            "epoch %d/%d: train loss %.4f, val loss %.4f, val Dice %.3f per volume%s; %.0f slices/s, %s left at most",
            progress.epoch, recipe.epochs, train_loss, val_loss, val_dice,
            " (best)" if progress.best_epoch == progress.epoch else "", metrics["slices_per_second"], clock(remaining),
        )  # fmt: skip
        on_epoch(history)

    if progress.epoch < recipe.epochs:
        log.info("stopped early: no lower validation loss for %d epochs", recipe.patience)
    best.close()
    latest.close()
    batches.close()
    return progress


def checkpointed(trainable: Any, frozen: Frozen, include_frozen: bool) -> dict[str, Any]:
    """What a checkpoint holds of a network; a frozen pretrained backbone has its own file and is left out."""
    saved = {"trainable": trainable, "statistics": frozen.statistics}
    return saved | {"frozen": frozen.parameters} if include_frozen else saved


def validate(
    evaluate: Callable, trainable: Any, frozen: Any, source: SliceSource, batch_size: int
) -> tuple[float, float, float]:
    """Loss per slice, and Dice and IoU per volume, in the network's input pixels.

    Classes are averaged within a volume, then volumes; a class absent from both mask and prediction counts as 1.
    """
    counts: np.ndarray | None = None
    loss_sum = weight_sum = 0.0
    for batch in evaluation_batches(source, batch_size):
        loss, of_slices = jax.device_get(evaluate(trainable, frozen, batch))
        weight = float(batch["weight"].sum())
        loss_sum, weight_sum = loss_sum + float(loss) * weight, weight_sum + weight
        if counts is None:
            counts = np.zeros((len(source.volumes), *of_slices.shape[1:]))
        np.add.at(counts, batch["volume"], of_slices)
    predicted, reference, both = np.moveaxis(counts, -1, 0)
    total = predicted + reference
    dice = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
    iou = np.where(total > 0, both / np.maximum(total - both, 1), 1.0)
    return loss_sum / weight_sum, float(dice.mean()), float(iou.mean())


def clock(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `20 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _bar(steps: int, label: str) -> Iterator[int]:
    return iter(tqdm(range(steps), label, leave=False, file=sys.stdout, disable=not sys.stdout.isatty()))
