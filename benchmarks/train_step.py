"""python -m benchmarks.train_step [--method=…] [--size=…] [--batch=…] [--output=FILE]: a step beside PyTorch's.

Forward pass, binary cross-entropy, backward pass and Adam, of a convolutional network and of the PyTorch module that
the parity suite compares it with; of nnU-Net its own loss at all resolutions and SGD, on the patches of a plan, and
this package's step once more with the augmentation. Both run in this process, in turn, from the same parameters on the
same batch. On CPU in float32 with all cores, PyTorch with channels first and with channels last; on a GPU in bfloat16,
PyTorch also through `torch.compile`. Before anything is timed the gradients of both are compared: they may differ by
`AGREEMENT`, or by as much as PyTorch's own two layouts do from each other (rounding flips ReLUs and the places of
maxima, and a deep network with random weights multiplies that), but never by more than `LIMIT`. `tests/parity` compares
them in float64, where they agree to 1e-13.

Prints JSON: seconds of a step (median and fastest), slices per second, PyTorch's median over this package's for each
form of PyTorch (above 1 this package is the faster one) and for the fastest of them, how far the gradients differ, and
on Linux by how much the process grew at most during a step. A pause before each step lets the threads of the other side
fall asleep, and a step that is not timed follows it, as steps follow each other in training.
"""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU, so that PyTorch finds memory too

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxla.experiments import METHODS

from benchmarks.memory import peak, reset_peak
from benchmarks.timing import PAUSE, about, compared, print_result, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, Training, lookup
from jaxla.memory import program_bytes
from jaxla.models.build import build_network, configuration_of, is_planned, require_size
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.models.weights import compute_dtype
from jaxla.nnunet.augmentation import initial_patch_size, make_augment
from jaxla.nnunet.plan import read_plan
from jaxla.pipeline.sources import loss_of
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
CLASSES = 3  # of nnU-Net: the hippocampus's two structures, and background
RATE = 1e-4
AGREEMENT = {"float32": 2e-2, "bfloat16": 0.2}  # relative L2 of the gradients
LIMIT = 0.3  # PyTorch's own two differ by 0.21 for ResNet-152, on CPU


