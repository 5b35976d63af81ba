"""python -m benchmarks.correctness [--methods=…] [--size=…] [--output=FILE]: check this device's results.

Compares

- the gradients of one training step of each method with those that JAX computes on this machine's CPU, in a separate
  process, from the same parameters on the same batch: in float32 at `highest` precision, and in this device's preferred
  dtype. Methods with windows use their two-pass gradient.
- attention in this device's variant, and its gradients, with XLA's attention in float32, for even and odd numbers of
  tokens.
- nnU-Net's logits with the golden files in tests/golden, which nnU-Net's own code computed.

Prints JSON: each relative L2 difference and its bound. Exits with 1 if a difference exceeds its bound. The bounds for
gradients allow for rounding that moves activations across a ReLU's zero (see benchmarks.train_step).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxla.experiments import METHODS

from benchmarks.timing import environment, print_result, write_result
from benchmarks.train_step import MAX_DIFFERENCE, relative_l2
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import lookup
from jaxla.data.batches import ArraySource
from jaxla.hardware import attention_variant, compute_dtype
from jaxla.models.networks import base
from jaxla.models.ops.attention import attention
from jaxla.nnunet.network import NNUNet
from jaxla.nnunet.plan import read_plan
from tests.convert_weights.test_nnunet import GOLDEN, PLANS, nnunet_state
from tests.golden.errors import deviation
from tests.gpu import task_without_data
from tests.parity.nnunet_reference import fill_nnunet
from tests.tiny import TINY_PLAN, flat_state

METHOD_NAMES = ["vit_mini8", "dinov2_vits14", "windows_dinov3_vits16", "unet", "nnunet_3d"]
BATCH, SLICES, OUTPUTS = 2, 8, 3
ATTENTION_SHAPES = [(4, 1024, 12, 64), (4, 1025, 12, 64), (2, 197, 6, 64)]  # [B, N, heads, D]
MAX_ATTENTION_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative L2
MAX_LOGIT_DIFFERENCE = {"float32": 1e-5, "bfloat16": 5e-2}  # relative L2


def main(arguments):
    parser = command_parser(
        "benchmarks.correctness", "Compare this device's results with the CPU's and nnU-Net's results."
    )
    parser.add_argument("--methods", type=list[str], default=METHOD_NAMES, help="methods whose gradients are compared")
    parser.add_argument("--size", type=int, default=112, help="side of the square image in pixels")
    parser.add_argument("--reference", type=str, help="only write this device's float32 gradients to this folder")
    parser.add_argument("--output", type=str, help="also write the JSON to this file")
    options = parse_arguments(parser, arguments)
    methods = {name: lookup("--methods", name, METHODS) for name in options.methods}
    if options.reference:
        for name, method in methods.items():
            np.savez(Path(options.reference, name), **step_gradients(method, options.size, jnp.float32))
        return

    result = {
        **environment("jax", "flax"),
        "attention": attention_variant(compute_dtype()),
        "size": options.size,
        "checks": {},
    }
    for name, value, bound in run_checks(methods, options):
        result["checks"][name] = {"relative_l2": float(value), "bound": bound}
        if options.output:  # at once, in case a later check does not finish
            write_result(result, options.output)
    print_result(result)
    if exceeded := [name for name, row in result["checks"].items() if not row["relative_l2"] <= row["bound"]]:
        sys.exit(f"bounds exceeded: {'; '.join(exceeded)}")


def run_checks(methods, options):
    """Yield name, relative L2 difference and bound of each check."""
    for name in ("2d", "3d_fullres"):
        yield f"nnU-Net {name} logits", *nnunet_logits(name)
    for shape in ATTENTION_SHAPES:
        yield f"attention of {shape}", *attention_check(shape)
    dtypes = dict.fromkeys([jnp.dtype(jnp.float32), jnp.dtype(compute_dtype())])
    with tempfile.TemporaryDirectory() as folder:
        write_reference(options, folder)
        for name, method in methods.items():
            reference = dict(np.load(Path(folder, f"{name}.npz")))
            for dtype in dtypes:
                difference = relative_l2(step_gradients(method, options.size, dtype), reference)
                yield f"gradient of {name}, {dtype.name}", difference, MAX_DIFFERENCE[dtype.name]


def write_reference(options, folder):
    """Compute the gradients in a process on the CPU and write them to the folder."""
    words = [f"--methods={json.dumps(options.methods)}", f"--size={options.size}", f"--reference={folder}"]
    command = [sys.executable, "-m", "benchmarks.correctness", *words]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def step_gradients(method, size, dtype):
    """Return the gradient arrays of a method's first step on random images; float32 uses `highest` precision."""
    preprocessing = method.preprocessing and replace(method.preprocessing, image_size=size)
    recipe = replace(method.training, batch_size=BATCH)
    task = task_without_data(replace(method, preprocessing=preprocessing, training=recipe), OUTPUTS, TINY_PLAN)
    images = np.random.default_rng(0).random((BATCH, *task.input_shape(SLICES)), np.float32)
    mask = (images[..., 0] * OUTPUTS).astype(np.uint8)
    weight = np.ones((BATCH, *task.weight_shape(SLICES)), np.float32)
    precision = "highest" if dtype == jnp.float32 else "default"
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision(precision):
        patch.setattr(base, "compute_dtype", lambda: dtype)
        trainer = task.make_trainer(task.build_network(), ArraySource(images, mask))
        return flat_state(trainer.gradients({"input": images, "mask": mask, "weight": weight})[1])


def attention_check(shape):
    """Return the largest relative L2 difference of output and gradients from XLA's float32 attention, and its bound."""
    dtype = jnp.dtype(compute_dtype())
    inputs = [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i in range(4)]

    def run(attend, q, k, v, cotangent):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(cotangent)

    ours = jax.jit(partial(run, attention))(*(x.astype(dtype) for x in inputs))
    exact = partial(jax.nn.dot_product_attention, implementation="xla")
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(partial(run, exact))(*inputs)
    differences = (deviation(a, np.asarray(b)).relative_l2 for a, b in zip(ours, expected, strict=True))
    return max(differences), MAX_ATTENTION_DIFFERENCE[dtype.name]


def nnunet_logits(name):
    """Return the relative L2 difference of the finest logits from nnU-Net's, in this device's dtype, and its bound."""
    dtype = jnp.dtype(compute_dtype())
    configuration = read_plan(PLANS).configuration(name)
    network = nnx.eval_shape(lambda: NNUNet(configuration, OUTPUTS, dtype=dtype, rngs=nnx.Rngs(0)))
    fill_nnunet(network, configuration, {key: value.numpy() for key, value in nnunet_state(name).items()})
    network.eval()
    golden = np.load(GOLDEN / f"nnunet_hippocampus_{name}.npz")
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        logits = nnx.jit(lambda network, image: network(image))(network, golden["image"][None, ..., None])
    return deviation(logits[0], np.moveaxis(golden["logits0"], 0, -1)).relative_l2, MAX_LOGIT_DIFFERENCE[dtype.name]


if __name__ == "__main__":
    run_command(main)
