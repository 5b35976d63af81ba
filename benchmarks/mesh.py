"""python -m benchmarks.mesh [--arch=…] [--backbone=…] [--size=…] [--batch=…]: what the mesh costs, on one device.

One step of training — loss, gradients, Adam — compiled within a mesh of one device, as every run is, and outside of
any. Both run in this process, in turn, from the same parameters on the same batch. Prints JSON: seconds of a step
(median and fastest), and the median with the mesh over the median without. Before anything is timed the losses of both
are compared: they must be the same bits.
"""

import json
import statistics
import sys

import jax
import numpy as np

from benchmarks.timing import about, in_turn
from jaxla.config import InputError, Model, Training
from jaxla.devices.mesh import spread, to_devices, use_devices
from jaxla.models.backbones import TRANSFORMERS, architecture
from jaxla.models.build import build_network
from jaxla.shell.command_line import command_parser, parse_arguments
from jaxla.shell.process import run_command
from jaxla.training.step import initial_state, make_gradient, make_optimiser, make_step, split_network


def main(arguments):
    parser = command_parser("benchmarks.mesh", "A training step with a mesh of one device and without.")
    parser.add_argument("--arch", type=str, default="vit_mini8", help="of a vision transformer")
    parser.add_argument("--backbone", type=str, default="finetuned", help="frozen or finetuned")
    parser.add_argument("--size", type=int, default=96, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=31, help="steps of each, of which the median is taken")
    options = parse_arguments(parser, arguments)
    arch = architecture("--arch", options.arch)
    if options.size % TRANSFORMERS[arch].patch or min(options.size, options.batch, options.repeats) < 1:
        raise InputError(f"--size must be a multiple of {TRANSFORMERS[arch].patch}, --batch and --repeats at least 1")
    model = Model(arch=arch, weights="random", backbone=options.backbone)

    without = Step(model, options)
    with use_devices(1):
        within = Step(model, options)
        first = within(), without()
        if first[0] != first[1]:
            raise InputError(f"losses differ: {first[0]} within a mesh, {first[1]} without")

    def run_within():
        with use_devices(1):
            within()

    seconds = in_turn({"mesh": run_within, "no mesh": without}, options.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        **about("jax", "flax"),
        "arch": arch,
        "backbone": options.backbone,
        "size": options.size,
        "batch": options.batch,
        "repeats": options.repeats,
        "median_seconds": medians,
        "fastest_seconds": {name: min(times) for name, times in seconds.items()},
        "mesh_over_no_mesh": medians["mesh"] / medians["no mesh"],
    }
    json.dump(result, sys.stdout, indent=1)
    print()


class Step:
    """A step that can be taken again and again; gives the loss. Within a mesh where it is made and called in one."""

    def __init__(self, model, options):
        parts = split_network(build_network(model, 1, 0), train_backbone=model.backbone == "finetuned")
        optimiser = make_optimiser(Training(), options.repeats, pretrained_backbone=False)
        self.step = make_step(make_gradient(parts.training), optimiser)
        self.trainable, self.frozen = to_devices(parts.trainable), to_devices(parts.frozen)
        self.state = initial_state(optimiser, self.trainable)
        rng = np.random.default_rng(0)
        images = rng.random((options.batch, options.size, options.size, 1), np.float32)
        self.batch = {
            "input": images,
            "mask": (images[..., 0] > 0.7).astype(np.uint8),
            "weight": np.ones(options.batch, np.float32),
        }
        self.key = jax.random.key(0)

    def __call__(self):
        batch = spread(self.batch)  # part of what a mesh costs
        self.trainable, statistics, self.state, loss = self.step(
            self.trainable, self.frozen, self.state, batch, self.key
        )
        self.frozen = self.frozen._replace(statistics=statistics)
        return float(loss)


if __name__ == "__main__":
    run_command(main)
