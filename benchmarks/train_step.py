"""python -m benchmarks.train_step [--method=…] [--size=…] [--batch=…] [--output=FILE]: a training step, and PyTorch's.

Times forward pass, binary cross-entropy, backward pass and Adam of a convolutional network, and of the PyTorch module
that the parity suite compares it with; for nnU-Net, its loss at all resolutions and SGD on the patches of a plan, and
this package's step with augmentation too. Both run in turn in this process, from the same parameters on the same batch:
on CPU in float32 with all cores, PyTorch with channels first and with channels last; on a GPU in bfloat16, PyTorch also
through `torch.compile`. The gradients of both are compared first: they may differ by `MAX_DIFFERENCE`, or by as much as
PyTorch's own two layouts differ from each other (rounding flips ReLUs and the positions of maxima, and a deep network
with random weights amplifies that), but never by more than `LIMIT`. `tests/parity` compares them in float64, where they
agree to 1e-13.

Prints JSON: seconds of a step (median and fastest), slices per second, PyTorch's median divided by this package's for
each form of PyTorch (above 1 this package is faster) and for the fastest of them, the difference between the gradients,
and on Linux how much the process grew during a step. A pause before each step lets the other implementation's threads
go idle, and a step that is not timed follows it, since in training one step follows another.
"""

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxla.experiments import METHODS
from jaxla.models.build import build_network, configuration_of, is_planned, require_size
from jaxla.pipeline.sources import loss_of

from benchmarks.memory import peak, reset_peak
from benchmarks.timing import PAUSE, compare, environment, print_result, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, Training, lookup
from jaxla.hardware import compute_dtype, on_gpu
from jaxla.memory import program_bytes
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.nnunet.augmentation import make_augment, read_size
from jaxla.nnunet.plan import read_plan
from jaxla.training.losses import cross_entropy
from jaxla.training.step import (
    LARGEST_NORM,
    MOMENTUM,
    WEIGHT_DECAY,
    compile_step,
    initial_state,
    make_gradient,
    make_optimiser,
    make_step,
    split_network,
    take_step,
)
from tests.parity.references import as_theirs, nnunet_as_theirs, nnunet_reference_of, reference_of
from tests.parity.test_nnunet import their_loss

PLANNED = ("nnunet_2d", "nnunet_3d")
RIVALS = {
    name: method for name, method in METHODS.items() if method.preprocessing.pad_to == "largest" or name in PLANNED
}
PLAN = Path(__file__).parents[1] / "tests" / "golden" / "nnunet_plans" / "Hippocampus.json"
CLASSES = 3  # for nnU-Net: background and the two structures of the hippocampus
RATE = 1e-4
MAX_DIFFERENCE = {"float32": 2e-2, "bfloat16": 0.2}  # of the gradients, relative L2
LIMIT = 0.3  # PyTorch's own two layouts differ by 0.21 for ResNet-152 on CPU


