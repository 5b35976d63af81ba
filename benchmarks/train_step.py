"""python -m benchmarks.train_step [--method=…] [--size=…] [--batch=…] [--output=FILE]: time a training step.

Compares this package's training step with its PyTorch counterpart:

- For a convolutional network, with binary cross-entropy and Adam: the PyTorch module of the parity suite.
- For a DINOv2 method, a fine-tuned backbone with paper 1's decoder: the `transformers` model with scaled-dot-product
  attention, and the same decoder.
- For nnU-Net, with its loss at all resolutions and SGD, on patches of a plan: the PyTorch module of the parity suite.
  This package's step is also timed with augmentation.

Both run in turn in this process, from the same parameters on the same batch: in float32 with all cores on CPU, PyTorch
with channels first and with channels last; in bfloat16 on a GPU, PyTorch also through `torch.compile`. The gradients of
both are compared before timing: they may differ by `MAX_DIFFERENCE`, or by as much as PyTorch's two layouts differ from
each other (rounding flips ReLUs and the positions of maxima, and a deep network with random weights amplifies that),
but never by more than `MAX_TOLERANCE`. `tests/parity` compares them in float64, where they agree to 1e-13.

Prints JSON: seconds per step (median and fastest), slices per second, PyTorch's median divided by this package's for
each PyTorch variant (channels first, channels last, compiled; above 1: this package is faster) and for the fastest one,
the difference between the gradients, and on Linux the increase of the process's peak memory during a step. Before each
timed step, a pause lets the other implementation's threads go idle, and an untimed step warms the caches, as the
previous step does in training.
"""

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxla.experiments import METHODS

from benchmarks.timing import compare, environment, print_result, time_steps
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import Data, Experiment, InputError, Preprocessing, lookup
from jaxla.data.batches import ArraySource
from jaxla.hardware import compute_dtype, on_gpu
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.nnunet.augmentation import PatchAugmentation, initial_patch_size
from jaxla.nnunet.plan import read_plan
from jaxla.tasks.patches import PatchTask
from jaxla.tasks.slices import SliceTask
from jaxla.training.optimisers import MAX_GRADIENT_NORM, MOMENTUM, WEIGHT_DECAY
from tests.golden.live import live_model, live_state
from tests.parity.nnunet_reference import make_nnunet_reference, nnunet_to_torch
from tests.parity.references import make_reference, network_to_torch
from tests.parity.test_nnunet import their_loss
from tests.tiny import flat_state

CONVOLUTIONAL = ("unet", "attention_unet", "resnet50_unet", "resnet152_unet", "segnet", "nnunet_2d", "nnunet_3d")
TRANSFORMERS = ("vit_mini8", "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")
TIMED_METHODS = (*CONVOLUTIONAL, *TRANSFORMERS)
PLAN = Path(__file__).parents[1] / "tests" / "golden" / "nnunet_plans" / "Hippocampus.json"
CLASSES = 3  # for nnU-Net: background and the two structures of the hippocampus
LEARNING_RATE = 1e-4
MAX_DIFFERENCE = {"float32": 2e-2, "bfloat16": 0.2}  # relative L2 of the gradients
MAX_TOLERANCE = 0.3  # even if PyTorch's two layouts differ by more; for ResNet-152 on CPU they differ by 0.21


