"""A finished run applied to scans of any size and orientation."""

import hashlib
import json
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from jaxla.inference.trained import load_run

from jaxla.data.volumes import Volume, read_image
from jaxla.inference.segment import make_segment
from tests.commands import run_module


@pytest.fixture(scope="module")
def scan(phantoms):
    return phantoms / "task2" / "train_data" / "train_2" / "enhanced.nii.gz"


def reoriented(path, transform, output):
    nib.save(nib.load(path).as_reoriented(np.array(transform)), output)
    return output


def in_world(path):
    """A mask in canonical orientation, where voxels of reoriented copies coincide."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def test_reoriented_copies_get_the_same_mask_in_the_world(small_run, scan, tmp_path):
    (tmp_path / "scans").mkdir()
    shutil.copy(scan, tmp_path / "scans" / "scan.nii.gz")
    turns = ([[0, -1], [1, -1], [2, 1]], [[1, 1], [0, 1], [2, -1]], [[2, 1], [0, -1], [1, 1]])
    for n, transform in enumerate(turns):
        reoriented(scan, transform, tmp_path / "scans" / f"turned_{n}.nii.gz")
    run_module("jaxla.predict", f"--run={small_run}", f"--input={tmp_path / 'scans'}", f"--output={tmp_path / 'masks'}")
    mask = in_world(tmp_path / "masks" / "scan.nii.gz")
    assert mask.any()
    for n in range(len(turns)):
        assert np.array_equal(in_world(tmp_path / "masks" / f"turned_{n}.nii.gz"), mask)


def test_probabilities_are_written_beside_and_agree_with_the_mask(small_run, scan, tmp_path):
    output = tmp_path / "mask.nii.gz"
    done = run_module("jaxla.predict", f"--run={small_run}", f"--input={scan}", f"--output={output}", "--probabilities")
    probabilities = nib.load(tmp_path / "mask_probabilities.nii.gz")
    mask = nib.load(output)
    assert probabilities.shape == mask.shape == nib.load(scan).shape
    millilitres = np.count_nonzero(mask.dataobj) * np.prod(mask.header.get_zooms()) / 1000
    assert f"{output}: LA {millilitres:.1f} ml" in done.stdout
    assert probabilities.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(probabilities.dataobj) > 0.5, np.asarray(mask.dataobj) == 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.nii.gz", "mask_probabilities.nii.gz"]


def test_a_run_that_is_not_finished_says_so(small_run, scan, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / "report.html").unlink()
    output = tmp_path / "mask.nii.gz"
    done = run_module("jaxla.predict", f"--run={run}", f"--input={scan}", f"--output={output}")
    epoch = json.loads((small_run / "test" / "summary.json").read_text())["best_epoch"]
    said = f"{run}: this run of at most 3 epochs is not finished; its best epoch so far, {epoch}, segments"
    assert said in done.stdout.splitlines()
    assert output.exists()


def test_a_folder_gives_a_folder_and_an_existing_mask_is_kept(small_run, scan, tmp_path):
    (tmp_path / "scans").mkdir()
    for name in ("one.nii.gz", "two_0000.nii.gz"):
        (tmp_path / "scans" / name).write_bytes(scan.read_bytes())
    options = (f"--run={small_run}", f"--input={tmp_path / 'scans'}", f"--output={tmp_path / 'masks'}")
    run_module("jaxla.predict", *options)
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["one.nii.gz", "two.nii.gz"]

    before = (tmp_path / "masks" / "one.nii.gz").read_bytes()
    done = run_module("jaxla.predict", *options, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "one.nii.gz: exists already" in done.stderr
    assert (tmp_path / "masks" / "one.nii.gz").read_bytes() == before


def test_one_bad_scan_stops_all_before_anything_is_written(small_run, scan, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").write_bytes(scan.read_bytes())
    (tmp_path / "scans" / "b.nii.gz").write_bytes(scan.read_bytes()[:5000])
    done = run_module(
        "jaxla.predict",
        f"--run={small_run}",
        f"--input={tmp_path / 'scans'}",
        f"--output={tmp_path / 'm'}",
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "b.nii.gz: truncated or damaged" in done.stderr
    assert not (tmp_path / "m").exists()


def test_volumes_of_any_size_share_one_compilation(small_run, scan, caplog):
    """Also: what a slice is given does not depend on its neighbours in the batch."""
    segment = make_segment(load_run(small_run))
    volume = read_image(scan)
    whole, _ = segment(volume)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        cropped = volume.array[:, :, 3:10]
        part, _ = segment(Volume(volume.path, cropped, volume.affine, volume.header))
        segment(Volume(volume.path, volume.array[:100, :90], volume.affine, volume.header))
    assert not [record for record in caplog.records if "compil" in record.message.lower()]
    assert part.shape == cropped.shape
    assert whole.shape == volume.array.shape


def test_non_square_anisotropic_pixels_keep_their_place(small_run, scan):
    """Doubling one in-plane spacing by dropping every other column leaves the mask where it was in the world."""
    volume = read_image(scan)
    segment = make_segment(load_run(small_run))
    whole, _ = segment(volume)
    affine = volume.affine @ np.diag([2.0, 1, 1, 1])
    thinned, _ = segment(Volume(volume.path, volume.array[::2], affine, volume.header))
    a, b = whole[::2] > 0, thinned > 0
    dice = 2 * (a & b).sum() / (a.sum() + b.sum())
    assert dice > 0.99  # measured 0.995: half of the columns are interpolated from the others


def test_a_run_trained_on_another_device_loads_here(small_run, tmp_path):
    """A checkpoint names the device it was saved from; a laptop must read what a GPU wrote."""
    moved = tmp_path / "run"
    shutil.copytree(small_run, moved)
    notes = list(moved.rglob("_sharding"))
    assert notes
    for note in notes:
        note.write_text(note.read_text().replace("cpu:0", "cuda:0"))
    for sums in moved.rglob("*.sha256"):  # as if it had been written so
        checkpoint = sums.with_suffix("")
        names = json.loads(sums.read_text())
        sums.write_text(json.dumps({n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in names}))
    here, there = (nnx.state(load_run(folder).network) for folder in (small_run, moved))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True))


def test_a_runs_own_predictions_can_be_scored_against_the_data_set(small_run, phantoms, tmp_path):
    run_module(
        "jaxla.evaluate", f"--predictions={small_run / 'test' / 'predictions'}", f"--references={phantoms}",
        f"--cases={small_run / 'split.json'}", f"--output={tmp_path / 'scores'}",
    )  # fmt: skip
    again, reported = (
        json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "scores", small_run / "test")
    )
    for metric in ("dice", "hd95_mm", "volume_ml"):
        assert again[metric]["mean"] == pytest.approx(reported[metric]["mean"], rel=1e-12)
        assert again[metric]["n"] == reported[metric]["n"]
