"""python -m jaxla.train --dry-run: the forecast, compared with the scans and with an actual run."""

import json
import math
import re
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

import jaxla
from tests.commands import SMALL_RUN_OPTIONS, parse_bytes, refuse_to_train, snapshot, succeed
from tests.training.faults import report_free_bytes

FROZEN_OPTIONS = (
    *SMALL_RUN_OPTIONS, "--model.backbone=frozen", "--model.decoder=linear",
    "--training.epochs=1", "--training.schedule=constant",
)  # fmt: skip
PARTS = ("train", "val", "test")


def dry_run(folder, phantoms, *options):
    """Return the forecast's lines by title; the command must write nothing outside the cache."""
    before = snapshot(folder)
    arguments = [
        "--exp=quickstart",
        "--method=vit_mini8",
        f"--data.root={phantoms}",
        f"--cache-dir={folder / 'cache'}",
        "--dry-run",
    ]
    printed = succeed(folder, "jaxla.train", *arguments, *options)
    assert snapshot(folder) == before
    return {line[:12].strip(): line[12:] for line in printed.splitlines()[-8:]}


def count_parameters(network):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


@pytest.fixture(scope="module")
def split(small_run):
    return json.loads((small_run / "split.json").read_text())


@pytest.fixture(scope="module")
def slices(split, phantoms):
    """The number of slices in each part, from the headers of the scans; phantoms store slices along the last axis."""
    scans = phantoms / "task2" / "train_data"
    return {part: sum(nib.load(scans / case / "enhanced.nii.gz").shape[2] for case in split[part]) for part in PARTS}


@pytest.fixture(scope="module")
def network():
    return jaxla.build_network("vit_mini8", weights="random")


