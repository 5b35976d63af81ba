"""Load the trained network from the folder of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxla.cli.files import default_cache_dir
from jaxla.config import InputError
from jaxla.data.slices import SliceGeometry
from jaxla.data.split import ALL_FOLDS, FOLDS
from jaxla.distributed import broadcast
from jaxla.hardware import first_local_device
from jaxla.inference.postprocessing import postprocess
from jaxla.inference.segment import Segmentation, SegmentSlices
from jaxla.models.weights import parameters_sha256
from jaxla.models.weights_format import require_undamaged
from jaxla.nnunet.postprocessing import keep_largest, read_groups
from jaxla.runs.folder import BACKBONE, CHECKPOINTS, LARGEST, fold_folders
from jaxla.runs.record import Record, read_record
from jaxla.tasks import Task, restore_task
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps, network_state
from jaxla.training.progress import BEST
from jaxla.training.step import split_network


@dataclass(frozen=True)
class TrainedRun:
    """The trained network of a run, in evaluation mode; with --fold=all, those of all folds."""

    record: Record
    task: Task
    networks: tuple[nnx.Module, ...]  # the network of the kept epoch; with --fold=all one for each fold
    epoch: int  # the kept epoch; with --fold=all that of the first fold
    largest: tuple[tuple[int, ...], ...] = ()  # groups of classes that keep only their largest connected component

    @property
    def network(self) -> nnx.Module:
        """The only network; an InputError if there are several."""
        if len(self.networks) > 1:
            problem = "trained with --fold=all, so it has one network per fold instead of a single one"
            raise InputError("run", problem, "Pass the folder of one fold, such as fold_0.")
        return self.networks[0]

    def postprocess(self, classes: np.ndarray) -> np.ndarray:
        """Return classes [S, H, W] after the method's postprocessing."""
        return keep_largest(postprocess(classes, self.record.experiment.method.postprocessing), self.largest)

    @cached_property
    def segment(self) -> SegmentSlices:
        """A function that segments a scan's slices and postprocesses the classes; compiled once."""
        segment_slices = self.task.make_segment(self.networks)

        def segment(slices: np.ndarray, geometry: SliceGeometry, with_probabilities: bool = False) -> Segmentation:
            classes, probabilities = segment_slices(slices, geometry, with_probabilities)
            return self.postprocess(classes), probabilities

        return segment


def load_run(folder: str | Path) -> TrainedRun:
    """Load the best checkpoint of a run; a frozen backbone comes from its weights file, which must be unchanged.

    Raises:
        InputError: not a run folder, no checkpoint or a damaged one, or the weights file is missing or has changed.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record.experiment.fold == ALL_FOLDS:
        return _load_folds(folder, record)
    if not (steps := broadcast(checkpoint_steps(folder / CHECKPOINTS / BEST))):
        raise InputError(folder, "no checkpoint; the run stopped before its first epoch ended", "Resume the run.")
    task = restore_task(record.experiment, record.labels.outputs, record.extent, folder)
    is_frozen = record.experiment.method.model.backbone == "frozen"
    if is_frozen:
        network = task.build_network(weights=str(_frozen_weights(folder, record)))
        if record.backbone_sha256 and parameters_sha256(network.backbone) != record.backbone_sha256:
            raise InputError(folder / BACKBONE, "has changed since training", "Restore it from a backup.")
    else:  # every parameter is in the checkpoint
        network = nnx.eval_shape(lambda: task.build_network(weights="random"))
    parts = split_network(network, train_backbone=not is_frozen)

    saved = network_state(parts.trainable, parts.frozen.statistics)
    this_device = jax.sharding.SingleDeviceSharding(first_local_device())  # not the devices that the run was trained on
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=this_device), saved)
    checkpoints = Checkpoints(folder / CHECKPOINTS / BEST, read_only=True)
    restored, progress = checkpoints.restore(template, steps[0])
    checkpoints.close()
    network = nnx.merge(parts.evaluation, restored["trainable"], parts.frozen.parameters, restored["statistics"])
    network.eval()
    return TrainedRun(record, task, (network,), progress["epoch"], largest_groups(folder, record))


def largest_groups(folder: Path, record: Record) -> tuple[tuple[int, ...], ...]:
    """Return the groups of classes that keep only their largest connected component."""
    if record.experiment.method.postprocessing.largest == "always":
        return (tuple(range(1, len(record.labels.names) + 1)),)
    return read_groups(folder / LARGEST)


def _load_folds(folder: Path, record: Record) -> TrainedRun:
    started = [fold for fold in fold_folders(folder) if fold.exists()]
    if len(started) < FOLDS:
        raise InputError(folder, f"only {len(started)} of {FOLDS} folds have started", "Resume the run.")
    first = load_run(started[0])
    networks = []
    for fold in started:
        run = load_run(fold) if networks else first
        if networks and record.experiment.method.model.backbone == "frozen":  # all share one backbone in memory
            run.network.backbone = networks[0].backbone
        networks.append(run.network)
    task = restore_task(record.experiment, record.labels.outputs, record.extent, folder)
    return TrainedRun(record, task, tuple(networks), first.epoch, largest_groups(folder, record))


def _frozen_weights(folder: Path, record: Record) -> Path:
    """Return the backbone's file: where it was in training, or in this machine's cache folder, checked by its hash."""
    if record.weights == "random":
        return folder / BACKBONE
    arch = record.experiment.method.model.arch
    candidates = dict.fromkeys((Path(record.weights), default_cache_dir() / "weights" / f"{arch}.safetensors"))
    for path in candidates:
        if path.is_file() and require_undamaged(path) == record.weights_sha256:
            return path
    problem = f"the file of its frozen backbone is missing or has changed (sha256 {record.weights_sha256[:12]}…)"
    raise InputError(folder, problem, f"Restore it as {' or '.join(map(str, candidates))}.")
