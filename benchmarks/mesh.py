"""python -m benchmarks.mesh [--arch=…] [--backbone=…] [--size=…] [--batch=…]: what the mesh costs, on one device.

One step of training — loss, gradients, Adam — compiled within a mesh of one device, as every run is, and outside of
any. Both run in this process, in turn, from the same parameters on the same batch. Prints JSON: seconds of a step
(median and fastest), and the median with the mesh over the median without. Before anything is timed the losses of both
are compared: they must be the same bits.
"""

from contextlib import nullcontext

import jax
import numpy as np
from jaxla.models.build import build_network

from benchmarks.timing import environment, median_and_fastest, print_result, time_in_turn
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, Model, Training
from jaxla.distributed import shard_batch, use_devices
from jaxla.models.backbones import TRANSFORMERS, transformer_name
from jaxla.models.build import build_network
from jaxla.training.step import initial_state, make_gradient, make_optimiser, make_step, split_network, take_step


def main(arguments):
    parser = command_parser("benchmarks.mesh", "A training step with a mesh of one device and without.")
    parser.add_argument("--arch", type=str, default="vit_mini8", help="of a vision transformer")
    parser.add_argument("--backbone", type=str, default="finetuned", help="frozen or finetuned")
    parser.add_argument("--size", type=int, default=96, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=31, help="steps of each, of which the median is taken")
    options = parse_arguments(parser, arguments)
    arch = transformer_name("--arch", options.arch)
    if options.size % TRANSFORMERS[arch].patch or min(options.size, options.batch, options.repeats) < 1:
        raise InputError(f"--size must be a multiple of {TRANSFORMERS[arch].patch}, --batch and --repeats at least 1")
    model = Model(arch=arch, weights="random", backbone=options.backbone)

    sides = {
        "no mesh": a_step(model, options, nullcontext),
        "mesh": a_step(model, options, lambda: use_devices(1)),
    }
    losses = {name: side() for name, side in sides.items()}
    if len(set(losses.values())) > 1:
        raise InputError(f"losses differ: {losses['mesh']} within a mesh, {losses['no mesh']} without")
    found = median_and_fastest(time_in_turn(sides, options.repeats))
    print_result(
        {
            **environment("jax", "flax"),
            "arch": arch,
            "backbone": options.backbone,
            "size": options.size,
            "batch": options.batch,
            "repeats": options.repeats,
            **found,
            "mesh_over_no_mesh": found["median_seconds"]["mesh"] / found["median_seconds"]["no mesh"],
        }
    )


def a_step(model, options, devices):
    """A step that can be taken again and again, within `devices()`; gives the loss."""
    rng = np.random.default_rng(0)
    images = rng.random((options.batch, options.size, options.size, 1), np.float32)
    batch = {
        "input": images,
        "mask": (images[..., 0] > 0.7).astype(np.uint8),
        "weight": np.ones(options.batch, np.float32),
    }
    parts = split_network(build_network(model, 1, 0), train_backbone=model.backbone == "finetuned")
    optimiser = make_optimiser(Training(), options.repeats, pretrained_backbone=False)
    step = make_step(make_gradient(parts.training), optimiser)
    with devices():
        state = initial_state(parts, optimiser)

    def run():
        with devices():
            return float(take_step(step, state, shard_batch(batch), jax.random.key(0)))

    return run


if __name__ == "__main__":
    run_command(main)
