"""Train for a few seconds in a process that tests kill or stop."""

import argparse
import os
import signal
import sys
from pathlib import Path

import jax
from flax import nnx

from jaxla.cli.process import run_command
from jaxla.config import BackboneTraining
from jaxla.data.batches import SliceSource
from jaxla.data.inputs import Canvas
from jaxla.models.networks.transformer_segmenter import ConvolutionalDecoder, TransformerSegmenter
from jaxla.runs.folder import count_epochs, write_metrics
from jaxla.training import loop, trainer
from jaxla.training.progress import TrainingCheckpoints
from tests.tiny import randomise, tiny_backbone
from tests.training.scans import prepare_scans

RECIPE = BackboneTraining(epochs=9, batch_size=4, learning_rate=8e-3, backbone_learning_rate=1e-3, patience=1)
STEPS = 4  # per epoch of 13 slices


def make_trainer():
    """Return the trainer of a fine-tuned transformer and a decoder whose BatchNorm keeps statistics."""
    decoder = nnx.eval_shape(lambda: ConvolutionalDecoder(32, (8, 8, 4), 1, rngs=nnx.Rngs(0)))
    network = TransformerSegmenter(tiny_backbone(), randomise(decoder, 1))
    return trainer.Trainer(network, RECIPE, STEPS, has_pretrained_backbone=True, seed=3)


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("scans", type=Path)
    parser.add_argument("--compiled", help="JAX's cache of compiled functions")
    parser.add_argument("--save-every", type=float, default=loop.SAVE_SECONDS, help="seconds")
    parser.add_argument(
        "--dies-before-best", type=int, help="epoch whose `latest` checkpoint is the last thing the process writes"
    )
    parser.add_argument("--stopped-in-validation", type=int, help="epoch in whose validation SIGTERM arrives")
    options = parser.parse_args(arguments)
    if options.compiled:
        jax.config.update("jax_compilation_cache_dir", options.compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    loop.SAVE_SECONDS = options.save_every
    save_best, evaluation_batches = TrainingCheckpoints.save_best, trainer.evaluation_batches
    epochs = []

    def save_best_or_die(checkpoints, trained, progress):
        if progress.epoch == options.dies_before_best:
            os._exit(9)
        save_best(checkpoints, trained, progress)

    def batches_and_sigterm(*arguments):
        for batch in evaluation_batches(*arguments):
            yield batch
            if len(epochs) + 1 == options.stopped_in_validation:
                os.kill(os.getpid(), signal.SIGTERM)

    def report(history):
        write_metrics(options.folder, history)
        epochs[:] = history

    TrainingCheckpoints.save_best, trainer.evaluation_batches = save_best_or_die, batches_and_sigterm
    options.folder.mkdir(exist_ok=True)
    volumes = prepare_scans(options.scans)
    loop.fit(
        make_trainer(),
        SliceSource(volumes[1:], Canvas(32)),
        SliceSource(volumes[:1], Canvas(32)),
        options.folder / "checkpoints",
        epochs_done=count_epochs(options.folder),
        on_epoch=report,
    )


def run_as_command(arguments):
    """Run `main` as a command, with a command's exit codes and handling of SIGTERM."""
    sys.argv = ["driver", *map(str, arguments)]
    run_command(main)