@pytest.fixture(scope="module")
def finetuned_forecast(small_run, phantoms, tmp_path_factory):
    """The forecast for the options of `small_run`; --run-dir may be the folder of a run, which must not change."""
    before = snapshot(small_run)
    forecast = dry_run(tmp_path_factory.mktemp("dry_run"), phantoms, *SMALL_RUN_OPTIONS, f"--run-dir={small_run}")
    assert snapshot(small_run) == before
    return forecast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which a run with a frozen backbone is forecast, trained, and forecast again."""
    return tmp_path_factory.mktemp("dry_run")


@pytest.fixture(scope="module")
def frozen_forecast(folder, phantoms):
    """The forecast before any features are cached."""
    forecast = dry_run(folder, phantoms, *FROZEN_OPTIONS)
    assert {path.name for path in (folder / "cache").iterdir()} == {"volumes", "in-use"}
    return forecast


@pytest.fixture(scope="module")
def features(frozen_forecast, folder, phantoms):
    """The folder of the features that the actual run caches."""
    folders = [f"--data.root={phantoms}", f"--cache-dir={folder / 'cache'}", f"--run-dir={folder / 'run'}"]
    succeed(folder, "jaxla.train", "--exp=quickstart", "--method=vit_mini8", *folders, *FROZEN_OPTIONS)
    (features,) = (folder / "cache" / "features").iterdir()
    return features


def test_forecast_counts_patients_slices_steps_and_parameters(finetuned_forecast, small_run, split, slices, network):
    assert list(finetuned_forecast) == ["run", "patients", "slices", "steps", "parameters", "disk", "memory", "time"]
    assert finetuned_forecast["run"] == "quickstart, vit_mini8 (random weights, trained)"
    assert finetuned_forecast["patients"] == ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    assert finetuned_forecast["slices"] == ", ".join(f"{slices[part]} {part}" for part in PARTS)
    assert finetuned_forecast["steps"] == f"{math.ceil(slices['train'] / 8)} per epoch, 8 slices each, at most 3 epochs"
    assert finetuned_forecast["parameters"] == f"{count_parameters(network)} trained, 0 frozen"
    assert f"{count_parameters(network)} parameters are trained, 0 are frozen" in (small_run / "train.log").read_text()
    assert "feature" not in finetuned_forecast["disk"] + finetuned_forecast["time"]


def test_forecast_counts_a_frozen_backbone_separately(frozen_forecast, slices, network):
    assert frozen_forecast["run"] == "quickstart, vit_mini8 (random weights, frozen)"
    assert frozen_forecast["steps"] == f"{math.ceil(slices['train'] / 8)} per epoch, 8 slices each, at most 1 epoch"
    decoder = 128 + 1  # linear: weights and bias
    assert frozen_forecast["parameters"] == f"{decoder} trained, {count_parameters(network.backbone)} frozen"


def test_memory_covers_parameters_and_adams_two_moments(finetuned_forecast, network):
    pattern = r"(\S+) for a training step, as reported by XLA, of (\S+)"
    needed, total = re.fullmatch(pattern, finetuned_forecast["memory"]).groups()
    assert 3 * 4 * count_parameters(network) <= parse_bytes(needed) <= parse_bytes(total)


def test_time_names_its_parts(finetuned_forecast, frozen_forecast):
    assert re.fullmatch(
        r"start and compilation .*; an epoch .*, 3 epochs .*; test .*; about .* in total, on .*, from 3 measured steps",
        finetuned_forecast["time"],
    )
    assert re.match(r"start and compilation .*; features .*; an epoch .*, 1 epoch ", frozen_forecast["time"])


def test_run_folder_is_no_larger_than_forecast(finetuned_forecast, small_run):
    size = sum(path.stat().st_size for path in small_run.rglob("*") if path.is_file())
    assert size <= parse_bytes(re.match(r"run folder (\S+) at most", finetuned_forecast["disk"])[1])


def test_features_take_as_much_space_as_forecast(frozen_forecast, features, folder, slices):
    """The forecast shows three digits, so it is exact to 0.5 %."""
    written = sum(np.load(path, mmap_mode="r").nbytes for path in features.glob("*.npy"))
    assert written == sum(slices.values()) * 6 * 6 * 128 * 4  # 48 pixels in patches of 8, 128 channels, float32
    size, cache = re.search(r"; features (\S+) in (\S+) \(\S+ free\)$", frozen_forecast["disk"]).groups()
    assert parse_bytes(size) == pytest.approx(written, rel=0.005)
    assert cache == str(folder / "cache")


def test_cached_features_are_not_counted_again(features, folder, phantoms):
    forecast = dry_run(folder, phantoms, *FROZEN_OPTIONS)
    assert "features" not in forecast["disk"] + forecast["time"].removesuffix(", without reading features from disk")

    lost = next(features.glob("*.npy"))
    lost_bytes = np.load(lost, mmap_mode="r").nbytes
    clone = folder / "clone"
    shutil.copytree(folder / "cache", clone / "cache")
    for suffix in (".npy", ".json"):
        (clone / "cache" / "features" / features.name / lost.name).with_suffix(suffix).unlink()
    forecast = dry_run(clone, phantoms, *FROZEN_OPTIONS)
    assert parse_bytes(re.search(r"; features (\S+) in ", forecast["disk"])[1]) == pytest.approx(lost_bytes, rel=0.005)


def test_forecast_gives_advice_if_features_do_not_fit_on_the_disk(tmp_path, phantoms, monkeypatch, slices):
    """The method fuses all four blocks, so the advice includes fewer blocks."""
    report_free_bytes(monkeypatch, 250_000)
    options = ("--method=fusion_vitb14", "--model.arch=vit_mini8", "--model.weights=random")
    forecast = dry_run(tmp_path, phantoms, *SMALL_RUN_OPTIONS, *options, "--model.decoder_widths=[16,8]")
    size, advice = re.search(
        rf"; features (\S+) in {tmp_path / 'cache'} \(250kB free\), which do not fit: the backbone runs in every "
        r"epoch\. To cache them, use (.*)$",
        forecast["disk"],
    ).groups()
    assert parse_bytes(size) == pytest.approx(sum(slices.values()) * 4 * 6 * 6 * 128 * 4, rel=0.005)
    assert advice == "another --cache-dir or fewer --model.blocks"
    assert "features" not in forecast["time"]


def test_dry_run_refuses_what_training_refuses(tmp_path):
    line = refuse_to_train(tmp_path, "--dry-run", "--preprocessing.image_size=97")
    assert "--preprocessing.image_size=97: not a multiple of the patch size 8" in line
    assert "--data.root=" in refuse_to_train(tmp_path, "--dry-run")
