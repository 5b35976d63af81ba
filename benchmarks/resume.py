"""python -m benchmarks.resume [--output=FILE]: compare resumed with uninterrupted training.

Trains a tiny fine-tuned transformer four times from the same parameters: twice without interruption, which shows
whether training on this device is deterministic, and twice interrupted after the first epoch and resumed.

Prints JSON: the relative L2 difference of the trained parameters from those of the first run, for each of the other
runs; 0 if all bits are equal. Exits with 1 if a resumed run differs by more than ten times as much as the second
uninterrupted run.
"""

import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from benchmarks.timing import environment, print_result
from benchmarks.train_step import relative_l2
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import Stopped, run_command
from jaxla.data.batches import SliceSource
from jaxla.data.inputs import Canvas
from jaxla.training.loop import fit
from tests.tiny import flat_arrays
from tests.training.resume_driver import make_trainer
from tests.training.scans import disc_scans

MAX_FACTOR = 10  # allowed difference, relative to the difference between two uninterrupted runs


def main(arguments):
    parser = command_parser("benchmarks.resume", "Compare interrupted and uninterrupted training on this device.")
    parser.add_argument("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    with TemporaryDirectory(prefix="jaxla-resume-") as folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "compiled"))  # the same programs each time
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        volumes = disc_scans(Path(folder) / "scans")
        trained = {
            name: train(volumes, Path(folder) / name.replace(" ", "_"), interrupted="resumed" in name)
            for name in ("uninterrupted", "uninterrupted again", "resumed", "resumed again")
        }
    reference = trained.pop("uninterrupted")
    differences = {name: relative_l2(parameters, reference) for name, parameters in trained.items()}
    print_result({**environment("jax", "flax"), "relative_l2_from_uninterrupted": differences}, options.output)
    repeated = differences.pop("uninterrupted again")
    if max(differences.values()) > MAX_FACTOR * repeated:
        resumed = max(differences.values())
        sys.exit(f"resumed training differs by {resumed:.1e}, repeated uninterrupted training by {repeated:.1e}")


def train(volumes, folder, interrupted):
    """Train, with one interruption or without, and return the parameters by name."""
    folder.mkdir()
    arguments = (SliceSource(volumes[1:], Canvas(32)), SliceSource(volumes[:1], Canvas(32)), folder)
    epochs = []

    def stop_after_an_epoch(history):
        epochs[:] = history
        if len(history) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    if interrupted:
        try:
            fit(make_trainer(), *arguments, on_epoch=stop_after_an_epoch)
        except Stopped:
            pass
        else:
            raise RuntimeError("training was not interrupted")
    trainer = make_trainer()
    fit(trainer, *arguments, epochs_done=len(epochs))
    return flat_arrays(trainer.network())


if __name__ == "__main__":
    run_command(main)
