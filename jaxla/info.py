"""python -m jaxla.info RUN|WEIGHTS: what a run folder or a file of converted weights is, without building a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError

if TYPE_CHECKING:
    from jaxla.runs.record import Record

# Nothing here imports JAX: an answer in under a second is what this command is for.


def main(arguments: list[str]) -> None:
    """Describe a run or a weights file.

    Raises:
        InputError: the path is neither.
    """
    parser = command_parser("jaxla.info", "Say what a run folder or a file of converted weights is.")
    parser.usage = "python -m jaxla.info RUN|WEIGHTS"
    parser.add_argument("path", type=str, help="a run folder, or a .safetensors file")
    path = Path(parse_arguments(parser, arguments).path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a run folder or a .safetensors file")
    facts = _describe_run(path) if path.is_dir() else _describe_weights(path)
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def _describe_run(folder: Path) -> dict[str, str]:
    from jaxla.data.split import ALL_FOLDS
    from jaxla.runs.folder import (
        METRICS,
        PLAN,
        RUNS,
        SPLIT,
        STUDY,
        SUMMARY,
        fold_folders,
        is_finished,
        is_running,
        read_metrics,
        resume_command,
    )
    from jaxla.runs.machine import describe_device
    from jaxla.runs.record import method_label, read_record

    if (folder / STUDY).exists():
        raise InputError(f"{folder}: a study; give one of its runs, which lie in {folder / RUNS}")
    record = read_record(folder)
    experiment, environment = record.experiment, record.environment
    facts = {"run": str(folder.absolute()), "experiment": f"{experiment.name}, method {method_label(experiment)}"}

    history = _read(folder / METRICS, lambda path: read_metrics(path.parent)) or []
    summary = _read(folder / SUMMARY)
    split = _read(folder / SPLIT) or {}
    epochs = f"{len(history)} of at most {experiment.training.epochs} epochs"
    if experiment.fold == ALL_FOLDS:
        folds = fold_folders(folder)
        epochs = f"{sum(map(is_finished, folds))} of {len(folds)} folds"
    if is_finished(folder):
        facts["state"] = f"finished after {epochs}"
    elif is_running(folder):
        facts["state"] = f"running: {epochs} are done"
    elif not os.access(folder, os.W_OK):
        facts["state"] = f"not finished: {epochs} are done (whether it runs, only who may write there can tell)"
    else:
        facts["state"] = f"ended before it was finished: {epochs} are done"
        facts["go on with"] = resume_command(record.command, folder)
    if history:
        best = max(history, key=lambda metrics: metrics["val_dice"])
        if experiment.training.checkpoint == "last":
            best = history[-1]
        if summary:  # the epoch that was tested, should the best one's checkpoint have been lost
            best = history[summary["best_epoch"] - 1]
        counted = "over all patches together" if (folder / PLAN).exists() else "mean per volume"
        kept = experiment.training.checkpoint
        facts["validation"] = f"{kept} Dice {best['val_dice']:.3f} ({counted}) in epoch {best['epoch']}"
    if summary:
        facts["test"] = "; ".join(
            f"{name} {summary[key]['mean']:.3f}" for name, key in (("Dice", "dice"), ("IoU", "iou"))
        ) + (
            f" (mean per {summary['dice']['unit']}, n = {summary['dice']['n']}); "
            f"atlas Dice {summary['atlas']['dice']['mean']:.3f}"
        )
    model, weights = experiment.model, record.weights
    facts |= {
        "data": f"{experiment.data.root}; " + ", ".join(f"{len(ids)} {part}" for part, ids in split.items()),
        "classes": record.labels.describe(),
        "backbone": f"{model.arch}, {model.backbone}, "
        + ("random weights" if weights == "random" else f"{weights} (data sha256 {record.weights_sha256[:12]}…)"),
        **({"decoder": model.decoder} if model.network == "transformer_segmenter" else {}),
        "input": _input(folder, record),
        "seed": str(experiment.seed),
        "device": describe_device(environment),
        "versions": ", ".join(f"{name} {environment['versions'][name]}" for name in ("jaxla", "jax", "flax")),
        "begun by": record.command,
        **({"resumed": ", ".join(session["begun"] for session in record.resumed)} if record.resumed else {}),
    }
    return facts


def _input(folder: Path, record: Record) -> str:
    """What the network sees at once."""
    from jaxla.nnunet.plan import ARCH_CONFIGURATIONS, read_plan
    from jaxla.runs.folder import PLAN

    if (folder / PLAN).exists():
        planned = read_plan(folder / PLAN).configuration(ARCH_CONFIGURATIONS[record.experiment.model.arch])
        patch, spacing = (" × ".join(f"{n:g}" for n in numbers) for numbers in (planned.patch_size, planned.spacing))
        return f"patches of {patch} voxels of {spacing} mm"
    extent = f", of {record.extent:.0f} × {record.extent:.0f} mm" if record.extent else ""
    pixels = f"{record.canvas.size} × {record.canvas.size} pixels{extent}"
    model = record.experiment.model
    return f"whole volumes of {pixels}, --model.windows={model.windows}" if model.network == "windows" else pixels


def _read(path: Path, read: Callable[[Path], Any] = lambda path: json.loads(path.read_text())) -> Any:
    """What a file of the run says; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or unreadable ({error})") from error


def _describe_weights(path: Path) -> dict[str, str]:
    from jaxla.models.weights_format import parameter_count, read_metadata

    metadata = read_metadata(path)
    tensors, parameters = parameter_count(path)
    return {
        "weights": str(path.absolute()),
        "architecture": metadata["arch"],
        "parameters": f"{parameters} in {tensors} arrays, {path.stat().st_size / 1e6:.1f} MB",
        "source": metadata["source"]
        + (f" (sha256 {metadata['source_sha256']})" if metadata.get("source_sha256") else ""),
        "licence": metadata.get("licence") or "none: these weights were not released by anyone",
    }


if __name__ == "__main__":
    run_command(main)
