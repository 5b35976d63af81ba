"""python -m benchmarks.train_step [--method=…] [--size=…] [--batch=…] [--output=FILE]: a step beside PyTorch's.

Forward pass, binary cross-entropy, backward pass and Adam, of a convolutional network and of the PyTorch module that
the parity suite compares it with. Both run in this process, in turn, from the same parameters on the same batch. On CPU
in float32 with all cores, PyTorch with channels first and with channels last; on a GPU in bfloat16, PyTorch also
through `torch.compile`. Before anything is timed the gradients of both are compared: they may differ by `AGREEMENT`,
or by as much as PyTorch's own two layouts do from each other (rounding flips ReLUs and the places of maxima, and a deep
network with random weights multiplies that), but never by more than `LIMIT`. `tests/parity` compares them in float64,
where they agree to 1e-13.

Prints JSON: seconds of a step (median and fastest), slices per second, PyTorch's median over this package's for each
form of PyTorch (above 1 this package is the faster one) and for the fastest of them, how far the gradients differ, and
on Linux by how much the process grew at most during a step. A pause before each step lets the threads of the other side
fall asleep.
"""

import os
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU, so that PyTorch finds memory too

import jax
import numpy as np
import torch

from benchmarks.timing import PAUSE, about, compared, print_result, timed
from jaxla.config import InputError, Training, lookup
from jaxla.devices.memory import program_bytes
from jaxla.experiments import METHODS
from jaxla.models.build import build_network, require_size
from jaxla.models.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.shell.command_line import command_parser, parse_arguments
from jaxla.shell.process import run_command
from jaxla.training.step import (
    compile_step,
    initial_state,
    make_gradient,
    make_optimiser,
    make_step,
    split_network,
    take_step,
)
from tests.parity.references import as_theirs, reference_of

RIVALS = {name: method for name, method in METHODS.items() if method.preprocessing.pad_to == "largest"}
RATE = 1e-4
AGREEMENT = {"cpu": 2e-2, "gpu": 0.2}  # relative L2 of the gradients
LIMIT = 0.3  # PyTorch's own two differ by 0.21 for ResNet-152, on CPU
MEMORY = Path("/proc/self")


def main(arguments):
    parser = command_parser("benchmarks.train_step", "A convolutional network's training step beside PyTorch's.")
    parser.add_argument("--method", type=str, default="unet", help=f"one of {', '.join(RIVALS)}")
    parser.add_argument("--size", type=int, default=320, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=4, help="slices in a step")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each, of which the median is taken")
    parser.add_argument("--output", type=str, help="write the JSON there too")
    options = parse_arguments(parser, arguments)
    model = lookup("method", options.method, RIVALS).model
    model = type(model)(**{**vars(model), "weights": "random"})
    require_size(model, "--size", options.size)
    if min(options.batch, options.repeats) < 1:
        raise InputError("--batch and --repeats must be at least 1")
    on_gpu = jax.default_backend() == "gpu"

    network = build_network(model, 1, 0)
    rng = np.random.default_rng(0)
    images = rng.random((options.batch, options.size, options.size, 1), np.float32)
    mask = (images[..., 0] > 0.7).astype(np.uint8)

    sides = {}
    for form in ("channels first", "channels last", *(["compiled"] if on_gpu else [])):
        sides[f"torch {form}"] = Theirs(network, images, mask, form, "cuda" if on_gpu else "cpu")
    sides = {"jaxla": Ours(network, images, mask)} | sides  # it gives the network's arrays away
    reference = sides["torch channels first"].gradients()
    difference, difference_of_torch = (
        relative_l2(sides[name].gradients(), reference) for name in ("jaxla", "torch channels last")
    )
    if not difference <= max(AGREEMENT["gpu" if on_gpu else "cpu"], min(difference_of_torch, LIMIT)):
        raise InputError(
            f"gradients differ by {difference:.1e}, relative L2, PyTorch's own by {difference_of_torch:.1e}; "
            "nothing is timed"
        )
    del reference

    seconds, grown = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(options.repeats + 1):  # the first of each warms up
        for name, side in sides.items():
            time.sleep(PAUSE)
            before = reset_peak()
            seconds[name].append(timed(side))
            grown[name].append(peak() - before if before else None)
    found = compared({name: times[1:] for name, times in seconds.items()})
    result = {
        **about("jax", "flax", "torch"),
        "method": options.method,
        "size": options.size,
        "batch": options.batch,
        "dtype": "bfloat16" if on_gpu else "float32",
        "repeats": options.repeats,
        "gradient_relative_l2": difference,
        "gradient_relative_l2_of_torch": difference_of_torch,
        **found,
        "fastest_torch_over_jaxla": min(found["torch_over_jaxla"].values()),
        "slices_per_second": {name: options.batch / median for name, median in found["median_seconds"].items()},
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

    def __init__(self, network, images, mask):
        self.network = network
        parts = split_network(network, train_backbone=True)
        optimiser = make_optimiser(Training(learning_rate=RATE), 1000, pretrained_backbone=False)
        self.gradient = make_gradient(parts.training)
        self.state = initial_state(parts, optimiser)
        self.batch = {"input": images, "mask": mask, "weight": np.ones(len(images), np.float32)}
        self.key = jax.random.key(0)
        self.step = compile_step(make_step(self.gradient, optimiser), self.state, self.batch, self.key)
        self.bytes = program_bytes(self.step)

    def gradients(self):
        _, gradients, _ = jax.jit(self.gradient)(self.state.trainable, self.state.frozen, self.batch, self.key)
        return as_theirs(self.network, gradients)

    def __call__(self):
        return float(take_step(self.step, self.state, self.batch, self.key))


class Theirs:
    """The same of PyTorch's module."""

    def __init__(self, network, images, mask, form, device):
        torch.set_num_threads(os.cpu_count())
        self.device = device
        layout = torch.contiguous_format if form == "channels first" else torch.channels_last
        module = reference_of(network).to(device, memory_format=layout).train()
        if hasattr(network, "backbone"):  # an ImageNet encoder's three channels
            images = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
        images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        self.images = images.to(device).contiguous(memory_format=layout)
        self.mask = torch.from_numpy(mask[:, None].astype(np.float32)).to(device)
        self.module = module
        self.run = torch.compile(module) if form == "compiled" else module
        self.optimiser = torch.optim.Adam(module.parameters(), RATE)

    def loss(self):
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.run(self.images)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), self.mask)

    def gradients(self):
        self.loss().backward()
        found = {name: value.grad.float().cpu().numpy() for name, value in self.module.named_parameters()}
        self.optimiser.zero_grad()
        return found

    def __call__(self):
        self.optimiser.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        return loss.item()


def reset_peak():
    """Forget the process's largest size so far; -> its size now, in bytes. 0 where the system keeps none."""
    try:
        (MEMORY / "clear_refs").write_text("5")
    except OSError:
        return 0
    return peak()


def peak():
    """The process's largest size since then, in bytes."""
    try:
        lines = (MEMORY / "status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    run_command(main)
