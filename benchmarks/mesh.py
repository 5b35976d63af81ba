"""python -m benchmarks.mesh [--arch=…] [--backbone=…] [--size=…] [--batch=…]: cost of a mesh of one device.

Times a training step (loss, gradients, Adam) in turn within a mesh of one device, as in every run, and without a mesh,
from the same parameters on the same batch. Prints JSON: seconds per step (median and fastest) and the ratio of the
medians. Before timing, checks that both steps give the same loss, bit for bit.
"""

from contextlib import nullcontext
from typing import Literal

import numpy as np

from benchmarks.timing import environment, median_and_fastest, print_result, time_in_turn
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, Training, lookup
from jaxla.mesh import use_devices
from jaxla.models.backbones import TRANSFORMERS
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.networks.base import build_network
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.training.trainer import Trainer


def main(arguments):
    parser = command_parser("benchmarks.mesh", "Time a training step with a mesh of one device and without a mesh.")
    parser.add_argument("--arch", type=str, default="vit_mini8", help="a vision transformer")
    backbone = "`frozen` trains only the decoder"
    parser.add_argument("--backbone", type=Literal["frozen", "finetuned"], default="finetuned", help=backbone)
    parser.add_argument("--size", type=int, default=96, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=4, help="slices per step")
    parser.add_argument("--repeats", type=int, default=31, help="timed steps with and without the mesh")
    options = parse_arguments(parser, arguments)
    arch = HUB_SPELLINGS.get(options.arch, options.arch)
    patch = lookup("--arch", arch, TRANSFORMERS).patch
    if options.size % patch or options.size < 1:
        raise InputError(f"--size={options.size}", f"not a multiple of the patch size {patch}", "Choose another size.")
    if min(options.batch, options.repeats) < 1:
        raise InputError("--batch and --repeats", "must be at least 1", "Choose larger numbers.")
    model = TransformerSegmenterOptions(arch, weights="random", backbone=options.backbone)

    contexts = {"no mesh": nullcontext, "mesh": lambda: use_devices(1)}
    steps = {name: make_training_step(model, options, context) for name, context in contexts.items()}
    losses = {name: step() for name, step in steps.items()}
    if len(set(losses.values())) > 1:
        raise RuntimeError(f"losses differ: {losses['mesh']} within a mesh, {losses['no mesh']} without")
    seconds = median_and_fastest(time_in_turn(steps, options.repeats))
    medians = seconds["median_seconds"]
    shown = {"arch": arch} | {name: options[name] for name in ("backbone", "size", "batch", "repeats")}
    ratio = {"mesh_over_no_mesh": medians["mesh"] / medians["no mesh"]}
    print_result(environment("jax", "flax") | shown | seconds | ratio)


def make_training_step(model, options, use_mesh):
    """Return a function that takes one training step within `use_mesh()` and returns the loss."""
    rng = np.random.default_rng(0)
    images = rng.random((options.batch, options.size, options.size, 1), np.float32)
    mask = (images[..., 0] > 0.7).astype(np.uint8)
    weight = np.ones(options.batch, np.float32)
    batch = {"input": images, "mask": mask, "weight": weight}
    network, recipe = build_network(model, 1, 0), Training(batch_size=options.batch)
    with use_mesh():
        trainer = Trainer(network, recipe, options.repeats, train_backbone=model.backbone == "finetuned")

    def run():
        with use_mesh():
            return float(trainer.step(batch, 0))

    return run


if __name__ == "__main__":
    run_command(main)
