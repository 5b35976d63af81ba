"""Run `convert_weights`, and make checkpoints for it."""

import json

import numpy as np
import torch
from flax import nnx
from safetensors import safe_open

from jaxla.models.backbones import build_backbone
from jaxla.models.weights import parameter_shapes
from jaxla.models.weights_format import save_weights
from tests import commands
from tests.commands import ROOT, run_in_new_process, run_in_this_process
from tests.golden.fake_weights import fake_state_dict

GOLDEN = ROOT / "tests" / "golden"


def convert_in_new_process(*arguments, **environment):
    return run_in_new_process(ROOT, "convert_weights", *arguments, **environment)


def convert(*arguments):
    """Run the command in this process, which saves importing JAX and torch."""
    return run_in_this_process(ROOT, "convert_weights.__main__", *arguments)


def succeed(*arguments):
    """Run the command, which must succeed, and return its output."""
    done = convert(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refuse(folder, *arguments):
    """Run the command, which must refuse its input and leave the folder unchanged; return its one-line error."""
    line = commands.refuse(folder, None, *arguments, run=lambda _, __, *options: convert(*options), ignored=None)
    return line.removeprefix("error: ")


def refuse_source(source, arch="dinov2_vits14"):
    """Convert `source`, which must be refused, to a file in its own folder; return the one-line error."""
    output = source.parent / "out.safetensors"
    return refuse(source.parent, f"--arch={arch}", f"--source={source}", f"--output={output}")


def authors_shapes(arch):
    """Return the name and shape of every tensor of the authors' checkpoint, in their order."""
    return {name: tuple(shape) for name, shape in json.loads((GOLDEN / f"{arch}.shapes.json").read_text()).items()}


def full_state(arch):
    """Return a state dict in which no two tensors are equal."""
    return {name: torch.tensor(value) for name, value in fake_state_dict(authors_shapes(arch)).items()}


def empty_state(arch="dinov2_vits14"):
    """Return a state dict of zeros; on disk each tensor takes the space of one number."""
    dtypes = {name: torch.int64 for name in authors_shapes(arch) if name.endswith("num_batches_tracked")}
    return {name: torch.zeros((), dtype=dtypes.get(name)).expand(shape) for name, shape in authors_shapes(arch).items()}


def write_converted(path, arch="vit_mini8", scale=0.02):
    """Write a converted file with random values, by default of a small architecture without released weights."""
    shapes = parameter_shapes(nnx.eval_shape(lambda: build_backbone(arch, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    arrays = {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_weights(path, arrays, {"arch": arch, "source": "", "source_sha256": "", "licence": ""})
    return path


def read_weights(path):
    """Return the arrays by name, and the metadata."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  (not a dict)


def assert_same_state(state, expected):
    """Compare names, order, dtypes, shapes and every bit."""
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape), name
        assert state[name].is_contiguous(), name
        assert to_bytes(state[name]) == to_bytes(tensor), name


def to_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def save(folder, state):
    """Save a state dict as `source.pth`; return the path."""
    torch.save(state, folder / "source.pth")
    return folder / "source.pth"
