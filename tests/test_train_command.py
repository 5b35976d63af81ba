"""The main job end to end, as a user runs it."""

import csv
import json
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

import jaxla
from tests.commands import run_module
from tests.golden.checkpoints import write_checkpoint


def read_json(path):
    return json.loads(path.read_text())


def test_run_folder_holds_what_the_readme_promises(small_run):
    for name in (
        "experiment.json", "split.json", "metrics.jsonl", "progress.png", "train.log", "checkpoints/best",
        "checkpoints/latest", "test/cases.csv", "test/slices.csv", "test/summary.json", "test/overlays.png",
        "cases.json", "cost.json", "report.html",
    ):  # fmt: skip
        assert (small_run / name).exists(), name


def test_record_says_what_was_run(small_run):
    record = read_json(small_run / "experiment.json")
    assert record["experiment"]["seed"] == 1
    assert record["experiment"]["preprocessing"]["image_size"] == 48
    assert record["experiment"]["training"]["epochs"] == 3
    assert record["weights"] == "random"
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert len(record["split_sha256"]) == 64


def test_log_tells_of_random_weights_and_of_what_masks_mean(small_run):
    log = (small_run / "train.log").read_text()
    assert "vit_mini8 (random weights, trained): no pretrained weights are used" in log
    assert "LA: any non-zero value" in log


