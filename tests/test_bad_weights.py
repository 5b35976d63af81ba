"""Training and conversion refuse bad weights with one line that names the file, and never execute a pickle."""

import pickle
import re
from functools import partial

import numpy as np
import pytest
from flax import nnx

from jaxla.models.backbones import build_backbone
from jaxla.models.weights import parameter_shapes
from jaxla.models.weights_format import save_weights
from tests.commands import refuse, refuse_to_train, run_in_new_process
from tests.data.nifti import truncate, write_flat_pairs


@pytest.fixture(scope="module")
def parameters():
    """The parameters of a vit_mini8 backbone by name, all zero."""
    network = nnx.eval_shape(lambda: build_backbone("vit_mini8", rngs=nnx.Rngs(0)))
    return {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(network).items()}


def write_weights(path, parameters, arch="vit_mini8"):
    save_weights(path, parameters, {"arch": arch, "source": "a test", "licence": ""})
    return path


def drop_parameter(parameters, name):
    return {key: value for key, value in parameters.items() if key != name}


class CreatesFile:
    """Its pickle creates the file `executed` when it is loaded."""

    def __reduce__(self):
        return (open, ("executed", "w"))


BAD_WEIGHTS = {  # examples; tests/models/test_weights.py has every kind
    "another architecture": (lambda p, w: write_weights(p, w, "dinov2_vits14"), "dinov2_vits14, not vit_mini8"),
    "truncated": (lambda p, w: truncate(write_weights(p, w)), "truncated"),
    "a pickle": (lambda p, w: p.write_bytes(pickle.dumps(CreatesFile())), "not written by convert_weights"),
    "a parameter missing": (
        lambda p, w: write_weights(p, drop_parameter(w, "cls_token")),
        "lacks 1 parameter .*cls_token",
    ),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_training_refuses_weights_that_do_not_fit(tmp_path, parameters, kind):
    write_flat_pairs(tmp_path / "data", 5)
    path = tmp_path / "backbone.safetensors"
    make, message = BAD_WEIGHTS[kind]
    make(path, parameters)
    assert re.search(f"^error: {path}: .*{message}", refuse_to_train(tmp_path, f"--model.weights={path}"))


@pytest.mark.parametrize("is_named", [False, True], ids=["default file", "named file"])
def test_missing_weights_are_reported_with_the_command_that_creates_them(tmp_path, is_named):
    write_flat_pairs(tmp_path / "data", 5)
    path = tmp_path / ("mine.safetensors" if is_named else "cache/weights/dinov2_vitb14.safetensors")
    line = refuse_to_train(tmp_path, "--exp=paper1", *([f"--model.weights={path}"] if is_named else []))
    assert line.startswith(f"error: {path}: weights of dinov2_vitb14 not found. ")
    assert "python -m convert_weights --arch=dinov2_vitb14 --download --output=" in line
    assert "--model.weights=random" in line


def test_conversion_never_executes_a_pickle(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(CreatesFile()))
    options = ("--arch=dinov2_vits14", "--source=evil.pth", "--output=new.safetensors")
    run = partial(run_in_new_process, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "evil.pth" in refuse(tmp_path, "convert_weights", *options, run=run)
