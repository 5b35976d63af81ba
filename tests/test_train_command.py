"""python -m jaxla.train end to end: what the run folder contains and what the command prints."""

import csv
import json

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

import jaxla


def read_json(path):
    return json.loads(path.read_text())


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_run_folder_contains_the_files_that_the_readme_promises(small_run):
    for name in (
        "experiment.json", "split.json", "metrics.jsonl", "progress.png", "train.log", "checkpoints/best",
        "checkpoints/latest", "test/cases.csv", "test/slices.csv", "test/summary.json", "test/overlays.png",
        "cases.json", "scans.json", "cost.json", "report.html",
    ):  # fmt: skip
        assert (small_run / name).exists(), name


def test_record_contains_options_versions_and_hashes(small_run):
    record = read_json(small_run / "experiment.json")
    experiment = record["experiment"]
    assert (experiment["name"], experiment["method"], experiment["seed"]) == ("quickstart", "vit_mini8", 1)
    assert experiment["preprocessing"]["image_size"] == 48
    assert experiment["training"]["epochs"] == 3
    assert record["weights"] == "random"
    assert record["network"] == "vit_mini8 (random weights, trained)"
    assert (record["weights_sha256"], record["backbone_sha256"], record["features_cached"]) == ("", "", False)
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert len(record["split_sha256"]) == len(record["data_sha256"]) == 64


def test_log_names_random_weights_and_the_meaning_of_masks(small_run):
    log = (small_run / "train.log").read_text()
    assert "vit_mini8 (random weights, trained): no pretrained weights are used" in log
    assert "LA: any non-zero value" in log


def test_metrics_have_one_line_per_epoch(small_run):
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    keys = {"epoch", "train_loss", "val_loss", "val_dice", "val_iou", "seconds", "slices_per_second"}
    assert all(set(line) == keys for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_split_covers_every_patient_once(small_run):
    split = read_json(small_run / "split.json")
    names = split["train"] + split["val"] + split["test"]
    assert sorted(names) == [f"train_{n}" for n in range(1, 7)]
    assert all(split.values())


def test_summary_has_the_means_over_cases_of_the_network_and_the_atlas_baseline(small_run):
    summary, rows = read_json(small_run / "test" / "summary.json"), read_rows(small_run / "test" / "cases.csv")
    assert {row["case"] for row in rows} == set(read_json(small_run / "split.json")["test"])
    assert summary["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-12)
    assert (summary["dice"]["n"], summary["dice"]["unit"]) == (len(rows), "volume")
    assert summary["slice"]["dice"]["unit"] == "slice"
    atlas = np.mean([float(row["atlas_dice"]) for row in rows])
    assert summary["atlas"]["dice"]["mean"] == pytest.approx(atlas, abs=1e-12)


def test_report_shows_the_test_case_once_and_the_reported_numbers(small_run):
    report = (small_run / "report.html").read_text()
    summary = read_json(small_run / "test" / "summary.json")
    assert report.count(">worst of 1: ") == 1
    assert "best of 1: " not in report
    assert f"{summary['dice']['mean']:.3f}" in report
    assert read_json(small_run / "experiment.json")["data_sha256"] in report


def test_cost_file_describes_the_network(small_run):
    cost = read_json(small_run / "cost.json")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(jaxla.load_network(small_run), nnx.Param)))
    assert cost["parameters"] == cost["trained_parameters"] == parameters
    assert cost["multiply_adds"] > 36 * 800_000  # each of 36 tokens passes through 0.8 M parameters
    assert cost["step_bytes"] > 3 * 4 * parameters  # with Adam's two moments
    assert cost["peak_host_bytes"] > cost["step_bytes"]
    assert cost["peak_device_bytes"] is None
    assert len(cost["inference_seconds"]) == 1
    assert cost["inference_seconds"][0] > 0
    slices = {row["slice"] for row in read_rows(small_run / "test" / "slices.csv")}
    assert cost["inference_slices"] == [len(slices)]


def test_last_line_shows_dice_iou_and_folder(small_run):
    summary = read_json(small_run / "test" / "summary.json")
    last = (small_run / "stdout.txt").read_text().splitlines()[-1]
    assert last.startswith("vit_mini8 (random weights, trained): test Dice")
    assert f"Dice {summary['dice']['mean']:.3f}, IoU {summary['iou']['mean']:.3f}" in last
    assert str(small_run) in last


def test_predictions_have_the_grids_of_their_scans_and_the_reported_dice(small_run, phantoms):
    reported = {row["case"]: float(row["dice"]) for row in read_rows(small_run / "test" / "cases.csv")}
    for path in (small_run / "test" / "predictions").iterdir():
        case = path.name.removesuffix(".nii.gz")
        scan = nib.load(phantoms / "task2" / "train_data" / case / "enhanced.nii.gz")
        mask = nib.load(path)
        assert mask.shape == scan.shape
        assert np.array_equal(mask.affine, scan.affine)
        assert mask.header.get_zooms() == scan.header.get_zooms()
        for key in ("qform_code", "sform_code", "xyzt_units"):
            assert mask.header[key] == scan.header[key]
        reference = nib.load(phantoms / "task2" / "train_data" / case / "atriumSegImgMO.nii.gz").get_fdata() > 0
        predicted = mask.get_fdata() > 0
        dice = 2 * (reference & predicted).sum() / max(1, reference.sum() + predicted.sum())
        assert dice == pytest.approx(reported[case], abs=1e-12)


def test_loaded_network_maps_images_to_logits(small_run):
    network = nnx.jit(jaxla.load_network(small_run))
    logits = network(np.zeros((2, 48, 64, 1), np.float32))
    assert logits.shape == (2, 48, 64, 1)
    assert np.isfinite(np.asarray(logits)).all()
