"""The command as a user runs it, and checkpoints to give it."""

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open

from convert_weights.__main__ import main
from jaxla.models.backbones import build_backbone
from jaxla.models.weights import parameter_shapes
from jaxla.models.weights_format import save_weights
from jaxla.shell.process import run_command
from tests.golden.fake_weights import fake_state_dict

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def convert(*arguments, **environment):
    """In a process of its own."""
    command = [sys.executable, "-m", "convert_weights", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def convert_here(*arguments):
    """The same without the seconds that a new process takes to import JAX and torch; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    log = logging.StreamHandler(out)  # the command's own is not set up where pytest has set up its own
    logging.getLogger("jaxla").addHandler(log)
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["convert_weights", *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                run_command(main)
    finally:
        logging.getLogger("jaxla").removeHandler(log)
    return subprocess.CompletedProcess(arguments, left.value.code, out.getvalue(), err.getvalue())


def succeed(*arguments):
    """-> what the command printed."""
    done = convert_here(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def files_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse(folder, *arguments, run=convert_here):
    """The command must fail with one line and leave the folder as it was. -> the line"""
    before = files_in(folder)
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert files_in(folder) == before
    return done.stderr.removeprefix("error: ").rstrip("\n")


def refuse_source(source, arch="dinov2_vits14", run=convert_here):
    """The same for the conversion of one file into the folder where it lies."""
    output = source.parent / "out.safetensors"
    return refuse(source.parent, f"--arch={arch}", f"--source={source}", f"--output={output}", run=run)


def shapes_of(arch):
    """Name and shape of every tensor of the authors' checkpoint, in their order."""
    return {name: tuple(shape) for name, shape in json.loads((GOLDEN / f"{arch}.shapes.json").read_text()).items()}


def full_state(arch):
    """A checkpoint in which no two tensors are alike."""
    return {name: torch.tensor(value) for name, value in fake_state_dict(shapes_of(arch)).items()}


def empty_state(arch="dinov2_vits14"):
    """A checkpoint of zeros, each tensor of the size of one number on disk."""
    dtypes = {name: torch.int64 for name in shapes_of(arch) if name.endswith("num_batches_tracked")}
    return {name: torch.zeros((), dtype=dtypes.get(name)).expand(shape) for name, shape in shapes_of(arch).items()}


def write_ours(path, arch="vit_mini8", scale=0.02):
    """A converted file, by default of a small architecture that nobody released; its numbers are drawn."""
    shapes = parameter_shapes(nnx.eval_shape(lambda: build_backbone(arch, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    arrays = {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_weights(path, arrays, {"arch": arch, "source": "", "source_sha256": "", "licence": ""})
    return path


def read_weights(path):
    """-> arrays by name, and the metadata."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  (not a dict)


def assert_same_state(state, expected):
    """Names, order, dtypes, shapes and every bit."""
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape), name
        assert state[name].is_contiguous(), name
        assert bits(state[name]) == bits(tensor), name


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