def main(arguments):
    parser = command_parser("benchmarks.train_step", "Time a convolutional network's training step and PyTorch's.")
    parser.add_argument("--method", type=str, default="unet", help=f"one of {', '.join(RIVALS)}")
    parser.add_argument("--size", type=int, default=320, help="side of the square image in pixels; nnU-Net ignores it")
    parser.add_argument("--batch", type=int | None, default=None, help="batch size (default: 4, or the plan's)")
    parser.add_argument(
        "--plan", type=str, default=str(PLAN), help="nnU-Net's plan (default: of the Decathlon's hippocampus)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each implementation")
    parser.add_argument("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    model = lookup("method", options.method, RIVALS).model
    model = type(model)(**{**vars(model), "weights": "random"})
    if min(4 if options.batch is None else options.batch, options.repeats) < 1:
        raise InputError("--batch and --repeats", "must be at least 1", "Choose larger numbers.")
    gpu, dtype = on_gpu(), jnp.dtype(compute_dtype())
    rng, augmented_step = np.random.default_rng(0), {}

    if is_planned(model):
        plan = read_plan(Path(options.plan))
        configuration = configuration_of(model, plan)
        network = build_network(model, CLASSES, 0, plan=plan)
        batch, size = options.batch or configuration.batch_size, configuration.patch_size
        images = rng.standard_normal((batch, *size, 1), np.float32)
        mask = rng.integers(0, CLASSES, images.shape[:-1]).astype(np.int8)
        loss = loss_of(METHODS[options.method].training, configuration.batch_dice)
        torch_parts = TorchParts(
            nnunet_reference_of(configuration, network),
            lambda logits, mask: their_loss([level.float() for level in logits], mask, configuration.batch_dice),
            lambda parameters: torch.optim.SGD(
                parameters, RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
            ),
            LARGEST_NORM,
        )
        recipe = replace(METHODS[options.method].training, learning_rate=RATE, schedule="constant")

        def to_torch_names(gradients):
            return nnunet_as_theirs(configuration, gradients)

        large = rng.standard_normal((batch, *read_size(size), 1), np.float32)
        augmented = large, rng.integers(-1, CLASSES, large.shape[:-1]).astype(np.int8)
        augment = make_augment(size, CLASSES - 1, zeros_stay=False)
        second = build_network(model, CLASSES, 0, plan=plan)
        augmented_step = {"jaxla augmented": Ours(second, *augmented, recipe, loss, to_torch_names, augment)}
    else:
        require_size(model, "--size", options.size)
        network, batch, size = build_network(model, 1, 0), options.batch or 4, (options.size,) * 2
        images = rng.random((batch, *size, 1), np.float32)
        mask = (images[..., 0] > 0.7).astype(np.uint8)
        loss, recipe = cross_entropy, Training(learning_rate=RATE)
        torch_parts = TorchParts(
            reference_of(network), binary_cross_entropy, lambda parameters: torch.optim.Adam(parameters, RATE)
        )

        def to_torch_names(gradients):
            return as_theirs(network, gradients)

    has_encoder = hasattr(network, "backbone")
    sides = {}
    for form in ("channels first", "channels last", *(["compiled"] if gpu else [])):
        sides[f"torch {form}"] = Theirs(torch_parts, has_encoder, images, mask, form, "cuda" if gpu else "cpu")
    # last, because its steps reuse the memory of the network's parameters
    sides = {"jaxla": Ours(network, images, mask, recipe, loss, to_torch_names)} | augmented_step | sides
    reference = sides["torch channels first"].gradients()
    difference, torch_difference = (
        relative_l2(sides[name].gradients(), reference) for name in ("jaxla", "torch channels last")
    )
    if not difference <= max(MAX_DIFFERENCE[dtype.name], min(torch_difference, LIMIT)):
        sys.exit(
            f"gradients differ by {difference:.1e}, relative L2, and PyTorch's own by {torch_difference:.1e}; "
            "nothing was timed"
        )
    del reference

    seconds, grown = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(options.repeats + 1):  # the first is not counted
        for name, side in sides.items():
            time.sleep(PAUSE)
            side()  # warms the caches and reclaims memory
            before = reset_peak()
            seconds[name].append(timed(side))
            grown[name].append(peak() - before if before else None)
    timing = compare({name: times[1:] for name, times in seconds.items()})
    result = {
        **environment("jax", "flax", "torch"),
        "method": options.method,
        "size": size,
        "batch": batch,
        "dtype": dtype.name,
        "repeats": options.repeats,
        "gradient_relative_l2": difference,
        "gradient_relative_l2_of_torch": torch_difference,
        **timing,
        "fastest_torch_over_jaxla": min(timing["torch_over_jaxla"].values()),
        "slices_per_second": {
            name: batch * (size[0] if len(size) == 3 else 1) / median
            for name, median in timing["median_seconds"].items()
        },
        "grown_bytes": {name: max(values[1:]) if all(values[1:]) else None for name, values in grown.items()},
        "jaxla_program_bytes": sides["jaxla"].bytes,
    }
    print_result(result, options.output)


def relative_l2(gradients, reference):
    """Return the relative L2 difference between gradients, name -> array, over all parameters together."""
    difference = sum(np.square(np.float64(gradients[name]) - reference[name]).sum() for name in reference)
    return float(np.sqrt(difference / sum(np.square(np.float64(array)).sum() for array in reference.values())))


class Ours:
    """This package's training step; a call takes one step and returns the loss."""

    def __init__(self, network, images, mask, recipe, loss, to_torch_names, augment=None):
        self.to_torch_names = to_torch_names
        parts = split_network(network, train_backbone=True)
        optimiser = make_optimiser(recipe, 1000, pretrained_backbone=False)
        self.gradient = make_gradient(parts.training, augment, loss)
        self.state = initial_state(parts, optimiser)
        self.batch = {"input": images, "mask": mask, "weight": np.ones(len(images), np.float32)}
        self.key = jax.random.key(0)
        self.step = compile_step(make_step(self.gradient, optimiser), self.state, self.batch, self.key)
        self.bytes = program_bytes(self.step)

    def gradients(self):
        _, gradients, _ = jax.jit(self.gradient)(self.state.trainable, self.state.frozen, self.batch, self.key)
        return self.to_torch_names(gradients)

    def __call__(self):
        return float(take_step(self.step, self.state, self.batch, self.key))


class TorchParts(NamedTuple):
    """What a training step in PyTorch consists of."""

    module: torch.nn.Module
    loss: Callable  # (logits, mask) -> value
    optimiser: Callable  # parameters -> optimiser
    largest_norm: float | None = None  # to which gradients are clipped


def binary_cross_entropy(logits, mask):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), mask.float())


class Theirs:
    """PyTorch's training step; a call takes one step and returns the loss."""

    def __init__(self, parts, has_encoder, images, mask, form, device):
        torch.set_num_threads(os.cpu_count())
        self.device = device
        last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        layout = torch.contiguous_format if form == "channels first" else last
        module = copy.deepcopy(parts.module).to(device, memory_format=layout).train()
        if has_encoder:  # ImageNet's three channels
            images = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
        images = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        self.images = images.to(device).contiguous(memory_format=layout)
        self.mask = torch.from_numpy(mask).to(device)
        self.module, self.loss_of, self.largest_norm = module, parts.loss, parts.largest_norm
        self.run = torch.compile(module) if form == "compiled" else module
        self.optimiser = parts.optimiser(module.parameters())

    def loss(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=compute_dtype() == jnp.bfloat16):
            logits = self.run(self.images)
        return self.loss_of(logits, self.mask)

    def gradients(self):
        self.loss().backward()
        gradients = {  # the loss does not include the coarsest logits of nnU-Net
            name: np.zeros(value.shape) if value.grad is None else value.grad.float().cpu().numpy()
            for name, value in self.module.named_parameters()
        }
        self.optimiser.zero_grad()
        return gradients

    def __call__(self):
        self.optimiser.zero_grad()
        loss = self.loss()
        loss.backward()
        if self.largest_norm:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.largest_norm)
        self.optimiser.step()
        return loss.item()


if __name__ == "__main__":
    run_command(main)
