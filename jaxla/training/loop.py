"""The loop: epochs of steps, validation per volume, early stopping, checkpoints, one line of metrics per epoch."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from grain.python import DatasetIterator
from tqdm import tqdm

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.process import Stopped, stop_requests
from jaxla.cli.terminal import format_duration
from jaxla.config import InputError, Training
from jaxla.data.batches import Source, evaluation_batches, sample_batch, steps_per_epoch, training_batches
from jaxla.distributed import broadcast, global_max, is_first, local_rows, process_count, shard_batch
from jaxla.memory import program_bytes, require_memory
from jaxla.runs.folder import BEST, LATEST, METRICS
from jaxla.training.checkpoints import Checkpoints, checkpointed
from jaxla.training.losses import Loss, cross_entropy
from jaxla.training.step import (
    Augment,
    Frozen,
    Gradient,
    SplitNetwork,
    TrainingState,
    compile_step,
    initial_state,
    make_evaluation,
    make_gradient,
    make_optimiser,
    make_step,
    take_step,
)

log = logging.getLogger(__name__)

SAVE_EVERY = 600  # seconds; epochs that take longer are saved on the way
SAVE, STOP = 1, 2  # what a process may ask for after a step


@dataclass
class Progress:
    """Where training stands, apart from arrays and the order of slices; part of every checkpoint.

    Attributes:
        epoch: epochs completed.
        losses: of the steps taken in the next one.
        seconds: that these took.
        history: the metrics of each completed epoch.
        step_bytes: device memory of a step's program.
    """

    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best_epoch: int = 0
    best_dice: float = -1.0
    lowest_loss: float = float("inf")
    epochs_since_lowest: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    step_bytes: int = 0


def fit(
    network: SplitNetwork,
    train: Source,
    val: Source,
    recipe: Training,
    *,
    augment: Augment | None = None,
    loss_of: Loss = cross_entropy,
    gradient_of: Callable[[nnx.GraphDef, Augment | None, Loss], Gradient] = make_gradient,
    seed: int,
    pretrained_backbone: bool,
    folder: Path,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> Progress:
    """Train and leave the best and the latest checkpoint in `folder`; go on from the latest if there is one.

    The best epoch is that of the highest validation Dice, over the units of `val`, in the network's input pixels, or
    the last one where the recipe says so. Training ends after `recipe.patience` epochs without a lower validation loss,
    with a patience of 0 never early. What follows from a checkpoint is, on CPU, to the bit what would have followed
    without the interruption.

    Args:
        augment: what is done to a batch's images and masks, on the device.
        loss_of: what is lowered, and watched on the validation cases.
        gradient_of: the seam for a network that is so augmented, and has that loss.
        on_epoch: called with the metrics of all epochs so far, by the first of several processes.

    Raises:
        InputError: the loss is no longer finite, a step needs more memory than there is, or a file cannot be written.
        Stopped: the process was asked to end; the latest checkpoint is of this moment.
    """
    steps = steps_per_epoch(train, recipe.batch_size, recipe.steps)
    optimiser = make_optimiser(recipe, steps * recipe.epochs, pretrained_backbone)
    step = make_step(gradient_of(network.training, augment, loss_of), optimiser)
    evaluate = make_evaluation(network.evaluation, loss_of)
    key = jax.random.key(seed)

    best, latest = (Checkpoints(folder / name) for name in (BEST, LATEST))
    state = initial_state(network, optimiser)
    batches = training_batches(train, recipe.batch_size, seed, local_rows(recipe.batch_size))
    progress = _go_on(state, batches, best, latest, folder)
    step = compile_step(step, state, shard_batch(sample_batch(train, local_rows(recipe.batch_size))), key)
    progress.step_bytes = program_bytes(step)
    require_memory(progress.step_bytes, recipe.batch_size)
    saved_at = time.monotonic()
    _write_history(folder, progress.history)
    if progress.history and is_first():
        on_epoch(progress.history)

    asked: deque[int | jax.Array] = deque()
    with stop_requests() as stop_requested, closing(batches):
        while progress.epoch < recipe.epochs and not (0 < recipe.patience <= progress.epochs_since_lowest):
            began = time.perf_counter() - progress.seconds
            for _ in _bar(steps, len(progress.losses), f"epoch {progress.epoch + 1}/{recipe.epochs}"):
                number = progress.epoch * steps + len(progress.losses)
                loss = take_step(step, state, shard_batch(next(batches)), jax.random.fold_in(key, number))
                progress.losses.append(loss)
                wish = STOP if stop_requested() else SAVE if time.monotonic() - saved_at > SAVE_EVERY else 0
                asked.append(global_max(wish))
                # several processes hear what was asked for a step ago: this one need not be waited for
                heard = int(asked.popleft()) if len(asked) == min(2, process_count()) else 0
                if heard:
                    progress.seconds = time.perf_counter() - began
                    _save_latest(latest, state, batches, progress, steps)
                    saved_at = time.monotonic()
                    asked.clear()
                if heard == STOP:
                    raise Stopped(f"in epoch {progress.epoch + 1}, after {len(progress.losses)} of {steps} steps")
            train_loss = float(np.mean(np.asarray(jax.device_get(progress.losses), np.float32)))
            progress.seconds = time.perf_counter() - began
            try:
                val_loss, val_dice, val_iou = validate(
                    evaluate,
                    state.trainable,
                    state.frozen,
                    val,
                    recipe.batch_size,
                    lambda: bool(global_max(int(stop_requested()))),
                )
            except Stopped:
                _save_latest(latest, state, batches, progress, steps)
                raise
            if not np.isfinite([train_loss, val_loss]).all():
                raise InputError(
                    f"training loss {train_loss}, validation loss {val_loss} in epoch {progress.epoch + 1}; lower "
                    f"--training.learning_rate (now {recipe.learning_rate:g}). Epochs before it are kept in {folder}"
                )

            metrics = {
                "epoch": progress.epoch + 1,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_dice": val_dice,
                "val_iou": val_iou,
                "seconds": time.perf_counter() - began,
                "slices_per_second": steps * recipe.batch_size * train.slices / progress.seconds,
            }
            progress.epoch, progress.losses, progress.seconds = progress.epoch + 1, [], 0.0
            progress.history.append(metrics)
            progress.epochs_since_lowest = 0 if val_loss < progress.lowest_loss else progress.epochs_since_lowest + 1
            progress.lowest_loss = min(val_loss, progress.lowest_loss)
            if val_dice > progress.best_dice or recipe.checkpoint == "last":
                progress.best_dice, progress.best_epoch = val_dice, progress.epoch
            # first: the best one can be made from it, should the process end here
            _save_latest(latest, state, batches, progress, steps)
            saved_at = time.monotonic()
            if progress.best_epoch == progress.epoch:
                _save_best(best, state, progress)
            _write_history(folder, progress.history)
            remaining = (recipe.epochs - progress.epoch) * np.mean([m["seconds"] for m in progress.history[-5:]])
            is_best = progress.best_epoch == progress.epoch and recipe.checkpoint == "best"
            log.info(
                "epoch %d/%d: train loss %.4f, val loss %.4f, val Dice %.3f %s%s; %.0f slices/s, "
                "%s of training left at most", progress.epoch, recipe.epochs, train_loss, val_loss, val_dice,
                val.counted, " (best)" if is_best else "",
                metrics["slices_per_second"], format_duration(remaining),
            )  # fmt: skip
            if is_first():
                on_epoch(progress.history)

    if progress.epoch < recipe.epochs:
        log.info("stopped early: no lower validation loss for %d epochs", recipe.patience)
    for checkpoints in (best, latest):  # the older ones were for a damaged newer one
        for older in checkpoints.steps()[1:]:
            checkpoints.remove(older)
        checkpoints.close()
    return progress


def _save_latest(
    latest: Checkpoints, state: TrainingState, batches: DatasetIterator, progress: Progress, steps: int
) -> None:
    progress.losses = [float(loss) for loss in jax.device_get(progress.losses)]
    latest.save(
        progress.epoch * (steps + 1) + len(progress.losses),
        {**checkpointed(state.trainable, state.frozen.statistics), "optimiser": state.optimiser},
        {**vars(progress), "batches": batches.get_state()},
    )


def _save_best(best: Checkpoints, state: TrainingState, progress: Progress) -> None:
    record = {"epoch": progress.best_epoch, "dice": progress.best_dice}
    best.save(progress.best_epoch, checkpointed(state.trainable, state.frozen.statistics), record)


def _go_on(
    state: TrainingState, batches: DatasetIterator, best: Checkpoints, latest: Checkpoints, folder: Path
) -> Progress:
    """Bring all to the newest whole checkpoint, if there is one, and the best checkpoint to the same moment.

    Raises:
        InputError: epochs were trained, but no whole checkpoint is left.
    """
    newest = latest.newest_whole()
    if newest is None:
        if epochs := broadcast(len(_read_history(folder))):
            raise InputError(
                f"{folder / 'checkpoints' / 'latest'}: no whole checkpoint is left of the {epochs} epochs that were "
                "trained; put one back from a copy, or start a new run"
            )
        return Progress()
    like = {**checkpointed(state.trainable, state.frozen.statistics), "optimiser": state.optimiser}
    restored, saved = latest.restore(like, newest)
    state.trainable, state.optimiser = restored["trainable"], restored["optimiser"]
    state.frozen = state.frozen._replace(statistics=restored["statistics"])
    batches.set_state(saved.pop("batches"))
    progress = Progress(**saved)
    log.info("goes on after %d epochs and %d steps", progress.epoch, len(progress.losses))

    for of_lost_epoch in [epoch for epoch in best.steps() if epoch > progress.best_epoch]:
        best.remove(of_lost_epoch)
    whole = best.newest_whole() or 0
    if whole < progress.best_epoch == progress.epoch and not progress.losses:  # ended between latest and best
        _save_best(best, state, progress)
    elif whole < progress.best_epoch:
        lost, dice = progress.best_epoch, {m["epoch"]: m["val_dice"] for m in progress.history}
        at_hand = [epoch for epoch in (whole, 0 if progress.losses else progress.epoch) if epoch]
        progress.best_epoch = max(at_hand, key=dice.__getitem__, default=0)
        progress.best_dice = dice.get(progress.best_epoch, -1.0)
        if progress.best_epoch > whole:
            _save_best(best, state, progress)
        if is_first():
            log.warning(
                "the checkpoint of the best epoch, %d, was lost; %s", lost,
                f"that of epoch {progress.best_epoch} stands in for it" if at_hand
                else "the next epoch stands in for it",
            )  # fmt: skip
    return progress


def _read_history(folder: Path) -> list[str]:
    path = folder / METRICS
    return path.read_text().splitlines() if path.exists() else []


def _write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    if not is_first():
        return
    with report_os_errors("written", folder, "mend that and go on with --resume"):
        write_atomically(folder / METRICS, "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history))


def validate(
    evaluate: Callable,
    trainable: Any,
    frozen: Frozen,
    source: Source,
    batch_size: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[float, float, float]:
    """Loss per row, and Dice and IoU per unit of the source, such as a volume, in the network's input pixels.

    Classes are averaged within a unit, then units; a class absent from both mask and prediction counts as 1.

    Raises:
        Stopped: before the end, when asked to.
    """
    counts: np.ndarray | None = None
    loss_sum = weight_sum = 0.0
    with closing(evaluation_batches(source, batch_size, local_rows(batch_size))) as batches:
        for batch in batches:
            if stop_requested():
                raise Stopped("during validation")
            of_batch = jax.device_get(evaluate(trainable, frozen, shard_batch(batch)))
            weight = float(of_batch.weight.sum())
            loss_sum, weight_sum = loss_sum + float(of_batch.loss) * weight, weight_sum + weight
            if counts is None:
                counts = np.zeros((source.units, *of_batch.counts.shape[1:]))
            np.add.at(counts, of_batch.volume, of_batch.counts)
    predicted, reference, both = np.moveaxis(counts, -1, 0)
    total = predicted + reference
    dice = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
    iou = np.where(total > 0, both / np.maximum(total - both, 1), 1.0)
    return loss_sum / weight_sum, float(dice.mean()), float(iou.mean())


def _bar(steps: int, done: int, label: str) -> Iterator[int]:
    quiet = not sys.stdout.isatty()
    return iter(tqdm(range(done, steps), label, steps, initial=done, leave=False, file=sys.stdout, disable=quiet))