def main(arguments):
    parser = command_parser("benchmarks.train_step", "Time a training step with jaxla and with PyTorch.")
    add = parser.add_argument
    add("--method", type=str, default="unet", help=f"one of {', '.join(TIMED_METHODS)}")
    add("--size", type=int, default=320, help="side of the square image in pixels; nnU-Net ignores it")
    add("--batch", type=int | None, default=None, help="batch size (default: 4, or the plan's)")
    add("--plan", type=str, default=str(PLAN), help="nnU-Net plan (default: the plan of the Decathlon hippocampus)")
    add("--repeats", type=int, default=5, help="timed steps of each implementation")
    add("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    method = lookup("--method", options.method, {name: METHODS[name] for name in TIMED_METHODS})
    if min(4 if options.batch is None else options.batch, options.repeats) < 1:
        raise InputError("--batch and --repeats", "must be at least 1", "Choose larger numbers.")

    make_steps = make_slice_steps if method.preprocessing else make_patch_steps
    task, steps = make_steps(method, options)
    dtype = jnp.dtype(compute_dtype())
    difference, torch_difference = compare_gradients(steps, MAX_DIFFERENCE[dtype.name])
    seconds, memory_growth = time_steps(steps, options.repeats + 1)  # the first is not counted
    timing = compare({name: times[1:] for name, times in seconds.items()})
    size = task.input_shape(1)[:-1]
    batch = task.batch_size
    slices = batch * (size[0] if len(size) == 3 else 1)
    result = {
        **environment("jax", "flax", "torch"),
        "method": options.method,
        "size": size,
        "batch": batch,
        "dtype": dtype.name,
        "repeats": options.repeats,
        "gradient_relative_l2": difference,
        "torch_gradient_relative_l2": torch_difference,
        **timing,
        "fastest_torch_over_jaxla": min(timing["torch_over_jaxla"].values()),
        "slices_per_second": {name: slices / median for name, median in timing["median_seconds"].items()},
        "memory_growth_bytes": {
            name: max(values[1:]) if all(values[1:]) else None for name, values in memory_growth.items()
        },
        "jaxla_program_bytes": steps["jaxla"].bytes,
    }
    if on_gpu():
        result["torch_peak_bytes"] = torch.cuda.max_memory_allocated()
    print_result(result, options.output)


def make_slice_steps(method, options):
    """Return the task of a network that reads slices, and the steps of both implementations by name."""
    method.model.check_size("--size", options.size)
    recipe = replace(method.training, batch_size=options.batch or 4, learning_rate=LEARNING_RATE)
    model = method.model.with_weights("random")
    preprocessing = Preprocessing(options.size)
    if options.method in TRANSFORMERS:
        model = replace(model, backbone="finetuned")
    method = replace(method, model=model, preprocessing=preprocessing, training=recipe)
    task = SliceTask(Experiment(method.name, method.summary, Data(), method), outputs=1)
    network = task.build_network()
    images = np.random.default_rng(0).random((task.batch_size, *task.input_shape(1)), np.float32)
    mask = (images[..., 0] > 0.7).astype(np.uint8)
    torch_images = images
    if hasattr(network, "backbone"):  # PyTorch's encoder takes three ImageNet-normalised channels
        torch_images = (images - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_DEVIATION)
    if options.method in TRANSFORMERS:
        module = TorchSegmenter(network, (options.size, options.size))
        to_torch = partial(segmenter_to_torch, network, module.backbone)
    else:
        module, to_torch = make_reference(network), partial(network_to_torch, network)
    parts = TorchParts(module, binary_cross_entropy, partial(torch.optim.Adam, lr=LEARNING_RATE))
    # PyTorch's steps are built first, because our step donates the buffers of the network's parameters.
    torch_steps = make_torch_steps(parts, torch_images, mask)
    return task, {"jaxla": Step(task, network, images, mask, to_torch), **torch_steps}


def make_patch_steps(method, options):
    """Return nnU-Net's task without augmentation, and the steps of both implementations by name."""
    recipe = replace(method.training, batch_size=options.batch or 0, learning_rate=LEARNING_RATE, schedule="constant")
    plan = read_plan(Path(options.plan))

    def make_task(is_augmented):
        changed = replace(method, training=recipe, augmentation=PatchAugmentation(is_augmented))
        return PatchTask(Experiment(method.name, method.summary, Data(), changed), CLASSES, plan)

    task, augmented_task = make_task(False), make_task(True)
    network, configuration, size = task.build_network(), task.configuration, task.configuration.patch_size
    rng = np.random.default_rng(0)
    images = rng.standard_normal((task.batch_size, *size, 1), np.float32)
    mask = rng.integers(0, CLASSES, images.shape[:-1]).astype(np.int8)
    large_images = rng.standard_normal((task.batch_size, *initial_patch_size(size), 1), np.float32)
    large_mask = rng.integers(-1, CLASSES, large_images.shape[:-1]).astype(np.int8)
    parts = TorchParts(
        make_nnunet_reference(configuration, network),
        lambda logits, mask: their_loss([level.float() for level in logits], mask, configuration.batch_dice),
        partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True),
        MAX_GRADIENT_NORM,
    )
    torch_steps = make_torch_steps(parts, images, mask)
    to_torch = partial(nnunet_to_torch, configuration)
    return task, {
        "jaxla": Step(task, network, images, mask, to_torch),
        "jaxla augmented": Step(augmented_task, augmented_task.build_network(), large_images, large_mask, to_torch),
        **torch_steps,
    }


