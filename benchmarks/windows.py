"""python -m benchmarks.windows: memory and time of a training step on volumes, for several numbers of windows.

All windows have the same size, so volumes grow with the number of windows. Computes the gradient of one loss on the
volume (Dice and cross-entropy) with respect to the decoder's parameters, from given features, in float32 on CPU and in
bfloat16 on a GPU. This package and PyTorch compute it from the same parameters in two modes: in two passes over the
windows ("two passes"), and for all windows at once ("one graph"). The four gradients are compared before timing.

Prints JSON. `bytes` is the temporary memory of the compiled program, without arguments (parameters, features, masks)
and results (gradients): the decoder's activations, the assembled logits, the loss and its derivative.
`memory_growth_bytes` is the increase of the process's peak memory during a step. It is omitted for PyTorch, which keeps
freed memory for reuse.
"""

import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxla.experiments import METHODS
from torch.nn import functional

from benchmarks.timing import environment, median_and_fastest, print_result, time_steps
from benchmarks.train_step import relative_l2
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, lookup
from jaxla.hardware import compute_dtype, on_gpu
from jaxla.models.backbones import TRANSFORMERS
from jaxla.models.networks.base import build_network
from jaxla.models.networks.windows import LEVELS, FeatureWindows, WindowOptions
from jaxla.training.losses import SMOOTH, dice_cross_entropy, per_volume
from jaxla.training.step import make_gradient, split_network
from jaxla.training.two_pass import make_two_pass_gradient
from tests.parity.references import make_reference, network_to_torch

WINDOW_METHODS = {name: method for name, method in METHODS.items() if isinstance(method.model, WindowOptions)}
MODES = {"two passes": make_two_pass_gradient, "one graph": make_gradient}
LOSS = per_volume(partial(dice_cross_entropy, batch_dice=True))
# Relative L2 from PyTorch's gradients, with room for rounding that moves activations across a ReLU's zero.
MAX_DIFFERENCE = {"float32": 1e-2, "bfloat16": 0.2}
KEY = jax.random.key(0)


