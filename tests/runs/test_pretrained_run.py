"""End-to-end runs on pretrained backbones: fine-tuned, and frozen with a weights file that must not change."""

import shutil

import numpy as np
import pytest

import jaxla
from jaxla.models.weights import save_random
from tests.commands import refuse, succeed
from tests.golden.checkpoints import write_checkpoint
from tests.runs.folders import read_json, train

pytestmark = pytest.mark.usefixtures("fast_compilation")

ONE_EPOCH = ("--exp=fewshot_1patient", "--training.epochs=1", "--training.batch_size=8", "--model.decoder=linear")


def kernels(backbone):
    return np.asarray(backbone.blocks.mlp.expand.kernel[...])


def test_a_finetuned_backbone_starts_from_its_weights_and_is_trained(phantoms, tmp_path):
    pretrained, weights = jaxla.build_network("vit_mini8", seed=1).backbone, tmp_path / "mini.safetensors"
    save_random(weights, pretrained, "vit_mini8", seed=1)
    options = ("--method=vit_mini8", f"--model.weights={weights}", "--preprocessing.image_size=48")
    run, _ = train(tmp_path, phantoms, *ONE_EPOCH, *options)
    change = np.abs(kernels(jaxla.load_network(run).backbone) - kernels(pretrained)).max()
    steps = len(range(0, 24, 8))  # one patient has at most 24 slices
    assert 0 < change <= 1.01e-5 * steps  # Adam moves a parameter by about its learning rate, 1e-5, per step


def test_a_frozen_backbone_is_loaded_from_its_file_which_must_not_change(phantoms, tmp_path):
    """Paper 1's method: weights are converted, trained on, loaded again, and refused when damaged."""
    source, weights = tmp_path / "vits14.safetensors", tmp_path / "cache" / "weights" / "dinov2_vits14.safetensors"
    write_checkpoint(source, "dinov2_vits14")
    convert = ("--arch=dinov2_vits14", f"--output={weights}")
    succeed(tmp_path, "convert_weights.__main__", *convert, f"--source={source}")
    options = (*ONE_EPOCH, "--method=dinov2_vits14", "--preprocessing.image_size=56")
    run, _ = train(tmp_path, phantoms, *options)
    assert len(read_json(run / "split.json")["train"]) == 1
    assert read_json(run / "experiment.json")["weights"] == str(weights)
    assert np.array_equal(kernels(jaxla.load_network(run).backbone), kernels(jaxla.load_backbone(weights)))

    # Weights converted from a renamed copy of the checkpoint are accepted, because the numbers are the same.
    renamed, before = shutil.copy(source, tmp_path / "renamed.safetensors"), weights.read_bytes()
    succeed(tmp_path, "convert_weights.__main__", *convert, f"--source={renamed}", "--force")
    assert weights.read_bytes() != before
    jaxla.load_network(run)

    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    damaged = f"{weights}: damaged: the sha256 of its data is "
    with pytest.raises(jaxla.InputError, match=f"^{damaged}"):
        jaxla.load_network(run)
    folders = (f"--data.root={phantoms}", f"--run-dir={tmp_path / 'new'}", f"--cache-dir={tmp_path / 'cache'}")
    assert refuse(tmp_path, "jaxla.train", *folders, *options).startswith(f"error: {damaged}")

    weights.unlink()
    with pytest.raises(jaxla.InputError, match="the file of its frozen backbone is missing or has changed"):
        jaxla.load_network(run)
