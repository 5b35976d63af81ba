"""python -m benchmarks.scaling [--arch=…] [--size=…] [--batch=…]: memory and communication by device count.

Compiles one training step of a fine-tuned backbone with paper 1's decoder for 1, 2, 4 and 8 simulated CPU devices that
share a batch, in float32, with replicated and with sharded parameters. Runs nothing and allocates no arrays. Prints
JSON, in bytes per device:

- `state_bytes`: the state (parameters and Adam's two moments), computed from `jaxla.mesh.SHARDED`
- `argument_bytes`: the arguments of the compiled program, mostly the state, as reported by XLA
- `temporary_bytes`: the temporary memory of the compiled program, mostly activations, as reported by XLA
- `sent_bytes`: the bytes that a device sends per step

In a ring of N devices, each sends (N - 1) / N of an array's bytes for an all-gather, as many for a reduce-scatter, and
twice as many for an all-reduce. `sent_bytes` is the minimum for this sharding: a compiler may use an all-reduce for
gradients where a reduce-scatter is sufficient.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks.timing import print_result
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import Training
from jaxla.mesh import BATCH, MODEL, shardings, use_devices
from jaxla.models.networks.base import build_network
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.training.optimisers import make_optimiser, make_rates
from jaxla.training.step import make_gradient, make_step, split_network


def main(arguments):
    parser = command_parser(
        "benchmarks.scaling", "Compute the memory and communication of fine-tuning by number of devices."
    )
    parser.add_argument("--arch", type=str, default="dinov2_vitb14", help="a vision transformer")
    parser.add_argument("--size", type=int, default=448, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=32, help="slices per step, over all devices")
    options = parse_arguments(parser, arguments)
    model = TransformerSegmenterOptions(options.arch, weights="random", backbone="finetuned").resolve()
    rows = [
        {"devices": devices, "shard_params": shard, **measure_step(model, options, devices, shard)}
        for devices in (1, 2, 4, 8)
        for shard in ((False, True) if devices > 1 else (False,))
    ]
    print_result({"arch": model.arch, "size": options.size, "batch": options.batch, "steps": rows})


def measure_step(model, options, devices, shard_params):
    """Return the bytes per device of one compiled training step."""
    with use_devices(devices, shard_params) as mesh:
        parts = split_network(nnx.eval_shape(lambda: build_network(model, 1, 0)), train_backbone=True)
        recipe = Training()
        optimiser = make_optimiser(recipe, has_pretrained_backbone=False)
        moments = jax.eval_shape(optimiser.init, parts.trainable)

        def add_sharding(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, sharding.spec))

        def shard(tree):
            return jax.tree.map(add_sharding, tree, shardings(tree))

        trainable, frozen, state = map(shard, (parts.trainable, parts.frozen, moments))
        images = (options.batch, options.size, options.size)
        batch_sharding = NamedSharding(mesh, BATCH)
        arrays = {"input": ((*images, 1), np.float32), "mask": (images, np.uint8), "weight": (images[:1], np.float32)}
        inputs = {name: jax.ShapeDtypeStruct(*array, sharding=batch_sharding) for name, array in arrays.items()}
        step = make_step(make_gradient(parts.training), optimiser)
        key, rates = jax.random.key(0), make_rates(recipe, 1)(0)
        memory = step.lower(trainable, frozen, state, inputs, key, rates).compile().memory_analysis()

        leaves = jax.tree.leaves(trainable)
        sharded = sum(4 * leaf.size for leaf in leaves if shard_params and MODEL in leaf.sharding.spec)
        replicated = sum(4 * leaf.size for leaf in leaves) - sharded
        ring = (devices - 1) / devices
        return {
            "state_bytes": 3 * (replicated + sharded // devices),
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            # The forward and the backward pass gather sharded parameters; their gradients are reduce-scattered.
            "sent_bytes": round(ring * (2 * replicated + 3 * sharded)),
        }


if __name__ == "__main__":
    run_command(main)