def main(arguments):
    parser = command_parser("benchmarks.windows", "Measure memory and time of a step for several numbers of windows.")
    add = parser.add_argument
    add("--method", type=str, default="windows_dinov3_vits16", help=f"one of {', '.join(WINDOW_METHODS)}")
    add("--size", type=int, default=224, help="side of the square slices in pixels")
    add("--slices", type=int, default=8, help="slices per window")
    add("--windows", type=tuple[int, ...], default=(1, 2, 4, 8), help="numbers of windows along the slice axis")
    add("--batch", type=int, default=1, help="volumes per step")
    add("--repeats", type=int, default=3, help="timed steps of each implementation")
    add("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    model = lookup("--method", options.method, WINDOW_METHODS).model
    if min(options.slices, options.repeats, options.size, options.batch, *options.windows) < 1:
        where = "--slices, --size, --windows, --batch and --repeats"
        raise InputError(where, "must be at least 1", "Choose larger numbers.")
    torch.set_num_threads(os.cpu_count())
    variant = TRANSFORMERS[model.arch]
    model.check_size("--size", options.size)
    side = options.size // variant.patch
    decoder = build_network(model.with_weights("random"), 1, 0).decoder
    rows = [measure(decoder, (LEVELS, side, side, variant.width), count, options) for count in options.windows]
    result = {
        **environment("jax", "flax", "torch"),
        "method": options.method,
        "size": options.size,
        "slices_per_window": options.slices,
        "batch": options.batch,
        "repeats": options.repeats,
        "windows": rows,
        "bytes_last_over_first": {mode: rows[-1]["bytes"][mode] / rows[0]["bytes"][mode] for mode in MODES},
    }
    print_result(result, options.output)


def measure(decoder, slice_shape, count, options):
    """Return the results for volumes with `count` windows, given the shape of a slice's features."""
    rng = np.random.default_rng(0)
    size = options.size
    volumes = options.batch
    depth = count * options.slices
    features = rng.standard_normal((volumes, depth, *slice_shape), np.float32)
    mask = (rng.random((volumes, depth, size, size)) > 0.7).astype(np.uint8)
    batch = {"input": features, "mask": mask, "weight": np.ones((volumes, depth), np.float32)}
    batch = jax.tree.map(jnp.asarray, batch)
    network = FeatureWindows(decoder, (size, size), (count, 1, 1))
    parts = split_network(network, train_backbone=False)
    programs = {
        mode: jax.jit(make(parts.training, None, LOSS)).lower(parts.trainable, parts.frozen, batch, KEY).compile()
        for mode, make in MODES.items()
    }
    theirs = {f"torch {mode}": TorchGradient(decoder, features, mask, count, mode) for mode in MODES}
    ours = {mode: partial(run_program, program, parts, batch) for mode, program in programs.items()}
    runs = ours | theirs

    gradients = {mode: network_to_torch(decoder, decoder_gradients(run())) for mode, run in ours.items()}
    gradients |= {mode: run() for mode, run in theirs.items()}
    reference = gradients["torch one graph"]
    for mode, gradient in gradients.items():
        error = relative_l2(gradient, reference)
        if not error <= MAX_DIFFERENCE[jnp.dtype(compute_dtype()).name]:
            sys.exit(f"{count} windows: gradients of {mode} differ from PyTorch's by {error:.1e}; nothing was timed")
    difference = relative_l2(gradients["two passes"], gradients["one graph"])

    seconds, memory_growth = time_steps(runs, options.repeats)
    timing = median_and_fastest(seconds)
    medians = timing["median_seconds"]
    return {
        "windows": count,
        "slices": depth,
        "two_passes_gradient_relative_l2": difference,
        "bytes": {mode: program.memory_analysis().temp_size_in_bytes for mode, program in programs.items()},
        "memory_growth_bytes": {mode: max(memory_growth[mode]) for mode in MODES},
        **timing,
        "torch_over_jaxla": {mode: medians[f"torch {mode}"] / medians[mode] for mode in MODES},
    }


def run_program(program, parts, batch):
    return jax.block_until_ready(program(parts.trainable, parts.frozen, batch, KEY))


def decoder_gradients(result):
    """Return the decoder's gradients from the result of a gradient function."""
    return nnx.State(nnx.to_pure_dict(result[1])["decoder"])


class TorchGradient:
    """The same gradient in PyTorch; a call returns the arrays by parameter name."""

    def __init__(self, decoder, features, mask, count, mode):
        self.device = "cuda" if on_gpu() else "cpu"
        self.decoder = make_reference(decoder).train().to(self.device)
        windows = np.split(np.ascontiguousarray(features.transpose(0, 2, 5, 1, 3, 4)), count, axis=3)
        self.features = [torch.from_numpy(part.copy()).to(self.device) for part in windows]
        self.mask = torch.from_numpy(mask > 0).float().unsqueeze(1).to(self.device)
        depth = mask.shape[1] // count
        self.windows = [range(i * depth, (i + 1) * depth) for i in range(count)]
        self.mode = mode

    def __call__(self):
        self.decoder.zero_grad(set_to_none=True)
        (self.two_passes if self.mode == "two passes" else self.one_graph)()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {name: value.grad.cpu().numpy() for name, value in self.decoder.named_parameters()}

    def one_graph(self):
        self.loss(torch.cat([self.decode(i) for i in range(len(self.windows))], dim=2)).backward()

    def two_passes(self):
        with torch.no_grad():
            logits = torch.cat([self.decode(i) for i in range(len(self.windows))], dim=2)
        logits.requires_grad_()
        self.loss(logits).backward()
        for i, window in enumerate(self.windows):
            self.decode(i).backward(logits.grad[:, :, window.start : window.stop])

    def decode(self, i):
        with torch.autocast(self.device, torch.bfloat16, enabled=compute_dtype() == jnp.bfloat16):
            return self.decoder(self.features[i], self.mask.shape[2], self.windows[i]).float()

    def loss(self, logits):
        logits = functional.interpolate(logits, size=self.mask.shape[2:], mode="trilinear")
        probability = logits.sigmoid()
        intersection, total = (x.sum((1, 2, 3, 4)) for x in (probability * self.mask, probability + self.mask))
        dice = (2 * intersection + SMOOTH) / (total + SMOOTH)
        return functional.binary_cross_entropy_with_logits(logits, self.mask) - dice.mean()


if __name__ == "__main__":
    run_command(main)
