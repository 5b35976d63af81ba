"""python -m benchmarks.device [--size=…] [--megabytes=…] [--output=FILE]: peak compute and memory throughput.

Prints JSON: the machine and its packages; the TFLOP/s of square matrix products of random numbers, in JAX (bfloat16,
float32 at default precision, which is TensorFloat-32 on NVIDIA GPUs, and float32 at `highest` precision) and in PyTorch
(bfloat16); and the memory bandwidth of a pass over a large array, counting bytes read and written. All are medians.
"""

import os
import platform
import statistics

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch

import jax
import jax.numpy as jnp
import torch

from benchmarks.timing import environment, print_result, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError
from jaxla.hardware import attention_variant, compute_dtype, device_bytes, first_local_device, on_gpu
from jaxla.runs.machine import PACKAGES, processor

CALLS = 10  # per timed repetition, so that the cost of starting a program is negligible


def main(arguments):
    parser = command_parser(
        "benchmarks.device", "Measure the speed of matrix products and the memory bandwidth of this device."
    )
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--megabytes", type=int, default=4096, help="size of the array that is read and written")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of ten calls")
    parser.add_argument("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    if min(options.size, options.megabytes, options.repeats) < 1:
        raise InputError("--size, --megabytes and --repeats", "must be at least 1", "Choose larger numbers.")

    device = first_local_device()
    operations = 2 * options.size**3
    products = {
        "jax bfloat16": jax_product(jnp.bfloat16, "default", options.size),
        "jax float32": jax_product(jnp.float32, "default", options.size),
        "jax float32 highest": jax_product(jnp.float32, "highest", options.size),
        "torch bfloat16": torch_product(options.size),
    }
    seconds = {name: seconds_per_call(run, options.repeats) for name, run in products.items()}
    elements = 10**6 * options.megabytes // 4
    pass_seconds = seconds_per_call(array_pass(elements), options.repeats)
    result = {
        **environment(*PACKAGES, "torch", "transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "backend": device.client.platform_version,
        "device_bytes": device_bytes(),
        "compute_dtype": jnp.dtype(compute_dtype()).name,
        "attention": attention_variant(compute_dtype()),
        "matrix_size": options.size,
        "tflops": {name: operations / value / 1e12 for name, value in seconds.items()},
        "array_bytes": 4 * elements,
        "bytes_per_second": 2 * 4 * elements / pass_seconds,
    }
    print_result(result, options.output)


def seconds_per_call(run, repeats):
    """Return the median seconds per program call; `run(count)` calls the program `count` times and waits."""
    run(1)  # compiles
    return statistics.median(timed(lambda: run(CALLS)) for _ in range(repeats)) / CALLS


def jax_product(dtype, precision, size):
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return lambda count: jax.block_until_ready([multiply(a, b) for _ in range(count)][-1])


def torch_product(size):
    device = "cuda" if on_gpu() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run(count):
        for _ in range(count):
            torch.matmul(a, b)
        if on_gpu():
            torch.cuda.synchronize()

    return run


def array_pass(elements):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run(count):
        x = jnp.zeros(elements, jnp.float32)
        for _ in range(count):
            x = add_one(x)
        jax.block_until_ready(x)

    return run


if __name__ == "__main__":
    run_command(main)
