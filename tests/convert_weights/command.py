"""The command as a user runs it, and checkpoints to give it."""

import json

import numpy as np
import torch
from flax import nnx
from safetensors import safe_open

from jaxla.models.backbones import build_backbone
from jaxla.models.weights import parameter_shapes
from jaxla.models.weights_format import save_weights
from tests import commands
from tests.commands import ROOT, in_a_new_process, in_this_process
from tests.golden.fake_weights import fake_state_dict

GOLDEN = ROOT / "tests" / "golden"


def convert(*arguments, **environment):
    """In a process of its own."""
    return in_a_new_process(ROOT, "convert_weights", *arguments, **environment)


def convert_here(*arguments):
    """The same without the seconds that a new process takes to import JAX and torch."""
    return in_this_process(ROOT, "convert_weights.__main__", *arguments)


def succeed(*arguments):
    """-> what the command printed."""
    done = convert_here(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refuse(folder, *arguments, run=convert_here):
    """The command must fail with one line and leave the folder as it was. -> the line"""
    line = commands.refuse(folder, None, *arguments, run=lambda _, __, *options: run(*options), but=None)
    return line.removeprefix("error: ")


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
