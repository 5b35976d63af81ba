"""python -m benchmarks.compile_for_gpu [--method=…] [--output=FILE]: training steps as programs for an H200.

The GPU need not be there, nor its driver, only JAX's part for CUDA (`pip install -e '.[test,cuda12]'`): XLA compiles
for a device that it is told of. Nothing is run; and XLA cannot try kernels out, so that products of matrices are
cuBLAS's, not Triton's. What is wrong with a program before it runs shows itself.

Prints for each method, from random weights and with the recipe's batch: seconds to compile, the memory that the step's
program needs (parameters, optimiser and batch included), and in how many places it calls cuDNN's attention.
"""

import os
import time
from pathlib import Path

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks the driver
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"

import jax
import pytest
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from jaxla.experiments import METHODS
from jaxla.models.build import configuration_of, is_planned

from benchmarks.timing import about, require_folder, write_result
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, lookup
from jaxla.memory import program_bytes
from jaxla.nnunet.plan import read_plan
from tests.gpu import lowered_step, pretend_gpu

PLAN = Path(__file__).parents[1] / "tests" / "golden" / "nnunet_plans" / "Hippocampus.json"
SLICES = 40  # of a volume
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""


def main(arguments):
    parser = command_parser("benchmarks.compile_for_gpu", "Training steps compiled for an H200 that need not be there.")
    parser.add_argument("--method", type=str, default="all", help="one of train's methods, or all")
    parser.add_argument("--output", type=str, help="write the rows as JSON too")
    options = parse_arguments(parser, arguments)
    require_folder(options.output)
    # those that are cut short differ in their epochs alone
    methods = {name: method for name, method in METHODS.items() if not name.endswith("_short")}
    if options.method != "all":
        methods = {options.method: lookup("--method", options.method, METHODS)}
    device = absent_device()

    print("| method | batch | compiled in | memory of a step | calls of cuDNN's attention |\n|---|---|---|---|---|")
    rows = []
    for name, method in methods.items():
        row = {"method": name, **measure(method, device)}
        rows.append(row)
        of_program = f"{row['seconds']:.1f} s | {row['bytes'] / 1e9:.2f} GB | {row['cudnn_attention_calls']}"
        print(f"| `{name}` | {row['batch']} | {of_program} |", flush=True)
    if options.output:
        result = {**about("jax", "flax"), "compiled_for": device.device_kind, "rows": rows}
        write_result(result, options.output)


def absent_device():
    canonical = xla_bridge.canonicalize_platform
    try:
        jax.devices()  # finds JAX's part for CUDA, if it is there, and no GPU
        topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    except NotImplementedError:
        raise InputError("JAX's part for CUDA is not installed: pip install -e '.[test,cuda12]'") from None
    # JAX looks "gpu" up among the devices that are there
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform == "gpu" else canonical(platform)
    return topology.devices[0]


def measure(method, device):
    whole = NamedSharding(jax.sharding.Mesh([device], "x"), PartitionSpec())
    plan = read_plan(PLAN)
    batch = configuration_of(method.model, plan).batch_size if is_planned(method.model) else method.training.batch_size

    def place(shapes):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)

    with pytest.MonkeyPatch.context() as patch:
        pretend_gpu(patch)
        lowered = lowered_step(method, classes=1, plan=plan, batch_size=batch, slices=SLICES, place=place)
        began = time.perf_counter()
        program = lowered.compile()
    return {
        "batch": batch,
        "seconds": time.perf_counter() - began,
        "bytes": program_bytes(program),
        "cudnn_attention_calls": program.as_text().count('custom_call_target="__cudnn$fmha'),
    }


if __name__ == "__main__":
    run_command(main)
