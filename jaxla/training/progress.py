"""The progress of a training run, and its two kinds of checkpoints: `latest`, to resume from, and `best`, to use."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from grain.python import DatasetIterator

from jaxla.config import InputError
from jaxla.distributed import is_first
from jaxla.training.checkpoints import Checkpoints, network_state
from jaxla.training.trainer import Trainer

log = logging.getLogger(__name__)

BEST, LATEST = "best", "latest"  # folders of the two kinds of checkpoints


@dataclass
class Progress:
    """The progress of a training run, without arrays and the order of samples; part of every checkpoint."""

    epoch: int = 0  # completed epochs
    losses: list[float] = field(default_factory=list)  # losses of the steps taken in the next epoch
    seconds: float = 0.0  # time that these steps took
    best_epoch: int = 0  # epoch of the best checkpoint
    best_dice: float = -1.0  # its validation Dice; -1 without validation
    lowest_loss: float = float("inf")  # lowest validation loss so far
    epochs_since_lowest: int = 0  # completed epochs since then
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics of each completed epoch
    step_bytes: int = 0  # device memory of a compiled step


class TrainingCheckpoints:
    """The latest and the best checkpoint of a training run, in two folders within `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best, self.latest = Checkpoints(folder / BEST), Checkpoints(folder / LATEST)

    def save_latest(self, trainer: Trainer, batches: DatasetIterator, progress: Progress) -> None:
        """Save everything that training resumes from."""
        progress.losses = [float(loss) for loss in jax.device_get(progress.losses)]
        self.latest.save(
            progress.epoch * (trainer.steps_per_epoch + 1) + len(progress.losses),
            _training_state(trainer),
            {**vars(progress), "batches": batches.get_state()},
        )

    def save_best(self, trainer: Trainer, progress: Progress) -> None:
        """Save the network as that of the best epoch."""
        record = {"epoch": progress.best_epoch, "dice": progress.best_dice}
        trainable, frozen = trainer.kept_state
        self.best.save(progress.best_epoch, network_state(trainable, frozen.statistics), record)

    def resume(self, trainer: Trainer, batches: DatasetIterator, epochs_done: int) -> Progress:
        """Restore the newest intact checkpoint, if there is one, and make the best checkpoint consistent with it.

        Raises:
            InputError: earlier calls reported `epochs_done`, but no intact checkpoint is left.
        """
        newest = self.latest.find_newest_intact()
        if epochs_done and not newest:
            problem = f"no intact checkpoint of the {epochs_done} trained epochs is left"
            raise InputError(self.folder / LATEST, problem, "Restore one from a backup, or train in another folder.")
        self.latest.remove_after(newest)
        if not newest:
            return Progress()
        restored, saved = self.latest.restore(_training_state(trainer), newest)
        trainer.trainable, trainer.optimiser_state = restored["trainable"], restored["optimiser"]
        trainer.frozen = trainer.frozen._replace(statistics=restored["statistics"])
        batches.set_state(saved.pop("batches"))
        progress = Progress(**saved)
        log.info("resuming after %d epochs and %d steps", progress.epoch, len(progress.losses))
        self._restore_best(trainer, progress)
        return progress

    def _restore_best(self, trainer: Trainer, progress: Progress) -> None:
        """Remove best checkpoints of lost epochs, and replace a lost best checkpoint."""
        self.best.remove_after(progress.best_epoch)
        intact = self.best.find_newest_intact()
        self.best.remove_after(intact)
        is_at_epoch_end = not progress.losses
        if intact == progress.best_epoch:
            return
        if progress.best_epoch == progress.epoch and is_at_epoch_end:  # killed between saving latest and best
            self.save_best(trainer, progress)
            return
        lost = progress.best_epoch
        dice = {line["epoch"]: line.get("val_dice", -1.0) for line in progress.history}
        candidates = [epoch for epoch in (intact, progress.epoch if is_at_epoch_end else 0) if epoch]
        rank = dice.__getitem__ if trainer.recipe.checkpoint == "best" else None
        progress.best_epoch = max(candidates, key=rank, default=0)
        progress.best_dice = dice.get(progress.best_epoch, -1.0)
        if progress.best_epoch > intact:
            self.save_best(trainer, progress)
        if is_first():
            replacement = f"epoch {progress.best_epoch} replaces it" if candidates else "the next epoch replaces it"
            log.warning("the checkpoint of the best epoch, %d, was lost; %s", lost, replacement)

    def close(self) -> None:
        """Remove older checkpoints, which were kept in case a newer one is damaged."""
        for checkpoints in (self.best, self.latest):
            for step in checkpoints.steps()[1:]:
                checkpoints.remove(step)
            checkpoints.close()


def _training_state(trainer: Trainer) -> dict[str, Any]:
    return {**network_state(trainer.trainable, trainer.frozen.statistics), "optimiser": trainer.optimiser_state}