def test_one_line_of_metrics_per_epoch(small_run):
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    keys = {"epoch", "train_loss", "val_loss", "val_dice", "val_iou", "seconds", "slices_per_second"}
    assert all(set(line) == keys for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_split_covers_every_patient_once(small_run):
    split = read_json(small_run / "split.json")
    named = split["train"] + split["val"] + split["test"]
    assert sorted(named) == [f"train_{n}" for n in range(1, 7)]
    assert all(split.values())


def test_summary_is_the_mean_of_the_cases_and_stands_beside_the_atlas(small_run):
    summary = read_json(small_run / "test" / "summary.json")
    with (small_run / "test" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(read_json(small_run / "split.json")["test"])
    assert summary["dice"]["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-12)
    assert (summary["dice"]["n"], summary["dice"]["unit"]) == (len(rows), "volume")
    assert summary["slice"]["dice"]["unit"] == "slice"
    of_atlas = np.mean([float(row["atlas_dice"]) for row in rows])
    assert summary["atlas"]["dice"]["mean"] == pytest.approx(of_atlas, abs=1e-12)


def test_report_shows_the_one_test_case_once_and_the_reported_numbers(small_run):
    report = (small_run / "report.html").read_text()
    summary = read_json(small_run / "test" / "summary.json")
    assert report.count(">worst of 1: ") == 1
    assert "best of 1: " not in report
    assert f"{summary['dice']['mean']:.3f}" in report
    assert read_json(small_run / "experiment.json")["data_sha256"] in report


def test_cost_is_that_of_the_whole_network(small_run):
    cost, (case,) = read_json(small_run / "cost.json"), read_json(small_run / "split.json")["test"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(jaxla.load_network(small_run), nnx.Param)))
    assert cost["parameters"] == cost["trained_parameters"] == parameters
    assert cost["multiply_adds"] > 36 * 800_000  # each of 36 tokens meets the blocks' 0.8 M parameters
    assert cost["step_bytes"] > 3 * 4 * parameters  # with Adam's two moments
    assert cost["peak_host_bytes"] > cost["step_bytes"]
    assert cost["peak_device_bytes"] is None
    assert len(cost["inference_seconds"]) == 1
    assert cost["inference_seconds"][0] > 0
    slices = {row["slice"] for row in csv.DictReader((small_run / "test" / "slices.csv").open())}
    assert cost["inference_slices"] == [len(slices)], case


def test_last_line_names_dice_iou_and_folder(small_run):
    summary = read_json(small_run / "test" / "summary.json")
    last = (small_run / "stdout.txt").read_text().splitlines()[-1]
    assert last.startswith("vit_mini8 (random weights, trained): test Dice")
    assert f"Dice {summary['dice']['mean']:.3f}, IoU {summary['iou']['mean']:.3f}" in last
    assert str(small_run) in last


def test_predictions_lie_on_the_scans_own_grid_and_give_the_reported_dice(small_run, phantoms):
    with (small_run / "test" / "cases.csv").open() as file:
        reported = {row["case"]: float(row["dice"]) for row in csv.DictReader(file)}
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


def test_a_loaded_network_takes_images_and_gives_logits(small_run):
    network = jaxla.load_network(small_run)
    logits = network(np.zeros((2, 48, 64, 1), np.float32))
    assert logits.shape == (2, 48, 64, 1)
    assert np.isfinite(np.asarray(logits)).all()


# --- a convolutional network, with its own pre- and postprocessing ---


@pytest.fixture(scope="module")
def unet_run(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    run_module(
        "jaxla.train", "--exp=quickstart", "--method=unet", f"--data.root={phantoms}", f"--run-dir={folder / 'run'}",
        f"--cache-dir={folder / 'cache'}", "--preprocessing.image_size=48", "--training.epochs=4",
        "--training.learning_rate=0.01", "--training.batch_size=8", "--model.widths=[8,12,16]",
        "--augmentation.rotation=10", "--augmentation.flips=true", "--augmentation.intensity=0.1",
    )  # fmt: skip
    return folder / "run"


def test_a_unet_is_trained_tested_and_predicts_the_same_masks(unet_run, phantoms, tmp_path):
    summary = read_json(unet_run / "test" / "summary.json")
    assert summary["backbone"] == "unet (random weights, trained)"
    assert summary["dice"]["mean"] > summary["atlas"]["dice"]["mean"] / 2
    case = read_json(unet_run / "split.json")["test"][0]
    scan = phantoms / "task2" / "train_data" / case / "enhanced.nii.gz"
    run_module("jaxla.predict", f"--run={unet_run}", f"--input={scan}", f"--output={tmp_path / 'mask.nii.gz'}")
    masks = [
        nib.load(path) for path in (unet_run / "test" / "predictions" / f"{case}.nii.gz", tmp_path / "mask.nii.gz")
    ]
    np.testing.assert_array_equal(*(mask.get_fdata() for mask in masks))


def test_slices_are_laid_on_the_largest_training_slice_and_masks_are_opened_and_closed(unet_run, phantoms):
    record, split = read_json(unet_run / "experiment.json"), read_json(unet_run / "split.json")
    scans = {case: nib.load(phantoms / "task2" / "train_data" / case / "enhanced.nii.gz") for case in split["train"]}
    assert record["extent"] == max(n * 0.625 for scan in scans.values() for n in scan.shape[:2])
    square = np.ones((3, 3, 1), bool)
    for path in (unet_run / "test" / "predictions").iterdir():
        mask = nib.load(path).get_fdata() > 0
        assert mask.any()
        inner = mask[2:-2, 2:-2]
        np.testing.assert_array_equal(ndimage.binary_closing(mask, square)[2:-2, 2:-2], inner)


def test_a_scan_larger_than_those_of_training_is_seen_in_its_centre(unet_run, phantoms, tmp_path):
    case = read_json(unet_run / "split.json")["test"][0]
    scan = nib.load(phantoms / "task2" / "train_data" / case / "enhanced.nii.gz")
    whole = nib.Nifti1Image(np.pad(scan.get_fdata(), ((64, 64), (64, 64), (0, 0)), mode="reflect"), scan.affine)
    nib.save(whole, tmp_path / "large.nii.gz")
    output = tmp_path / "mask.nii.gz"
    done = run_module(
        "jaxla.predict", f"--run={unet_run}", f"--input={tmp_path / 'large.nii.gz'}", f"--output={output}"
    )
    assert "large.nii.gz: slices of " in done.stdout
    assert "it sees their centre, the rest is background" in done.stdout
    mask, extent = nib.load(output), read_json(unet_run / "experiment.json")["extent"]
    assert mask.shape == whole.shape
    beyond = [int((n - extent / 0.625) / 2) - 8 for n in mask.shape[:2]]  # 8: an input pixel, and the interpolation
    assert min(beyond) > 0
    edges = mask.get_fdata().copy()
    edges[beyond[0] : -beyond[0], beyond[1] : -beyond[1]] = 0
    assert not edges.any()


@pytest.fixture(scope="module")
def cache_with_vits14(tmp_path_factory):
    """A cache folder with synthetic weights of dinov2_vits14, where training looks for them."""
    folder = tmp_path_factory.mktemp("vits14")
    source = folder / "vits14.safetensors"
    write_checkpoint(source, "dinov2_vits14")
    weights = folder / "cache" / "weights" / "dinov2_vits14.safetensors"
    run_module("convert_weights", "--arch=dinov2_vits14", f"--source={source}", f"--output={weights}")
    return folder / "cache"


def one_patient_one_epoch(run, phantoms, cache, *options, check=True):
    return run_module(
        "jaxla.train", "--exp=fewshot_1patient", "--method=dinov2_vits14", f"--data.root={phantoms}",
        f"--run-dir={run}", f"--cache-dir={cache}", "--preprocessing.image_size=56", "--training.epochs=1",
        "--training.batch_size=8", "--model.decoder_widths=[16,8]", *options, check=check,
    )  # fmt: skip


def kernels_of(backbone):
    return np.asarray(backbone.blocks.mlp.expand.kernel[...])


def test_a_fine_tuned_backbone_moves_from_its_weights_and_is_in_the_checkpoint(phantoms, cache_with_vits14, tmp_path):
    one_patient_one_epoch(tmp_path / "run", phantoms, cache_with_vits14, "--model.backbone=finetuned")
    original = kernels_of(jaxla.load_backbone(cache_with_vits14 / "weights" / "dinov2_vits14.safetensors"))
    moved = np.abs(kernels_of(jaxla.load_network(tmp_path / "run").backbone) - original).max()
    steps = len(range(0, 24, 8))  # 24 slices of one patient at most
    assert 0 < moved <= 1.01e-5 * steps  # Adam moves a parameter by about its rate, 1e-5, a step


def test_a_frozen_random_backbone_is_in_the_checkpoint(phantoms, tmp_path):
    run = tmp_path / "run"
    options = ("--model.weights=random", "--model.backbone=frozen", "--seed=5")
    one_patient_one_epoch(run, phantoms, tmp_path / "cache", *options)
    assert "random weights, frozen" in read_json(run / "test" / "summary.json")["backbone"]
    fresh = jaxla.build_network("dinov2_vits14", seed=5, weights="random").backbone
    assert np.array_equal(kernels_of(jaxla.load_network(run).backbone), kernels_of(fresh))


def test_a_frozen_pretrained_backbone_is_used_and_its_file_must_stay(phantoms, cache_with_vits14, tmp_path):
    """Paper 1's method on synthetic weights: converted, trained upon, loaded again, and refused once damaged."""
    run = tmp_path / "run"
    shutil.copytree(cache_with_vits14, tmp_path / "cache")
    weights = tmp_path / "cache" / "weights" / "dinov2_vits14.safetensors"
    one_patient_one_epoch(run, phantoms, tmp_path / "cache")
    assert len(read_json(run / "split.json")["train"]) == 1
    record = read_json(run / "experiment.json")
    assert record["weights"] == str(weights)
    assert np.array_equal(kernels_of(jaxla.load_network(run).backbone), kernels_of(jaxla.load_backbone(weights)))

    # the same numbers from a file of another name are the same weights
    renamed = shutil.copy(cache_with_vits14.parent / "vits14.safetensors", tmp_path / "renamed.safetensors")
    before = weights.read_bytes()
    run_module("convert_weights", "--arch=dinov2_vits14", f"--source={renamed}", f"--output={weights}", "--force")
    assert weights.read_bytes() != before
    jaxla.load_network(run)

    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    with pytest.raises(jaxla.InputError, match=r"dinov2_vits14\.safetensors: damaged: the sha256 of its data is"):
        jaxla.load_network(run)
    refused = one_patient_one_epoch(tmp_path / "other", phantoms, tmp_path / "cache", check=False)
    assert (refused.returncode, (tmp_path / "other").exists()) == (2, False)
    assert refused.stderr.startswith(f"error: {weights}: damaged: the sha256 of its data is")
    weights.unlink()
    with pytest.raises(jaxla.InputError, match="is gone or another one; put it back as"):
        jaxla.load_network(run)


def test_a_fusion_is_trained_on_kept_features_and_images_and_predicts_the_same_masks(phantoms, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    run_module(
        "jaxla.train", "--exp=paper2", "--model.arch=vit_mini8", "--model.weights=random", "--model.blocks=[1,-1]",
        f"--data.root={phantoms}", f"--run-dir={run}", f"--cache-dir={cache}", "--preprocessing.image_size=48",
        "--training.epochs=2", "--training.batch_size=8", "--model.decoder_widths=[16,8,8]",
    )  # fmt: skip
    (features,) = (cache / "features").iterdir()
    arrays = [np.load(path, mmap_mode="r") for path in features.glob("*.npy")]
    assert len(arrays) == 6
    assert {array.shape[1:] for array in arrays} == {(2, 6, 6, 128)}

    summary = read_json(run / "test" / "summary.json")
    assert summary["backbone"] == "fusion_vitb14 with vit_mini8 (random weights, frozen)"
    weights = summary["block_weights"]
    assert weights["blocks"] == [1, 3]
    assert np.shape(weights["levels"]) == (3, 2)
    np.testing.assert_allclose(np.sum(weights["levels"], axis=1), 1, rtol=1e-6)
    assert np.ptp(weights["levels"]) > 1e-3  # they began equal
    report = (run / "report.html").read_text()
    assert "Weights of the backbone's blocks" in report
    assert "Learned weights in the best epoch; each row sums to 1</figcaption>" in report

    case = read_json(run / "split.json")["test"][0]
    scan = phantoms / "task2" / "train_data" / case / "enhanced.nii.gz"
    run_module("jaxla.predict", f"--run={run}", f"--input={scan}", f"--output={tmp_path / 'mask.nii.gz'}")
    masks = [nib.load(path) for path in (run / "test" / "predictions" / f"{case}.nii.gz", tmp_path / "mask.nii.gz")]
    assert masks[0].get_fdata().any()
    np.testing.assert_array_equal(*(mask.get_fdata() for mask in masks))


def test_windows_are_trained_on_kept_features_of_whole_volumes_and_predict_the_same_masks(phantoms, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    done = run_module(
        "jaxla.train", "--exp=paper3_left_atrium", "--model.arch=vit_mini8", "--model.weights=random",
        "--preprocessing.image_size=48", "--model.decoder_widths=[16,8,8,8]", "--training.epochs=2",
        "--model.windows=2x2x2", f"--data.root={phantoms}", f"--run-dir={run}", f"--cache-dir={cache}",
    )  # fmt: skip
    (features,) = (cache / "features").iterdir()
    arrays = [np.load(path, mmap_mode="r") for path in features.glob("*.npy")]
    assert {array.shape[1:] for array in arrays} == {(4, 6, 6, 128)}
    slices = sorted({len(array) for array in arrays})
    depth = f"has 32 places and is interpolated to {' to '.join(map(str, sorted({slices[0], slices[-1]})))} slices"
    assert f"windows_dinov3_vitb16: the depth embedding {depth}" in done.stdout
    assert [line["epoch"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [1, 2]
    summary = read_json(run / "test" / "summary.json")
    assert summary["backbone"] == "windows_dinov3_vitb16 with vit_mini8 (random weights, frozen)"
    cost = read_json(run / "cost.json")
    split = read_json(run / "split.json")
    scans = (phantoms / "task2" / "train_data" / name / "enhanced.nii.gz" for name in split["train"] + split["val"])
    assert cost["step_slices"] == max(nib.load(scan).shape[2] for scan in scans)
    assert cost["multiply_adds"] > 0

    case = read_json(run / "split.json")["test"][0]
    scan = phantoms / "task2" / "train_data" / case / "enhanced.nii.gz"
    done = run_module("jaxla.predict", f"--run={run}", f"--input={scan}", f"--output={tmp_path / 'mask.nii.gz'}")
    assert f"{run}: the depth embedding has 32 places and is interpolated to " in done.stdout
    masks = [nib.load(path) for path in (run / "test" / "predictions" / f"{case}.nii.gz", tmp_path / "mask.nii.gz")]
    assert masks[0].shape == nib.load(scan).shape
    np.testing.assert_array_equal(*(mask.get_fdata() for mask in masks))

    network = jaxla.load_network(run)
    volume = np.random.default_rng(0).random((1, 5, 48, 48, 1), dtype=np.float32)
    assert network(volume).shape == (1, 5, 48, 48, 1)

    few, mask = tmp_path / "few.nii.gz", tmp_path / "few_mask.nii.gz"
    nib.save(nib.load(scan).slicer[:, :, :1], few)
    refused = run_module("jaxla.predict", f"--run={run}", f"--input={few}", f"--output={mask}", check=False)
    assert (refused.returncode, mask.exists()) == (2, False)
    assert refused.stderr.startswith(f"error: {few}: has 1 slice, fewer than the 2 windows along them")


def test_real_scans_of_several_classes(hippocampus, tmp_path):
    """One epoch on eight real patients: three classes from dataset.json, and masks with the data set's own values."""
    run = tmp_path / "run"
    run_module(
        "jaxla.train", "--exp=quickstart", f"--data.root={hippocampus}", f"--run-dir={run}",
        f"--cache-dir={tmp_path / 'cache'}", "--data.train_patients=8", "--training.epochs=4",
        "--preprocessing.image_size=64",
    )  # fmt: skip
    summary = read_json(run / "test" / "summary.json")
    assert set(summary["classes"]) == {"Anterior", "Posterior"}
    assert summary["dice"]["n"] == 12
    values = [np.unique(nib.load(p).get_fdata()) for p in (run / "test" / "predictions").iterdir()]
    assert set(np.concatenate(values)) <= {0, 1, 2}

    # a reoriented copy of a scan gets the same mask in the world
    scan = nib.load(hippocampus / "imagesTr" / "hippocampus_064.nii.gz")
    turned = scan.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    (tmp_path / "scans").mkdir()
    nib.save(scan, tmp_path / "scans" / "scan.nii.gz")
    nib.save(turned, tmp_path / "scans" / "turned.nii.gz")
    run_module("jaxla.predict", f"--run={run}", f"--input={tmp_path / 'scans'}", f"--output={tmp_path / 'masks'}")
    mask, mask_turned = (
        nib.as_closest_canonical(nib.load(tmp_path / "masks" / name)) for name in ("scan.nii.gz", "turned.nii.gz")
    )
    assert mask.get_fdata().any()
    assert np.array_equal(mask.get_fdata(), mask_turned.get_fdata())
    np.testing.assert_allclose(mask.affine, mask_turned.affine, atol=1e-6)
