"""A finished run's folder -> the network that it trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx

from jaxla.config import InputError, default_cache_dir
from jaxla.data.split import ALL_FOLDS, FOLDS
from jaxla.distributed import broadcast
from jaxla.hardware import first_local_device
from jaxla.models.build import build_network, is_planned
from jaxla.models.weights import parameters_sha256
from jaxla.models.weights_format import require_undamaged
from jaxla.nnunet.plan import Plan, read_plan
from jaxla.runs.folder import BACKBONE, BEST, PLAN, fold_folders, read_largest
from jaxla.runs.record import Record, read_record
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps, checkpointed
from jaxla.training.step import split_network


@dataclass(frozen=True)
class TrainedNetwork:
    """What a run trained, in evaluation mode, and what was recorded of it.

    Attributes:
        networks: that of the epoch that was kept; of cross-validation those of all folds.
        epoch: which one that is; of the first fold.
        plan: that the network was built by, where it is planned from the data.
        largest: groups of classes of which the largest connected part is kept.
    """

    networks: tuple[nnx.Module, ...]
    record: Record
    epoch: int
    plan: Plan | None = None
    largest: tuple[tuple[int, ...], ...] = ()

    @property
    def network(self) -> nnx.Module:
        """The one network.

        Raises:
            InputError: there are several.
        """
        if len(self.networks) > 1:
            raise InputError("a run with --fold=all has a network for each fold: give the folder of one, as fold_0")
        return self.networks[0]


def load_run(folder: str | Path) -> TrainedNetwork:
    """The best checkpoint of a run; a frozen backbone comes from its weights file, which must be unchanged.

    Raises:
        InputError: not a run folder, no checkpoint yet or a damaged one, or the weights file is gone or another one.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record.experiment.fold == ALL_FOLDS:
        return _load_folds(folder, record)
    if not (steps := broadcast(checkpoint_steps(folder / BEST))):
        raise InputError(f"{folder}: has no checkpoint; the run stopped before its first epoch ended")
    model, seed, outputs = record.experiment.model, record.experiment.seed, record.labels.outputs
    plan = read_plan(folder / PLAN) if is_planned(model) else None
    if model.backbone == "frozen":
        network = build_network(replace(model, weights=str(_frozen_weights(folder, record))), outputs, seed)
        if model.weights == "random" and parameters_sha256(network.backbone) != record.weights_sha256:
            raise InputError(f"{folder / BACKBONE}: has changed since training; put it back from a copy")
    else:  # every parameter is in the checkpoint
        network = nnx.eval_shape(lambda: build_network(replace(model, weights="random"), outputs, seed, plan=plan))
    parts = split_network(network, train_backbone=model.backbone == "finetuned")

    saved = checkpointed(parts.trainable, parts.frozen.statistics)
    here = jax.sharding.SingleDeviceSharding(first_local_device())  # whatever device the run was trained on
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
    checkpoints = Checkpoints(folder / BEST, read_only=True)
    restored, progress = checkpoints.restore(like, steps[0])
    checkpoints.close()
    network = nnx.merge(parts.evaluation, restored["trainable"], parts.frozen.parameters, restored["statistics"])
    network.eval()
    return TrainedNetwork((network,), record, progress["epoch"], plan, read_largest(folder))


def _load_folds(folder: Path, record: Record) -> TrainedNetwork:
    begun = [place for place in fold_folders(folder) if place.exists()]
    if len(begun) < FOLDS:
        raise InputError(f"{folder}: only {len(begun)} of its {FOLDS} folds have begun; go on with --resume")
    first, networks = load_run(begun[0]), []
    for place in begun:
        network = load_run(place).network if networks else first.network
        if networks and record.experiment.model.backbone == "frozen":  # one for all, and never more than two in memory
            network.backbone = networks[0].backbone
        networks.append(network)
    return TrainedNetwork(tuple(networks), record, first.epoch, first.plan, read_largest(folder))


def _frozen_weights(folder: Path, record: Record) -> Path:
    """The backbone's file: where it was at training, or in this machine's cache folder; known by its data's sha256."""
    if record.weights == "random":
        return folder / BACKBONE
    arch = record.experiment.model.arch
    candidates = dict.fromkeys((Path(record.weights), default_cache_dir() / "weights" / f"{arch}.safetensors"))
    for path in candidates:
        if path.is_file() and require_undamaged(path) == record.weights_sha256:
            return path
    raise InputError(
        f"{folder}: was trained on a frozen backbone whose file (sha256 of its data {record.weights_sha256[:12]}…) is "
        f"gone or another one; put it back as {' or '.join(map(str, candidates))}"
    )
