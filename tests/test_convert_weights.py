"""python -m convert_weights as a user runs it: what it writes, and what it refuses without a trace."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from convert_weights.__main__ import main
from jaxla.config import run_command
from tests.golden.fake_weights import fake_state_dict

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


def convert(*arguments, **environment):
    command = [sys.executable, "-m", "convert_weights", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def convert_here(*arguments):
    """The same without the seconds that a new process takes to import JAX and torch; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["convert_weights", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_command(main)
    return subprocess.CompletedProcess(arguments, left.value.code, out.getvalue(), err.getvalue())


def refused(folder, *words, run=convert_here, arch="dinov2_vits14", output="out.safetensors"):
    """Converting `source.pth` in `folder` must fail with one line of all `words` and leave the folder as it was."""
    before = sorted((path, path.stat().st_size) for path in folder.rglob("*"))
    result = run(f"--arch={arch}", f"--source={folder / 'source.pth'}", f"--output={folder / output}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not [word for word in words if word not in result.stderr], result.stderr
    assert sorted((path, path.stat().st_size) for path in folder.rglob("*")) == before


def shapes_of(arch):
    return {name: tuple(shape) for name, shape in json.loads((GOLDEN / f"{arch}.shapes.json").read_text()).items()}


def empty_state(arch="dinov2_vits14"):
    """Every parameter of a checkpoint, at the size of one number on disk."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes_of(arch).items()}


# --- what it writes ---


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    """-> the folder of a converted checkpoint, its state dict, and the finished command."""
    folder = tmp_path_factory.mktemp("conversion")
    state = fake_state_dict(shapes_of("dinov2_vits14"))
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, folder / "vits14.pth")
    output = folder / "made" / "vits14.safetensors"
    result = convert("--arch=dinov2_vits14", f"--source={folder / 'vits14.pth'}", f"--output={output}")
    assert result.returncode == 0, result.stderr
    return folder, state, result


def test_the_result_says_what_it_is_and_where_it_came_from(conversion):
    folder, _, _ = conversion
    with safe_open(folder / "made" / "vits14.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "jaxla-1",
        "arch": "dinov2_vits14",
        "source": "vits14.pth",
        "source_sha256": hashlib.sha256((folder / "vits14.pth").read_bytes()).hexdigest(),
        "licence": "Apache-2.0",
    }


def test_the_output_names_what_was_left_out_and_the_file_written(conversion):
    folder, _, result = conversion
    output = folder / "made" / "vits14.safetensors"
    assert "vits14.pth: mask_token is left out" in result.stdout
    assert f"{output}: dinov2_vits14 from vits14.pth" in result.stdout
    assert hashlib.sha256(output.read_bytes()).hexdigest() in result.stdout
    assert result.stderr == ""
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_every_number_but_the_mask_token_is_carried_over(conversion):
    folder, state, _ = conversion
    with safe_open(folder / "made" / "vits14.safetensors", framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}
    ours = np.sort(np.concatenate([array.ravel() for array in arrays.values()]))
    theirs = np.sort(np.concatenate([value.ravel() for name, value in state.items() if name != "mask_token"]))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(arrays["blocks.mlp.expand.kernel"][7], state["blocks.7.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(arrays["pos_grid"][2, 5], state["pos_embed"][0, 1 + 2 * 37 + 5])


def test_list_names_released_architectures_with_their_licence():
    result = convert("--arch=list")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert {line.split(":")[0] for line in lines} >= {"dinov2_vits14", "dinov2_vitb14"}
    assert not [line for line in lines if line.startswith("vit_mini8")]
    assert all("weights under Apache-2.0" in line for line in lines if line.startswith("dinov2"))


# --- what it refuses ---


def test_a_missing_key_is_named(tmp_path):
    state = empty_state()
    del state["blocks.3.mlp.fc1.bias"]
    torch.save(state, tmp_path / "source.pth")
    refused(
        tmp_path,
        f"{tmp_path}/source.pth",
        "dinov2_vits14",
        "lacks 1 of its param",
        "blocks.3.mlp.fc1.bias",
        run=convert,
    )


def test_an_extra_key_is_named(tmp_path):
    torch.save({**empty_state(), "head.weight": torch.zeros(3)}, tmp_path / "source.pth")
    refused(tmp_path, f"{tmp_path}/source.pth", "dinov2_vits14", "has 1 param", "that it lacks", "head.weight")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    torch.save({**empty_state(), "norm.weight": torch.zeros(383)}, tmp_path / "source.pth")
    refused(tmp_path, f"{tmp_path}/source.pth", "norm.weight", "(383,)", "(384,)")


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    torch.save(empty_state("dinov2_vitb14"), tmp_path / "source.pth")
    refused(tmp_path, f"{tmp_path}/source.pth", "not dinov2_vits14", "768", "384")


def test_a_checkpoint_with_something_around_the_state_dict_is_refused(tmp_path):
    torch.save({"model": empty_state(), "epoch": 3}, tmp_path / "source.pth")
    refused(tmp_path, f"{tmp_path}/source.pth", "not a state dict")


class Malicious:
    """Unpickled the careless way, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    trace = tmp_path / "trace"
    torch.save({**empty_state(), "extra": Malicious(trace)}, tmp_path / "source.pth")
    refused(tmp_path, f"{tmp_path}/source.pth", "would run code", "nothing was run", run=convert)
    assert not trace.exists()
    torch.load(tmp_path / "source.pth", weights_only=False)
    assert trace.exists()  # the checkpoint was a dangerous one


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, kept):
    source = tmp_path / "source.pth"
    torch.save({name: torch.zeros(math.prod(shape[:1])) for name, shape in shapes_of("dinov2_vits14").items()}, source)
    whole = source.read_bytes()
    source.write_bytes(whole[: int(kept * len(whole))])
    refused(tmp_path, f"{source}: ", "again")


def test_a_damaged_old_style_checkpoint_is_refused(tmp_path):
    source = tmp_path / "source.pth"
    torch.save({"norm.weight": torch.ones(384)}, source, _use_new_zipfile_serialization=False)
    source.write_bytes(source.read_bytes()[:-100])
    refused(tmp_path, f"{source}: ", "again")


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>404: Not found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 86\n",
        b"Not found\n",
        b"Gone\n",
        b"../weights/dinov2_vits14_pretrain.pth\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        bytes(64),
    ],
    ids=["html", "lfs", "text", "too short for an opcode", "path", "png", "zeros"],
)
def test_something_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "source.pth").write_bytes(content)
    refused(tmp_path, f"{tmp_path}/source.pth: ", "again")


