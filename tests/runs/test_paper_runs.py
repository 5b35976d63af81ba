"""End-to-end runs of papers 2 and 3 on a small backbone: features are cached, `predict` reproduces the test masks."""

import json

import jax
import nibabel as nib
import numpy as np
import pytest

import jaxla
from tests.commands import refuse
from tests.runs.folders import assert_predict_reproduces_test_mask, read_json, scan_file, train

pytestmark = pytest.mark.usefixtures("fast_compilation")

SMALL = (
    "--model.arch=vit_mini8", "--model.weights=random", "--preprocessing.image_size=48", "--training.epochs=2",
    "--seed=1",
)  # fmt: skip


def feature_arrays(cache):
    (folder,) = (cache / "features").iterdir()
    return [np.load(path, mmap_mode="r") for path in folder.glob("*.npy")]


def test_fusion_trains_on_cached_features_and_images(phantoms, tmp_path):
    options = ("--model.blocks=[1,-1]", "--model.decoder_widths=[16,8]", "--training.batch_size=8")
    options += ("--postprocessing.flips=true",)
    run, printed = train(tmp_path, phantoms, "--exp=paper2", *SMALL, *options)
    assert "--postprocessing.flips=true: inference also reads flipped slices, but training does not. Add" in printed
    arrays = feature_arrays(tmp_path / "cache")
    assert len(arrays) == 6
    assert {array.shape[1:] for array in arrays} == {(2, 6, 6, 128)}
    assert read_json(run / "experiment.json")["features_cached"]

    summary = read_json(run / "test" / "summary.json")
    assert summary["backbone"] == "fusion_vitb14 with vit_mini8 (random weights, frozen)"
    weights = summary["block_weights"]
    assert weights["blocks"] == [1, 3]
    assert np.shape(weights["levels"]) == (2, 2)
    np.testing.assert_allclose(np.sum(weights["levels"], axis=1), 1, rtol=1e-6)
    assert np.ptp(weights["levels"]) > 1e-3  # all weights start equal
    assert "Weights of the backbone's blocks" in (run / "report.html").read_text()

    mask, _ = assert_predict_reproduces_test_mask(run, phantoms, tmp_path)
    assert mask.any()


def test_windows_train_on_cached_features_of_volumes(phantoms, tmp_path):
    options = ("--model.windows=2x2x2", "--model.decoder_widths=[16,8,8,8]")
    run, printed = train(tmp_path, phantoms, "--exp=paper3_left_atrium", *SMALL, *options)
    arrays = feature_arrays(tmp_path / "cache")
    assert {array.shape[1:] for array in arrays} == {(4, 6, 6, 128)}
    slices = sorted({len(array) for array in arrays})
    span = " to ".join(map(str, sorted({slices[0], slices[-1]})))
    depth = f"the depth embedding's 32 positions are interpolated to {span} slices"
    assert f"windows_dinov3_vitb16: {depth}" in printed
    assert [line["epoch"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [1, 2]
    summary = read_json(run / "test" / "summary.json")
    assert summary["backbone"] == "windows_dinov3_vitb16 with vit_mini8 (random weights, frozen)"
    cost, split = read_json(run / "cost.json"), read_json(run / "split.json")
    assert cost["step_slices"] == max(
        nib.load(scan_file(phantoms, case)).shape[2] for case in split["train"] + split["val"]
    )
    assert cost["multiply_adds"] > 0

    mask, printed = assert_predict_reproduces_test_mask(run, phantoms, tmp_path)
    assert f"{run}: the depth embedding's 32 positions are interpolated to " in printed
    assert mask.shape == nib.load(scan_file(phantoms, split["test"][0])).shape

    volume = jax.ShapeDtypeStruct((1, 5, 48, 48, 1), np.float32)
    assert jax.eval_shape(jaxla.load_network(run), volume).shape == volume.shape

    nib.save(nib.load(scan_file(phantoms, split["test"][0])).slicer[:, :, :1], tmp_path / "one_slice.nii.gz")
    line = refuse(tmp_path, "jaxla.predict", f"--run={run}", "--input=one_slice.nii.gz", "--output=new.nii.gz")
    assert line.startswith("error: one_slice.nii.gz: has 1 slice, fewer than the 2 windows along the slices. ")
