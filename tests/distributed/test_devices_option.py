"""--devices and --shard-params through the commands, on simulated devices."""

import json

import nibabel as nib
import numpy as np
import pytest

from tests.commands import run_module


@pytest.fixture
def four_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")


def train(run, phantoms, *options, check=True):
    return run_module(
        "jaxla.train", "--exp=quickstart", f"--data.root={phantoms}", f"--run-dir={run}",
        f"--cache-dir={run.parent / 'cache'}", "--preprocessing.image_size=48", "--training.epochs=3", "--seed=1",
        *options, check=check,
    )  # fmt: skip


def test_a_run_on_four_devices_gives_the_run_on_one(four_devices, small_run, phantoms, tmp_path):
    """`small_run` saw one device; here parameters are divided over four. Then masks of one and of three."""
    run = tmp_path / "run"
    train(run, phantoms, "--shard-params")
    ours, theirs = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, small_run)
    )
    for kind in ("train_loss", "val_loss", "val_dice"):
        # Rounding moves an activation over a ReLU's zero, and training makes more of it: one device whose parameters
        # begin with another last digit is as far away. tests/devices/test_mesh.py has the exact comparison.
        # measured: 1e-2
        np.testing.assert_allclose([m[kind] for m in ours], [m[kind] for m in theirs], rtol=3e-2)
    assert json.loads((run / "experiment.json").read_text())["environment"]["devices"] == 4

    scan = next(phantoms.rglob("enhanced.nii.gz"))
    masks = [tmp_path / f"{count}.nii.gz" for count in (1, 3)]
    for count, mask in zip((1, 3), masks, strict=True):
        run_module("jaxla.predict", f"--run={run}", f"--input={scan}", f"--output={mask}", f"--devices={count}")
    one, three = (np.asarray(nib.load(mask).dataobj) for mask in masks)
    assert one.any()
    assert (one != three).mean() <= 1e-5  # measured: 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--devices=5"], "option --devices=5: JAX sees 4 (cpu); give a number from 0 (all) to 4"),
        (
            ["--training.batch_size=2"],
            "option --training.batch_size=2: smaller than the number of devices, 4, that share a batch; raise it, or "
            "give --devices=2",
        ),
        (
            ["--devices=3", "--shard-params"],
            "option --shard-params: 3 devices do not divide backbone.blocks.attention.projection.kernel",
        ),
    ],
)
def test_devices_that_do_not_fit_are_named(four_devices, phantoms, tmp_path, options, line):
    refused = train(tmp_path / "run", phantoms, *options, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {line}")
    assert refused.stderr.count("\n") == 1
