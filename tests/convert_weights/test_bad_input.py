"""A refused conversion prints one line, exits with 2, and writes nothing."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import snapshot
from tests.convert_weights.command import (
    ROOT,
    empty_state,
    refuse,
    refuse_source,
    save,
    succeed,
)
from tests.training.faults import limit_file_size, report_free_bytes

# --- options ---


def test_missing_source_is_refused(tmp_path):
    source = tmp_path / "source.pth"
    output = tmp_path / "out.safetensors"
    output.write_text("precious")  # a second mistake, which is not reported first
    for given in (source, "https://host/source.pth", "facebook/dinov2-small"):
        line = refuse(tmp_path, "--arch=dinov2_vits14", f"--source={given}", f"--output={output}")
        assert line == (f"--source={given}: no such file. Download the checkpoint and pass its file or folder.")


def test_too_long_file_names_are_refused(tmp_path):
    long = tmp_path / f"{300 * 'a'}.safetensors"
    source = save(tmp_path, {"norm.weight": torch.zeros(3)})
    assert "no such file" in refuse(
        tmp_path, "--arch=resnet50", f"--source={long}", f"--output={tmp_path / 'o.safetensors'}"
    )
    for output in (long, long / "o.safetensors"):
        line = refuse(tmp_path, "--arch=resnet50", f"--source={source}", f"--output={output}")
        assert line == f"--output={output}: cannot be written (File name too long). Choose another --output."
    assert "no such weights file" in refuse(tmp_path, "--verify", f"--output={long}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--source: required to convert a checkpoint. Pass --source=FILE or --download; see --help."),
        (
            ["--arch=dinov2_vits14"],
            "--source: required to convert a checkpoint. Pass --source=FILE or --download; see --help.",
        ),
        (["--source=x.pth"], "--arch: required to convert a checkpoint. --arch=list shows the names."),
        (
            ["--source=x.safetensors", "--verify"],
            "--arch: required to convert a checkpoint. --arch=list shows the names. "
            "To verify a converted file, pass it as --output.",
        ),
        (
            ["--arch=dinov2_vits14", "--source=x.pth", "--download"],
            "--download: cannot be combined with --source. Pass only one of the two options.",
        ),
        (
            ["--verify", "--output=x.safetensors", "--force"],
            "--force: applies only to a conversion. Remove the option.",
        ),
    ],
)
def test_missing_and_incompatible_options_are_named(tmp_path, arguments, line):
    assert refuse(tmp_path, *arguments) == line


@pytest.mark.parametrize(
    ("given", "nearest"), [("dinov2_vits15", "dinov2_vits14"), ("dinov3_vits17plus", "dinov3_vits_plus16")]
)
def test_error_for_an_unknown_architecture_names_the_nearest(tmp_path, given, nearest):
    line = refuse_source(save(tmp_path, empty_state()), given)
    assert line.startswith("--arch")
    assert f"(did you mean {nearest}?)" in line


def test_existing_output_is_kept(tmp_path):
    source, output = save(tmp_path, empty_state()), tmp_path / "out.safetensors"
    output.write_text("precious")
    line = refuse_source(source)
    assert line == f"--output={output}: already exists. Choose another --output, or add --force to replace it."


def test_existing_output_is_kept_if_a_forced_conversion_fails(tmp_path):
    source, output = (
        save(tmp_path, empty_state() | {"norm.bias": torch.full((384,), math.nan)}),
        tmp_path / "o.safetensors",
    )
    output.write_text("precious")
    arguments = ("--arch=dinov2_vits14", f"--source={source}", f"--output={output}", "--force")
    assert "norm.bias contains NaN or infinite values" in refuse(tmp_path, *arguments)
    assert output.read_text() == "precious"


def test_source_is_never_overwritten(tmp_path):
    source, link = tmp_path / "source.safetensors", tmp_path / "link.safetensors"
    save_file({"norm.weight": torch.zeros(3)}, source)
    link.symlink_to(source)
    for given, output in [(source, source), (link, source), (source, link)]:
        line = refuse(tmp_path, "--arch=resnet50", f"--source={given}", f"--output={output}", "--force")
        assert line == f"--output={output}: is the source itself. Choose another --output."

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": source.name}}))
    line = refuse(tmp_path, "--arch=resnet50", f"--source={index}", f"--output={source}", "--force")
    assert line == f"--output={source}: is the source itself. Choose another --output."


def test_output_that_cannot_be_written_is_refused(tmp_path):
    source = save(tmp_path, empty_state())
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for output, problem in {
        "file/out.safetensors": "writable folder",
        "folder.safetensors": "is a folder",
        "out.npz": "does not end in .safetensors",
    }.items():
        arguments = ("--arch=dinov2_vits14", f"--source={source}", f"--output={tmp_path / output}", "--force")
        line = refuse(tmp_path, *arguments)
        assert line.startswith("--output=")
        assert problem in line


@pytest.mark.parametrize(
    ("torch_code", "problem"),
    [
        (
            "raise ModuleNotFoundError(name='torch')",
            "needs torch, which is not installed. Run `pip install 'torch>=2.10'`.",
        ),
        (
            "__version__ = '2.9.1'",
            "needs torch, but 2.9.1 is too old to read files safely. Run `pip install 'torch>=2.10'`.",
        ),
        (
            "raise ImportError('libc10.so: no such file')",
            "needs torch, which is installed but cannot be imported (libc10.so: no such file). "
            "Run `pip install 'torch>=2.10' --force-reinstall`.",
        ),
    ],
    ids=["not installed", "too old", "broken"],
)
def test_error_without_a_usable_torch_names_the_command_that_installs_it(tmp_path, monkeypatch, torch_code, problem):
    source = save(tmp_path, empty_state())
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text(torch_code)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert refuse_source(source) == f"{source}: {problem}"


# --- writing that fails ---


@pytest.mark.parametrize("size", [100, 30_000_000], ids=["in the header", "in the data"])
def test_full_disk_leaves_nothing_behind(tmp_path, size):
    source = save(tmp_path, empty_state())
    with limit_file_size(size):
        line = refuse_source(source)
    assert line.startswith(f"{tmp_path / 'out.safetensors'}: cannot be written (File too large)")
    assert line.endswith("Fix this, or choose another file.")


def test_full_disk_in_a_conversion_to_torch_leaves_nothing_behind(tmp_path):
    source, ours, back = save(tmp_path, empty_state()), tmp_path / "ours.safetensors", tmp_path / "back.pth"
    succeed("--arch=dinov2_vits14", f"--source={source}", f"--output={ours}")
    with limit_file_size(30_000_000):
        line = refuse(tmp_path, "--to-torch", f"--source={ours}", f"--output={back}")
    assert line.startswith(f"{back}: cannot be written (")


def test_too_little_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    source = save(tmp_path, empty_state())
    report_free_bytes(monkeypatch, 10_000_000)
    line = refuse_source(source)
    output = tmp_path / "out.safetensors"
    assert line == (f"{output}: needs 0.09 GB, but only 0.01 GB are free. Free some space, or choose another folder.")


def test_terminated_conversion_leaves_nothing_behind(tmp_path):
    source = save(tmp_path, empty_state("dinov2_vitl14"))
    before = snapshot(tmp_path, ignored=None)
    arguments = ["--arch=dinov2_vitl14", f"--source={source}", f"--output={tmp_path / 'out.safetensors'}"]
    process = subprocess.Popen([sys.executable, "-m", "convert_weights", *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not any(
        path.name.endswith("out.safetensors") and path.stat().st_size > 1_000_000 for path in tmp_path.iterdir()
    ):
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, b"interrupted\n")
    assert snapshot(tmp_path, ignored=None) == before