def make_torch_steps(parts, images, mask):
    variants = ("channels first", "channels last", *(["compiled"] if on_gpu() else []))
    return {f"torch {variant}": TorchStep(parts, images, mask, variant) for variant in variants}


def compare_gradients(steps, max_difference):
    """Return the relative L2 difference of our gradients from PyTorch's, and that between PyTorch's two layouts.

    Exits if ours exceeds the tolerance.
    """
    reference = steps["torch channels first"].gradients()
    difference, torch_difference = (
        relative_l2(steps[name].gradients(), reference) for name in ("jaxla", "torch channels last")
    )
    if not difference <= max(max_difference, min(torch_difference, MAX_TOLERANCE)):
        layouts = f"relative L2; PyTorch's two layouts differ by {torch_difference:.1e}"
        sys.exit(f"gradients differ from PyTorch's by {difference:.1e} ({layouts}); nothing was timed")
    return difference, torch_difference


def relative_l2(gradients, reference):
    """Return the relative L2 difference of two dicts of gradients, over all parameters together."""
    difference = sum(np.square(np.float64(gradients[name]) - reference[name]).sum() for name in reference)
    return float(np.sqrt(difference / sum(np.square(np.float64(array)).sum() for array in reference.values())))


class Step:
    """This package's training step; a call takes one step and returns the loss."""

    def __init__(self, task, network, images, mask, to_torch):
        self.trainer = task.make_trainer(network, ArraySource(images, mask))
        self.to_torch = to_torch
        self.batch = {"input": images, "mask": mask, "weight": np.ones(len(images), np.float32)}
        self.bytes = self.trainer.compile(self.batch)

    def gradients(self):
        return self.to_torch(self.trainer.gradients(self.batch)[1])

    def __call__(self):
        return float(self.trainer.step(self.batch, 0))


class TorchSegmenter(torch.nn.Module):
    """Paper 1's network in PyTorch, with our parameters: images [B, 3, H, W] -> logits [B, K, H, W]."""

    def __init__(self, network, size):
        super().__init__()
        self.backbone, self.decoder = live_model(network.backbone), make_reference(network.decoder, size)
        self.backbone.set_attn_implementation("sdpa")
        self.variant = network.backbone.variant

    def forward(self, images):
        side = images.shape[-1] // self.variant.patch
        tokens = self.backbone(images).last_hidden_state[:, 1 + self.variant.registers :]
        return self.decoder(tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2))


def segmenter_to_torch(network, model, gradients):
    """Return gradients of our network as arrays, by their names in `TorchSegmenter`."""
    gradients = nnx.to_pure_dict(gradients)
    backbone, decoder = (nnx.State(gradients[name]) for name in ("backbone", "decoder"))
    theirs = live_state(network.backbone.variant, flat_state(backbone), model)
    return {f"backbone.{name}": value.numpy() for name, value in theirs.items()} | {
        f"decoder.{name}": value for name, value in network_to_torch(network.decoder, decoder).items()
    }


class TorchParts(NamedTuple):
    """The parts of a PyTorch training step."""

    module: torch.nn.Module
    loss: Callable  # (logits, mask) -> value
    optimiser: Callable  # parameters -> optimiser
    max_gradient_norm: float | None = None  # gradients are clipped to this norm


def binary_cross_entropy(logits, mask):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0].float(), mask.float())


class TorchStep:
    """PyTorch's training step; a call takes one step and returns the loss."""

    def __init__(self, parts, images, mask, variant):
        torch.set_num_threads(os.cpu_count())
        self.device = device = "cuda" if on_gpu() else "cpu"
        channels_last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        layout = torch.contiguous_format if variant == "channels first" else channels_last
        module = copy.deepcopy(parts.module).to(device, memory_format=layout).train()
        images = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        self.images = images.to(device).contiguous(memory_format=layout)
        self.mask = torch.from_numpy(mask).to(device)
        self.module, self.parts = module, parts
        self.run = torch.compile(module) if variant == "compiled" else module
        self.optimiser = parts.optimiser(module.parameters())

    def loss(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=compute_dtype() == jnp.bfloat16):
            logits = self.run(self.images)
        return self.parts.loss(logits, self.mask)

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
        if self.parts.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.parts.max_gradient_norm)
        self.optimiser.step()
        return loss.item()


if __name__ == "__main__":
    run_command(main)
