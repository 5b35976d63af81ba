"""python -m benchmarks.scaling [--arch=…] [--size=…] [--batch=…]: memory and communication of fine-tuning, by devices.

For one training step of a fine-tuned backbone with paper 1's decoder, on 1, 2, 4 and 8 devices that share a batch, with
whole and with divided parameters: bytes that a device holds from step to step (parameters, Adam's two moments),
computed from the table `jaxla.distributed.SHARDED` and read from the compiled program's own memory analysis, and the
bytes it needs besides; and the bytes that a device sends in a step, computed from the same table. Nothing is run and no
memory taken: programs are compiled for shapes alone, for simulated CPU devices, in float32. Prints JSON.

A device that takes part in a ring of N sends (N - 1) / N of an array to gather it, as much to reduce and scatter it,
and twice that to reduce it everywhere. What is sent is the least that the table allows: a compiler may reduce gradients
everywhere that need only be scattered.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxla.models.build import build_network

from benchmarks.timing import print_result
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import Model, Training
from jaxla.distributed import BATCH, MODEL, shardings, use_devices
from jaxla.models.backbones import transformer_name
from jaxla.models.build import build_network
from jaxla.training.step import make_gradient, make_optimiser, make_step, split_network


def main(arguments):
    parser = command_parser("benchmarks.scaling", "Memory and communication of fine-tuning, by the number of devices.")
    parser.add_argument("--arch", type=str, default="dinov2_vitb14", help="of a vision transformer")
    parser.add_argument("--size", type=int, default=448, help="side of the square image in pixels")
    parser.add_argument("--batch", type=int, default=32, help="slices in a step, over all devices")
    options = parse_arguments(parser, arguments)
    model = Model(arch=transformer_name("--arch", options.arch), weights="random", backbone="finetuned")
    rows = [
        {"devices": devices, "shard_params": shard, **of_step(model, options, devices, shard)}
        for devices in (1, 2, 4, 8)
        for shard in ((False, True) if devices > 1 else (False,))
    ]
    print_result({"arch": model.arch, "size": options.size, "batch": options.batch, "steps": rows})


def of_step(model, options, devices, shard_params):
    with use_devices(devices, shard_params) as mesh:
        parts = split_network(nnx.eval_shape(lambda: build_network(model, 1, 0)), train_backbone=True)
        optimiser = make_optimiser(Training(), 1, pretrained_backbone=False)
        moments = jax.eval_shape(optimiser.init, parts.trainable)

        def placed(tree):
            return jax.tree.map(
                lambda leaf, divided: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, divided.spec)
                ),
                tree,
                shardings(tree),
            )

        trainable, frozen, state = placed(parts.trainable), placed(parts.frozen), placed(moments)
        batch, side = options.batch, options.size
        shapes = {
            "input": ((batch, side, side, 1), np.float32),
            "mask": ((batch, side, side), np.uint8),
            "weight": ((batch,), np.float32),
        }
        rows = NamedSharding(mesh, BATCH)
        inputs = {name: jax.ShapeDtypeStruct(*of, sharding=rows) for name, of in shapes.items()}
        step = make_step(make_gradient(parts.training), optimiser)
        memory = step.lower(trainable, frozen, state, inputs, jax.random.key(0)).compile().memory_analysis()

        leaves = jax.tree.leaves(trainable)
        divided = sum(4 * leaf.size for leaf in leaves if shard_params and MODEL in leaf.sharding.spec)
        whole = sum(4 * leaf.size for leaf in leaves) - divided
        ring = (devices - 1) / devices
        return {
            "held_bytes_by_table": 3 * (whole + divided // devices),
            "held_bytes_by_program": memory.argument_size_in_bytes,
            "other_bytes_by_program": memory.temp_size_in_bytes,
            # gathered forward, again backward, where blocks are computed once more, and their gradients scattered
            "sent_bytes": round(ring * (2 * whole + 3 * divided)),
        }


if __name__ == "__main__":
    run_command(main)