def test_another_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "source.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path, f"{tmp_path}/source.pth: ", "again")


def test_a_missing_source_is_refused(tmp_path):
    refused(tmp_path, f"--source={tmp_path}/source.pth: no such file")


def test_an_output_that_exists_is_kept(tmp_path):
    torch.save(empty_state(), tmp_path / "source.pth")
    (tmp_path / "out.safetensors").write_text("precious")
    refused(tmp_path, f"{tmp_path}/out.safetensors: exists already", "--output")
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    torch.save(empty_state(), tmp_path / "source.pth")
    (tmp_path / "file").write_text("")
    refused(tmp_path, f"--output={tmp_path}/file: cannot be written", output="file/out.safetensors")


def test_an_output_of_another_kind_is_refused(tmp_path):
    refused(tmp_path, f"--output={tmp_path}/out.npz", ".safetensors", output="out.npz")


def test_a_missing_source_is_named(tmp_path):
    result = convert_here("--arch=dinov2_vits14", f"--output={tmp_path / 'out.safetensors'}")
    assert (result.returncode, result.stderr) == (2, "error: option --source is required to convert\n")


def test_an_unknown_architecture_names_the_nearest(tmp_path):
    refused(tmp_path, "--arch 'dinov2_vits15' is unknown", "did you mean dinov2_vits14?", arch="dinov2_vits15")


def test_without_torch_the_way_to_install_it_is_named(tmp_path):
    torch.save(empty_state(), tmp_path / "source.pth")
    (tmp_path / "blocked" / "torch").mkdir(parents=True)
    (tmp_path / "blocked" / "torch" / "__init__.py").write_text("raise ModuleNotFoundError('No module named torch')")
    environment = {"PYTHONPATH": str(tmp_path / "blocked"), "PYTHONDONTWRITEBYTECODE": "1"}
    refused(tmp_path, "needs torch", "pip install 'jaxla[convert]'", run=partial(convert, **environment))


# --- who imports what ---


def test_no_module_of_the_package_imports_torch():
    program = (
        "import importlib, pkgutil, sys, jaxla, jaxla.experiments\n"
        "for p in (jaxla, jaxla.experiments):\n"
        "    for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "        importlib.import_module(m.name)\n"
        "print([m for m in sys.modules if m.startswith('jaxla.')])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert all(f"jaxla.{name}'" in result.stdout for name in ("train", "training.loop", "models.dinov2", "experiments"))


@pytest.mark.parametrize("arguments", [["--help"], ["--exp=quickstart", "--help"], ["--exp=list"]])
def test_help_does_not_wait_for_jax(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "jaxla.train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert "quickstart" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "jaxla.config" in imported
    assert not imported & {"jax", "flax", "torch", "orbax", "grain"}
