"""An end-to-end run of a frozen backbone on random patches of slices: --preprocessing.patch_size."""

import json

import jax
import numpy as np
import pytest

import jaxla
from jaxla.models.ops.multiply_adds import multiply_adds
from tests.commands import succeed
from tests.runs.folders import assert_predict_reproduces_test_mask, read_json, train

pytestmark = pytest.mark.usefixtures("fast_compilation")

OPTIONS = (
    "--exp=quickstart", "--method=vit_mini8", "--model.backbone=frozen", "--model.decoder_widths=[16,8]",
    "--preprocessing.image_size=42", "--preprocessing.patch_size=32", "--training.epochs=2",
    "--training.foreground_fraction=0.5", "--augmentation.intensity=0.1",
)  # fmt: skip


def test_a_run_trains_on_patches_and_segments_in_tiles(phantoms, tmp_path):
    """The transformer's patches of 8 pixels divide training patches of 32 pixels, but not slices of 42 pixels."""
    run, _ = train(tmp_path, phantoms, *OPTIONS)
    record = read_json(run / "experiment.json")
    assert record["input"] == "patches of 32 × 32 pixels from slices of 42 × 42 pixels"
    assert record["features"] == (
        "The frozen backbone runs in every epoch, because features of random patches cannot be cached."
    )
    assert not (tmp_path / "cache" / "features").exists()
    assert record["input"] in succeed(tmp_path, "jaxla.info", run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"]
    tile_operations = multiply_adds(jaxla.load_network(run), jax.ShapeDtypeStruct((1, 32, 32, 1), np.float32))
    assert read_json(run / "cost.json")["multiply_adds"] == 4 * tile_operations  # four tiles cover a slice
    mask, _ = assert_predict_reproduces_test_mask(run, phantoms, tmp_path)
    assert mask.any()
