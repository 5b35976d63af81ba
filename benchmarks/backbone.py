"""python -m benchmarks.backbone [--arch=…] [--size=…] [--batch=…] [--output=FILE]: time inference against PyTorch.

Runs this package and the `transformers` model (scaled-dot-product attention) in turn, in this process, on the same
device with the same synthetic weights: in float32 with all cores on CPU; in bfloat16 on a GPU (float32 before NVIDIA's
Ampere), where PyTorch also runs through `torch.compile`. The patch tokens of both are compared before timing.

Prints JSON: seconds per call (median and fastest), images per second, PyTorch's median divided by this package's
(above 1: this package is faster), the TFLOP/s of the matrix products, and the memory of this package's compiled
program, including parameters; on a GPU also the peak memory of both. A pause before each call lets the other
implementation's threads go idle.
"""

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.timing import compare, environment, print_result, time_in_turn, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, lookup
from jaxla.hardware import compute_dtype, on_gpu, peak_device_bytes
from jaxla.memory import program_bytes
from jaxla.models.backbones import TRANSFORMERS, build_backbone
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.ops.multiply_adds import multiply_adds
from tests.golden.errors import deviation
from tests.golden.live import live_model
from tests.tiny import randomise

MAX_TOKEN_DIFFERENCE = {"float32": 1e-5, "bfloat16": 5e-2}  # relative L2 of the patch tokens


def main(arguments):
    parser = command_parser("benchmarks.backbone", "Time a backbone's forward pass with jaxla and with PyTorch.")
    parser.add_argument("--arch", type=str, default="dinov2_vitb14", help="name of a vision transformer")
    parser.add_argument("--size", type=int, default=448, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls per implementation")
    parser.add_argument("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    arch = HUB_SPELLINGS.get(options.arch, options.arch)
    size, patch = options.size, lookup("--arch", arch, TRANSFORMERS).patch
    if size % patch or size < 1:
        raise InputError(f"--size={size}", f"not a multiple of the patch size {patch}", "Choose another size.")
    if min(options.batch, options.repeats) < 1:
        raise InputError("--batch and --repeats", "must be at least 1", "Choose larger numbers.")
    print_result(environment("jax", "flax", "torch", "transformers") | measure(arch, options), options.output)


def measure(arch, options):
    """Return sizes, times and memory; exit if the two implementations compute different tokens."""
    size, variant, gpu = options.size, TRANSFORMERS[arch], on_gpu()
    images = np.random.default_rng(0).standard_normal((options.batch, size, size, 3), np.float32)
    dtype = jnp.dtype(compute_dtype())
    ours = randomise(nnx.eval_shape(lambda: build_backbone(arch, dtype=dtype, rngs=nnx.Rngs(0))))
    theirs = live_model(ours)
    theirs.set_attn_implementation("sdpa")
    if gpu:
        theirs = theirs.to("cuda", getattr(torch, dtype.name))
    channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(theirs.device, theirs.dtype)
    device_images = jnp.asarray(images)

    def run_ours():
        return jax.block_until_ready(ours(device_images))

    def make_torch_run(model):
        def run():
            with torch.inference_mode():
                tokens = model(channels_first).last_hidden_state
            if gpu:
                torch.cuda.synchronize()
            return tokens

        return run

    runs = {"jaxla": run_ours, "torch": make_torch_run(theirs)}
    if gpu:
        runs["torch.compile"] = make_torch_run(torch.compile(theirs))
    first_call = {name: timed(run) for name, run in runs.items()}
    patches = runs["torch"]()[:, 1 + variant.registers :].float().cpu().numpy()
    difference = deviation(run_ours().patches.reshape(patches.shape), patches).relative_l2
    if difference > MAX_TOKEN_DIFFERENCE[dtype.name]:
        sys.exit(f"{arch}: patch tokens differ from PyTorch's by {difference:.1e}; nothing was timed")

    timing = compare(time_in_turn(runs, options.repeats))
    medians = timing["median_seconds"].items()
    graph, state = nnx.split(ours)

    def forward(state, images):
        return nnx.merge(graph, state)(images)

    program = jax.jit(forward).lower(state, device_images).compile()
    operations = 2 * multiply_adds(forward, state, device_images)
    result = {
        "arch": arch,
        "size": size,
        "batch": options.batch,
        "torch_threads": torch.get_num_threads(),
        "dtype": dtype.name,
        "patch_tokens_relative_l2": difference,
        "repeats": options.repeats,
        "first_call_seconds": first_call,
        **timing,
        "images_per_second": {name: options.batch / median for name, median in medians},
        "tflops": {name: operations / median / 1e12 for name, median in medians},
        "jaxla_program_bytes": program_bytes(program),
    }
    if gpu:
        result["torch_peak_bytes"] = torch.cuda.max_memory_allocated()
        result["jaxla_peak_bytes"] = peak_device_bytes()
    return result


if __name__ == "__main__":
    run_command(main)
