"""python -m benchmarks.backbone [--arch=…] [--size=…] [--batch=…]: a backbone's forward pass beside PyTorch's.

Both run in this process, in turn, in float32 on CPU with all its cores; printed as JSON with the ratio of the medians.
PyTorch runs `transformers`' Dinov2 with scaled-dot-product attention. Weights are random on both sides: speed does not
depend on them, and tests/parity compares the values.
"""

import importlib.metadata
import json
import statistics
import sys
import time

import jax
import numpy as np
import torch
from flax import nnx
from transformers import Dinov2Config, Dinov2Model

from jaxla.config import command_parser, lookup, parse_arguments, run_command
from jaxla.models.backbones import VARIANTS
from jaxla.models.vision_transformer import VisionTransformer


def main(arguments):
    parser = command_parser("benchmarks.backbone", "A backbone's forward pass beside PyTorch's, on CPU.")
    parser.add_argument("--arch", type=str, default="dinov2_vitb14")
    parser.add_argument("--size", type=int, default=448, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parse_arguments(parser, arguments)
    variant = lookup("--arch", options.arch, VARIANTS)

    images = np.random.default_rng(0).standard_normal((options.batch, options.size, options.size, 3), np.float32)
    ours = VisionTransformer(variant, rngs=nnx.Rngs(0))
    config = Dinov2Config(
        hidden_size=variant.width,
        num_hidden_layers=variant.depth,
        num_attention_heads=variant.heads,
        patch_size=variant.patch,
        image_size=variant.grid * variant.patch,
        attn_implementation="sdpa",
    )
    theirs = Dinov2Model(config).eval()
    channels_first = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def run_ours():
        jax.block_until_ready(ours(images))

    def run_theirs():
        with torch.inference_mode():
            theirs(channels_first)

    seconds = {"jaxla": [], "torch": []}
    runs = {"jaxla": run_ours, "torch": run_theirs}
    first_call = {name: timed(run) for name, run in runs.items()}
    for _ in range(options.repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "arch": options.arch,
        "size": options.size,
        "batch": options.batch,
        "device": f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")},
        "first_call_seconds": first_call,
        "median_seconds": medians,
        "ratio_torch_over_jaxla": medians["torch"] / medians["jaxla"],
    }
    json.dump(result, sys.stdout, indent=1)
    print()


def timed(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_command(main)
