"""python -m jaxla.info RUN|WEIGHTS: describe a run folder or a file of weights, without building a network."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.json_files import RESTORE, describe_damage
from jaxla.cli.process import run_command
from jaxla.cli.terminal import escape_controls
from jaxla.config import InputError
from jaxla.data.split import ALL_FOLDS
from jaxla.models.weights_format import parameter_count, read_metadata
from jaxla.runs import folder as run_files
from jaxla.runs.machine import describe_device
from jaxla.runs.record import RECORD, labels_from_json, read_record_json
from jaxla.studies import RUNS, STUDY

T = TypeVar("T")

# This module does not import JAX, so that the command answers in under a second.


def main(arguments: list[str]) -> None:
    """Describe a run or a weights file."""
    parser = command_parser("jaxla.info", "Describe a run folder or a file of converted weights.")
    parser.usage = "python -m jaxla.info RUN|WEIGHTS"
    parser.add_argument("path", type=str, help="a run folder, or a .safetensors file")
    path = Path(parse_arguments(parser, arguments).path)
    if not path.exists():
        raise InputError(path, "no such file or folder", "Pass a run folder or a .safetensors file.")
    if path.is_file() and path.suffix != ".safetensors":
        fix = "Pass one of these. To check scans, use python -m jaxla.verify."
        raise InputError(path, "neither a run folder nor a .safetensors file", fix)
    facts = describe_run(path) if path.is_dir() else describe_weights(path)
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {escape_controls(value)}" for name, value in facts.items()))


def describe_run(folder: Path) -> dict[str, str]:
    """Return facts about a run, by their titles."""
    if (folder / STUDY).exists():
        raise InputError(folder, "a study, not a run", f"Pass one of its runs in {shlex.quote(str(folder / RUNS))}.")
    record = read_record_json(folder)
    try:
        return _describe_record(folder, record)
    except InputError:
        raise
    except (ValueError, KeyError) as error:
        raise InputError(folder / RECORD, f"damaged: {describe_damage(error)}", RESTORE) from error


def _describe_record(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    experiment, environment = record["experiment"], record["environment"]
    history = _read_if_present(run_files.read_metrics, folder) or []
    summary = _read_if_present(run_files.read_summary, folder)
    split = _read_if_present(run_files.read_split_file, folder) or {}
    facts = {"run": str(folder.absolute()), "experiment": f"{experiment['name']}, method {record['label']}"}
    facts |= _describe_state(folder, record, len(history))
    if history:
        facts["validation"] = _describe_validation(folder, record, history, summary)
    if summary and "dice" not in summary:
        facts["test"] = "no test cases"
    elif summary:
        dice, atlas = summary["dice"], summary["atlas"]["dice"]
        scores = f"Dice {dice['mean']:.3f}; IoU {summary['iou']['mean']:.3f}"
        counted = f"mean per {dice['unit']}, n = {dice['n']}"
        facts["test"] = f"{scores} ({counted}); atlas baseline Dice {atlas['mean']:.3f}"
    sha256 = f" (data sha256 {record['weights_sha256'][:12]}…)" if record["weights_sha256"] else ""
    model = {name: value for name, value in experiment["model"].items() if name not in ("arch", "weights", "backbone")}
    facts |= {
        "data": f"{experiment['data']['root']}; " + ", ".join(f"{len(ids)} {part}" for part, ids in split.items()),
        "classes": labels_from_json(record["labels"]).describe(),
        "network": f"{record['network']}{sha256}",
        "weights": record["weights"],
        "options": ", ".join(f"{name}={value}" for name, value in model.items()),
        "input": record["input"],
        "seed": str(experiment["seed"]),
        "device": describe_device(environment),
        "versions": ", ".join(f"{name} {environment['versions'][name]}" for name in ("jaxla", "jax", "flax")),
        "started by": record["command"],
    }
    if resumed := record.get("resumed"):
        facts["resumed"] = ", ".join(session["begun"] for session in resumed)
    return facts


def _describe_state(folder: Path, record: dict[str, Any], epochs: int) -> dict[str, str]:
    """Return how far the run is, and the command that resumes it if it stopped."""
    done = f"{epochs} of at most {record.get('fitted_epochs') or record['experiment']['training']['epochs']} epochs"
    if record["experiment"]["fold"] == ALL_FOLDS:
        folds = run_files.fold_folders(folder)
        done = f"{sum(map(run_files.is_finished, folds))} of {len(folds)} folds"
    if run_files.is_finished(folder):
        return {"state": f"finished after {done}"}
    if run_files.is_running(folder):
        return {"state": f"running: {done} are done"}
    if not os.access(folder, os.W_OK):
        return {"state": f"not finished: {done} are done (without write access, it is unknown whether it is running)"}
    return {"state": f"stopped: {done} are done", "resume with": run_files.resume_command(record["command"], folder)}


def _describe_validation(
    folder: Path, record: dict[str, Any], history: list[run_files.Metrics], summary: run_files.RunSummary | None
) -> str:
    """Return the validation Dice of the epoch that is kept."""
    kept = record["experiment"]["training"]["checkpoint"]
    if "val_dice" not in history[-1]:
        return f"no validation cases; epoch {len(history)} is the last"
    best = history[-1] if kept == "last" else max(history, key=lambda metrics: metrics["val_dice"])
    if summary:  # the tested epoch, in case the checkpoint of the best epoch was lost
        best = run_files.kept_metrics(folder, history, summary)
    return f"{kept} Dice {best['val_dice']:.3f} (mean {record['unit']}) in epoch {best['epoch']}"


def _read_if_present(read: Callable[[Path], T], folder: Path) -> T | None:
    """Return the content of one of the run's files, or None if it is missing."""
    try:
        return read(folder)
    except FileNotFoundError:
        return None


def describe_weights(path: Path) -> dict[str, str]:
    """Return facts about a file of converted weights, by their titles."""
    metadata = read_metadata(path)
    tensors, parameters = parameter_count(path)
    sha256 = metadata.get("source_sha256")
    return {
        "weights": str(path.absolute()),
        "architecture": metadata["arch"],
        "parameters": f"{parameters} in {tensors} arrays, {path.stat().st_size / 1e6:.1f} MB",
        "source": metadata["source"] + (f" (sha256 {sha256})" if sha256 else ""),
        "licence": metadata.get("licence") or "none: these weights were never released",
    }


if __name__ == "__main__":
    run_command(main)
