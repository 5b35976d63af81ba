"""python -m benchmarks.compile_for_gpu [--method=…] [--device=…] [--output=FILE]: compile steps without a GPU.

Compiles training steps for a GPU that this machine does not have, to find the errors that XLA reports at compile time.
Needs no driver, only JAX's CUDA plugin (`pip install -e '.[test,cuda12]'`): XLA compiles for the description of a
device, an H200 (Hopper) or an A100 (Ampere), and nothing runs. XLA cannot autotune without a device, so matrix products
use cuBLAS instead of Triton.

Prints for each method, with random weights and the recipe's batch size: seconds to compile, the memory that a step
needs (parameters, optimiser state and batch included), and the number of cuDNN attention calls in the program.
"""

import os
import time
from pathlib import Path
from typing import Literal

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the version check needs the driver
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"

import jax
import pytest
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from jaxla.experiments import METHODS

from benchmarks.timing import environment, require_folder, write_result
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, lookup
from jaxla.hardware import on_gpu
from jaxla.memory import program_bytes
from jaxla.nnunet.plan import read_plan
from tests.gpu import AMPERE, HOPPER, lowered_step, pretend_gpu, task_without_data

PLAN = Path(__file__).parents[1] / "tests" / "golden" / "nnunet_plans" / "Hippocampus.json"
SLICES = 40  # per volume
DEVICES = {"h200": HOPPER, "a100": AMPERE}  # device -> compute capability; <device>.txtpb describes it to XLA


def main(arguments):
    parser = command_parser(
        "benchmarks.compile_for_gpu", "Compile training steps for a GPU that this machine does not have."
    )
    parser.add_argument("--method", type=str, default="all", help="a method of jaxla.train, or `all`")
    parser.add_argument("--device", type=Literal["h200", "a100"], default="h200", help="compile for this device")
    parser.add_argument("--output", type=str, help="also write the rows to this file as JSON")
    options = parse_arguments(parser, arguments)
    require_folder(options.output)
    # the `_short` methods are excluded: they differ from the full ones only in epochs and steps
    methods = {name: method for name, method in METHODS.items() if not name.endswith("_short")}
    if options.method != "all":
        methods = {options.method: lookup("--method", options.method, METHODS)}
    device = target_device(options.device)

    print("| method | batch size | compilation | memory of a step | cuDNN attention calls |\n|---|---|---|---|---|")
    rows = []
    for name, method in methods.items():
        row = {"method": name, **measure(method, device, DEVICES[options.device])}
        rows.append(row)
        program = f"{row['seconds']:.1f} s | {row['bytes'] / 1e9:.2f} GB | {row['cudnn_attention_calls']}"
        print(f"| `{name}` | {row['batch']} | {program} |", flush=True)
    if options.output:
        result = {**environment("jax", "flax"), "compiled_for": device.device_kind, "rows": rows}
        write_result(result, options.output)


def target_device(name):
    """Return the device with this name in DEVICES, for compilation only.

    Changes JAX's platform lookup for the rest of the process.
    """
    canonical = xla_bridge.canonicalize_platform
    try:
        on_gpu()  # loads the CUDA plugin, if it is installed
        config = Path(__file__).with_name(f"{name}.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    except NotImplementedError:
        fix = "Run `pip install -e '.[test,cuda12]'`."
        raise InputError("JAX's CUDA plugin", "not installed", fix) from None
    # otherwise, JAX looks for "gpu" among the devices of this machine
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform == "gpu" else canonical(platform)
    return topology.devices[0]


def measure(method, device, capability):
    """Return a method's batch size, and the compilation time, memory and attention calls of its step for the device."""
    sharding = NamedSharding(jax.sharding.Mesh([device], "x"), PartitionSpec())
    task = task_without_data(method, outputs=1, plan=read_plan(PLAN))

    def put_on_device(shapes):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)

    with pytest.MonkeyPatch.context() as patch:
        pretend_gpu(patch, capability)
        lowered = lowered_step(task, slices=SLICES, put_on_device=put_on_device)
        began = time.perf_counter()
        program = lowered.compile()
    return {
        "batch": task.batch_size,
        "seconds": time.perf_counter() - began,
        "bytes": program_bytes(program),
        "cudnn_attention_calls": program.as_text().count('custom_call_target="__cudnn$fmha'),
    }


if __name__ == "__main__":
    run_command(main)
