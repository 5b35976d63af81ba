"""python -m jaxla.train --dry-run: what it foretells, held against the files and against a run that is then made."""

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
from tests.commands import in_this_process, refuse_to_train, tree
from tests.test_cache_command import bytes_of
from tests.training.faults import leave_free

SMALL = ("--preprocessing.image_size=48", "--training.epochs=3", "--seed=1")  # the options of `small_run`
FROZEN = (*SMALL, "--model.backbone=frozen", "--training.epochs=1")
PARTS = ("train", "val", "test")


def dry_run(folder, phantoms, *options):
    """The forecast, name -> text, after checking that no file was made but prepared volumes in the cache."""
    before = tree(folder)
    arguments = ["--exp=quickstart", f"--data.root={phantoms}", f"--cache-dir={folder / 'cache'}", "--dry-run"]
    done = in_this_process(folder, "jaxla.train", *arguments, *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert tree(folder) == before
    return {line[:12].strip(): line[12:] for line in done.stdout.splitlines()[-8:]}


def count(network):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


@pytest.fixture(scope="module")
def split(small_run):
    return json.loads((small_run / "split.json").read_text())


@pytest.fixture(scope="module")
def slices(split, phantoms):
    """Slices in each part, from the scans' own headers; phantoms are stored with the slices last."""
    scans = phantoms / "task2" / "train_data"
    return {part: sum(nib.load(scans / n / "enhanced.nii.gz").shape[2] for n in split[part]) for part in PARTS}


@pytest.fixture(scope="module")
def network():
    return jaxla.build_network("vit_mini8", weights="random")


@pytest.fixture(scope="module")
def fine_tuned(small_run, phantoms, tmp_path_factory):
    """The forecast of `small_run`; naming its folder, although that holds a run, does nothing to it."""
    before = tree(small_run)
    said = dry_run(tmp_path_factory.mktemp("dry_run"), phantoms, *SMALL, f"--run-dir={small_run}")
    assert tree(small_run) == before
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run on a frozen backbone is foretold, made, and foretold again."""
    return tmp_path_factory.mktemp("dry_run")


@pytest.fixture(scope="module")
def frozen(folder, phantoms):
    """Its forecast before any features are there."""
    said = dry_run(folder, phantoms, *FROZEN)
    assert {path.name for path in (folder / "cache").iterdir()} == {"volumes", "in-use"}
    return said


@pytest.fixture(scope="module")
def run_after(frozen, folder, phantoms):
    """The run itself, made after its forecast; the folder of its features."""
    places = [f"--data.root={phantoms}", f"--cache-dir={folder / 'cache'}", f"--run-dir={folder / 'run'}"]
    done = in_this_process(folder, "jaxla.train", "--exp=quickstart", *places, *FROZEN)
    assert done.returncode == 0, done.stdout + done.stderr
    (features,) = (folder / "cache" / "features").iterdir()
    return features


def test_the_run_is_named_and_counted(fine_tuned, small_run, split, slices, network):
    assert list(fine_tuned) == ["run", "patients", "slices", "steps", "parameters", "disk", "memory", "time"]
    assert fine_tuned["run"] == "quickstart, vit_mini8: vit_mini8 (random weights, trained)"
    assert fine_tuned["patients"] == ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    assert fine_tuned["slices"] == ", ".join(f"{slices[part]} {part}" for part in PARTS)
    assert fine_tuned["steps"] == f"{math.ceil(slices['train'] / 8)} an epoch of 8 slices each, 3 epochs at most"
    assert fine_tuned["parameters"] == f"{count(network)} trained, 0 frozen"
    assert f"{count(network)} parameters are trained, 0 are frozen" in (small_run / "train.log").read_text()
    assert "feature" not in fine_tuned["disk"] + fine_tuned["time"]


def test_a_frozen_backbone_is_counted_apart(frozen, split, slices, network):
    assert frozen["run"] == "quickstart, vit_mini8: vit_mini8 (random weights, frozen)"
    assert frozen["patients"] == ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    assert frozen["steps"] == f"{math.ceil(slices['train'] / 8)} an epoch of 8 slices each, 1 epochs at most"
    assert frozen["parameters"] == f"{count(network.decoder)} trained, {count(network.backbone)} frozen"


def test_memory_is_at_least_that_of_parameters_and_adams_two_moments(fine_tuned, network):
    shown, rest = re.fullmatch(r"(\S+) for a training step, by XLA's account, of (\S+)", fine_tuned["memory"]).groups()
    assert 3 * 4 * count(network) <= bytes_of(shown) <= bytes_of(rest)


def test_time_names_what_was_measured(fine_tuned, frozen):
    assert re.fullmatch(
        r"start and compilation .*; an epoch .*, all 3 .*; test .*; together about .*, on .*, from 3 measured steps",
        fine_tuned["time"],
    )
    assert re.match(r"start and compilation .*; features .*; an epoch .*, all 1 ", frozen["time"])


def test_the_run_folder_stays_below_what_was_foretold(fine_tuned, small_run):
    held = sum(path.stat().st_size for path in small_run.rglob("*") if path.is_file())
    foretold = bytes_of(re.match(r"run folder (\S+) at most", fine_tuned["disk"])[1])
    assert held <= foretold


def test_features_take_what_was_foretold(frozen, run_after, folder, slices):
    """Three digits are shown: half a per cent."""
    written = sum(np.load(path, mmap_mode="r").nbytes for path in run_after.glob("*.npy"))
    assert written == sum(slices.values()) * 6 * 6 * 128 * 4  # 48 pixels in patches of 8, 128 channels, float32
    shown, where = re.search(r"; features (\S+) in (\S+) \(\S+ free\)$", frozen["disk"]).groups()
    assert bytes_of(shown) == pytest.approx(written, rel=0.005)
    assert where == str(folder / "cache")


def test_features_that_are_there_are_not_counted_again(run_after, folder, phantoms, slices):
    said = dry_run(folder, phantoms, *FROZEN)
    assert "features" not in said["disk"] + said["time"]

    clone = folder / "clone"
    shutil.copytree(folder / "cache", clone / "cache")
    lost = next((clone / "cache" / "features").glob("*/*.npy"))
    lost_bytes = np.load(lost, mmap_mode="r").nbytes
    lost.with_suffix(".json").unlink()
    lost.unlink()
    said = dry_run(clone, phantoms, *FROZEN)
    shown = re.search(r"; features (\S+) in ", said["disk"])[1]
    assert bytes_of(shown) == pytest.approx(lost_bytes, rel=0.005)


def test_features_that_do_not_fit_on_the_disk_are_said_not_to(tmp_path, phantoms, monkeypatch, slices, network):
    leave_free(monkeypatch, 250_000)
    said = dry_run(tmp_path, phantoms, *FROZEN)
    cache = tmp_path / "cache"
    shown = re.search(
        rf"; features would take (\S+) in {cache}, where 250kB are free: the backbone runs in every epoch instead; "
        r"--cache-dir names another disk$",
        said["disk"],
    )[1]
    assert bytes_of(shown) == pytest.approx(sum(slices.values()) * 6 * 6 * 128 * 4, rel=0.005)
    assert "features" not in said["time"]
    assert said["parameters"] == f"{count(network.decoder)} trained, {count(network.backbone)} frozen"


def test_a_fusion_keeps_the_blocks_that_it_reads_and_is_told_to_keep_fewer(tmp_path, phantoms, monkeypatch, slices):
    options = (*FROZEN, "--method=fusion_vitb14", "--model.arch=vit_mini8", "--model.weights=random")
    options += ("--model.decoder_widths=[16,8]",)
    said = dry_run(tmp_path, phantoms, *options, "--model.blocks=[0,-1]")
    shown = re.search(r"; features (\S+) in ", said["disk"])[1]
    assert bytes_of(shown) == pytest.approx(sum(slices.values()) * 2 * 6 * 6 * 128 * 4, rel=0.005)
    leave_free(monkeypatch, 250_000)
    said = dry_run(tmp_path, phantoms, *options)
    shown, mend = re.search(r"; features would take (\S+) in .*: the backbone .*; (--.*)$", said["disk"]).groups()
    assert bytes_of(shown) == pytest.approx(sum(slices.values()) * 4 * 6 * 6 * 128 * 4, rel=0.005)
    assert mend == "--cache-dir names another disk, --model.blocks fewer blocks to keep"


def test_what_training_refuses_a_dry_run_refuses(tmp_path):
    line = refuse_to_train(tmp_path, "--dry-run", "--preprocessing.image_size=97")
    assert "option --preprocessing.image_size=97 must be a multiple of the patch size 8" in line
    assert "--data.root=" in refuse_to_train(tmp_path, "--dry-run")