def main(arguments):
    parser = command_parser("benchmarks.train_step", "A convolutional network's training step beside PyTorch's.")
    parser.add_argument("--method", type=str, default="unet", help=f"one of {', '.join(RIVALS)}")
    parser.add_argument("--size", type=int, default=320, help="side of the square image in pixels; not of nnU-Net")
    parser.add_argument("--batch", type=int | None, default=None, help="slices in a step (default: 4, or the plan's)")
    parser.add_argument("--plan", type=str, default=str(PLAN), help="of nnU-Net (default: the Decathlon hippocampus's)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each, of which the median is taken")
    parser.add_argument("--output", type=str, help="write the JSON there too")
    options = parse_arguments(parser, arguments)
    model = lookup("method", options.method, RIVALS).model
    model = type(model)(**{**vars(model), "weights": "random"})
    if min(4 if options.batch is None else options.batch, options.repeats) < 1:
        raise InputError("--batch and --repeats must be at least 1")
    on_gpu, dtype = jax.default_backend() == "gpu", jnp.dtype(compute_dtype())
    rng, further = np.random.default_rng(0), {}

    if is_planned(model):
        plan = read_plan(Path(options.plan))
        configuration = configuration_of(model, plan)
        network = build_network(model, CLASSES, 0, plan=plan)
        batch, size = options.batch or configuration.batch_size, configuration.patch_size
        images = rng.standard_normal((batch, *size, 1), np.float32)
        mask = rng.integers(0, CLASSES, images.shape[:-1]).astype(np.int8)
        loss = loss_of(METHODS[options.method].training, configuration.batch_dice)
        taken = OfTheirs(
            nnunet_reference_of(configuration, network),
            lambda logits, mask: their_loss([level.float() for level in logits], mask, configuration.batch_dice),
            lambda parameters: torch.optim.SGD(
                parameters, RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
            ),
            LARGEST_NORM,
        )
        recipe = replace(METHODS[options.method].training, learning_rate=RATE, schedule="constant")

        def renamed(gradients):
            return nnunet_as_theirs(configuration, gradients)

        large = rng.standard_normal((batch, *initial_patch_size(size), 1), np.float32)
        augmented = large, rng.integers(-1, CLASSES, large.shape[:-1]).astype(np.int8)
        augment = make_augment(size, CLASSES - 1, keep_zeros=False)
        again = build_network(model, CLASSES, 0, plan=plan)
        further = {"jaxla augmented": Ours(again, *augmented, recipe, loss, renamed, augment)}
    else:
        require_size(model, "--size", options.size)
        network, batch, size = build_network(model, 1, 0), options.batch or 4, (options.size,) * 2
        images = rng.random((batch, *size, 1), np.float32)
        mask = (images[..., 0] > 0.7).astype(np.uint8)
        loss, recipe = cross_entropy, Training(learning_rate=RATE)
        taken = OfTheirs(
            reference_of(network), binary_cross_entropy, lambda parameters: torch.optim.Adam(parameters, RATE)
        )

        def renamed(gradients):
            return as_theirs(network, gradients)

    of_encoder = hasattr(network, "backbone")
    sides = {}
    for form in ("channels first", "channels last", *(["compiled"] if on_gpu else [])):
        sides[f"torch {form}"] = Theirs(taken, of_encoder, images, mask, form, "cuda" if on_gpu else "cpu")
    # it gives the network's arrays away
    sides = {"jaxla": Ours(network, images, mask, recipe, loss, renamed)} | further | sides
    reference = sides["torch channels first"].gradients()
    difference, difference_of_torch = (
        relative_l2(sides[name].gradients(), reference) for name in ("jaxla", "torch channels last")
    )
    if not difference <= max(AGREEMENT[dtype.name], min(difference_of_torch, LIMIT)):
        raise InputError(
            f"gradients differ by {difference:.1e}, relative L2, PyTorch's own by {difference_of_torch:.1e}; "
            "nothing is timed"
        )
    del reference

    seconds, grown = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(options.repeats + 1):  # the first of each warms up
        for name, side in sides.items():
            time.sleep(PAUSE)
            side()  # not timed: the caches are the other side's, and so is memory that it has just given back
            before = reset_peak()
            seconds[name].append(timed(side))
            grown[name].append(peak() - before if before else None)
    found = compared({name: times[1:] for name, times in seconds.items()})
    result = {
        **about("jax", "flax", "torch"),
        "method": options.method,
        "size": size,
        "batch": batch,
        "dtype": dtype.name,
        "repeats": options.repeats,
        "gradient_relative_l2": difference,
        "gradient_relative_l2_of_torch": difference_of_torch,
        **found,
        "fastest_torch_over_jaxla": min(found["torch_over_jaxla"].values()),
        "slices_per_second": {
            name: batch * (size[0] if len(size) == 3 else 1) / median
            for name, median in found["median_seconds"].items()
        },
        "grown_bytes": {name: max(values[1:]) if all(values[1:]) else None for name, values in grown.items()},
        "jaxla_program_bytes": sides["jaxla"].bytes,
    }
    print_result(result, options.output)


def relative_l2(gradients, reference):
    """The difference between gradients by name, over all parameters as one, by the reference's length."""
    difference = sum(np.square(np.float64(gradients[name]) - reference[name]).sum() for name in reference)
    return float(np.sqrt(difference / sum(np.square(np.float64(array)).sum() for array in reference.values())))


class Ours:
    """A step that can be taken again and again; gives the loss."""

    def __init__(self, network, images, mask, recipe, loss, renamed, augment=None):
        self.renamed = renamed
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
        return self.renamed(gradients)

    def __call__(self):
        return float(take_step(self.step, self.state, self.batch, self.key))


class OfTheirs(NamedTuple):
    """What PyTorch's side is made of."""

    module: torch.nn.Module
    loss: Callable  # (logits, mask) -> value
    optimiser: Callable  # of parameters
    largest_norm: float | None = None  # to which gradients are cut


def binary_cross_entropy(logits, mask):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), mask.float())


class Theirs:
    """The same of PyTorch's module."""

    def __init__(self, taken, of_encoder, images, mask, form, device):
        torch.set_num_threads(os.cpu_count())
        self.device = device
        last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        layout = torch.contiguous_format if form == "channels first" else last
        module = copy.deepcopy(taken.module).to(device, memory_format=layout).train()
        if of_encoder:  # ImageNet's three channels
            images = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
        images = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        self.images = images.to(device).contiguous(memory_format=layout)
        self.mask = torch.from_numpy(mask).to(device)
        self.module, self.loss_of, self.largest_norm = module, taken.loss, taken.largest_norm
        self.run = torch.compile(module) if form == "compiled" else module
        self.optimiser = taken.optimiser(module.parameters())

    def loss(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=compute_dtype() == jnp.bfloat16):
            logits = self.run(self.images)
        return self.loss_of(logits, self.mask)

    def gradients(self):
        self.loss().backward()
        found = {  # the coarsest logits of nnU-Net do not count
            name: np.zeros(value.shape) if value.grad is None else value.grad.float().cpu().numpy()
            for name, value in self.module.named_parameters()
        }
        self.optimiser.zero_grad()
        return found

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
