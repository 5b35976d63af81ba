"""A finished run's folder -> the network that it trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx

from jaxla.config import InputError
from jaxla.models.network import build_network
from jaxla.models.weights import file_sha256
from jaxla.training.checkpoints import Checkpoints
from jaxla.training.run_folder import Record, read_record
from jaxla.training.step import split_network


@dataclass(frozen=True)
class TrainedNetwork:
    """The network of a run's best epoch, in evaluation mode, and what was recorded of the run."""

    network: nnx.Module
    record: Record
    epoch: int


def load_run(folder: str | Path) -> TrainedNetwork:
    """The best checkpoint of a run; a frozen pretrained backbone comes from its weights file, which must be unchanged.

    Raises:
        InputError: not a run folder, no checkpoint yet, or the weights file is gone or another one.
    """
    folder = Path(folder)
    record = read_record(folder)
    if not (folder / "checkpoints" / "best").is_dir():
        raise InputError(f"{folder}: has no checkpoint; the run stopped before its first epoch ended")
    model, seed, outputs = record.experiment.model, record.experiment.seed, record.labels.outputs
    if model.backbone == "frozen":
        _require_same_weights(folder, record)
        network = build_network(replace(model, weights=record.weights), outputs, seed)
    else:  # every parameter is in the checkpoint
        network = nnx.eval_shape(lambda: build_network(replace(model, weights="random"), outputs, seed))
    parts = split_network(network, train_backbone=model.backbone == "finetuned")
    checkpoints = Checkpoints(folder / "checkpoints" / "best", read_only=True)
    like = {"trainable": parts.trainable, "statistics": parts.frozen.statistics}
    restored, progress = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like))
    checkpoints.close()
    return TrainedNetwork(parts.merge(**restored), record, progress["epoch"])


def _require_same_weights(folder: Path, record: Record) -> None:
    if record.weights == "random":
        return
    weights = Path(record.weights)
    if not weights.is_file() or file_sha256(weights) != record.weights_sha256:
        raise InputError(
            f"{folder}: was trained on the frozen backbone {weights} (sha256 {record.weights_sha256[:12]}…), "
            "which is gone or has changed; put that file back"
        )
