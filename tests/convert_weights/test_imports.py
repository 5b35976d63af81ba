"""Importing the package and showing help do not import slow packages that they do not need."""

import subprocess
import sys

import pytest

from tests.convert_weights.command import ROOT


def test_no_module_of_the_package_imports_torch():
    program = (
        "import importlib, os, pkgutil, sys, jaxla, jaxla.experiments\n"
        "for p in (jaxla, jaxla.experiments):\n"
        "    for m in pkgutil.walk_packages([os.path.dirname(p.__file__)], p.__name__ + '.'):\n"
        "        importlib.import_module(m.name)\n"
        "print([m for m in sys.modules if m.startswith('jaxla.')])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert all(
        f"jaxla.{name}'" in result.stdout
        for name in ("train", "training.loop", "models.backbones.dinov2", "experiments")
    )


@pytest.mark.parametrize(
    ("module", "word"),
    [
        ("jaxla.info", "RUN|WEIGHTS"),
        ("jaxla.evaluate", "--references"),
        ("jaxla.verify", "--data.root"),
        ("convert_weights", "--to-torch"),
    ],
)
def test_help_of_quick_commands_does_not_import_jax(module, word):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0
    assert word in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "jaxla.config" in imported
    assert not imported & {"jax", "flax", "torch", "orbax", "grain"}


def test_help_of_training_does_not_import_torch():
    program = "import sys, jaxla.train; jaxla.train.main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "quickstart" in result.stdout
