"""A finished run's folder -> the network that it trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx

from jaxla.config import InputError, default_cache_dir
from jaxla.devices.processes import agreed
from jaxla.models.build import build_network
from jaxla.models.weights import parameters_sha256
from jaxla.models.weights_format import require_undamaged
from jaxla.runs.folder import BACKBONE, BEST
from jaxla.runs.record import Record, read_record
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps, checkpointed
from jaxla.training.step import split_network


@dataclass(frozen=True)
class TrainedNetwork:
    """The network of a run's best epoch, in evaluation mode, and what was recorded of the run."""

    network: nnx.Module
    record: Record
    epoch: int


def load_run(folder: str | Path) -> TrainedNetwork:
    """The best checkpoint of a run; a frozen backbone comes from its weights file, which must be unchanged.

    Raises:
        InputError: not a run folder, no checkpoint yet or a damaged one, or the weights file is gone or another one.
    """
    folder = Path(folder)
    record = read_record(folder)
    if not (steps := agreed(checkpoint_steps(folder / BEST))):
        raise InputError(f"{folder}: has no checkpoint; the run stopped before its first epoch ended")
    model, seed, outputs = record.experiment.model, record.experiment.seed, record.labels.outputs
    if model.backbone == "frozen":
        network = build_network(replace(model, weights=str(_frozen_weights(folder, record))), outputs, seed)
        if model.weights == "random" and parameters_sha256(network.backbone) != record.weights_sha256:
            raise InputError(f"{folder / BACKBONE}: has changed since training; put it back from a copy")
    else:  # every parameter is in the checkpoint
        network = nnx.eval_shape(lambda: build_network(replace(model, weights="random"), outputs, seed))
    parts = split_network(network, train_backbone=model.backbone == "finetuned")

    saved = checkpointed(parts.trainable, parts.frozen.statistics)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # whatever device the run was trained on
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
    checkpoints = Checkpoints(folder / BEST, read_only=True)
    restored, progress = checkpoints.restore(like, steps[0])
    checkpoints.close()
    network = nnx.merge(parts.evaluation, restored["trainable"], parts.frozen.parameters, restored["statistics"])
    return TrainedNetwork(network, record, progress["epoch"])


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
