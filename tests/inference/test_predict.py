"""python -m jaxla.predict, and a finished run on scans of any size and orientation."""

import hashlib
import json
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from jaxla.data.volumes import Volume, read_image
from jaxla.inference.segment import segment_volume
from jaxla.runs.trained import load_run
from tests.commands import refuse, run_module, succeed
from tests.data.nifti import edit_header


@pytest.fixture(scope="module")
def scan(phantoms):
    return phantoms / "task2" / "train_data" / "train_2" / "enhanced.nii.gz"


@pytest.fixture(scope="module")
def segment(small_run):
    """Segment a volume with the small run and return its mask."""
    segment_slices = load_run(small_run).make_segment()
    return lambda volume: segment_volume(segment_slices, volume)[0]


def canonical_mask(path):
    """Return a mask in canonical orientation, in which the voxels of reoriented copies coincide."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def test_a_folder_of_reoriented_copies_gets_the_same_masks_and_probabilities(small_run, scan, tmp_path):
    """The whole command, in a new process."""
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    shutil.copy(scan, scans / "scan_0000.nii.gz")
    turns = ([[0, -1], [1, -1], [2, 1]], [[1, 1], [0, 1], [2, -1]], [[2, 1], [0, -1], [1, 1]])
    for n, transform in enumerate(turns):
        nib.save(nib.load(scan).as_reoriented(np.array(transform)), scans / f"turned_{n}.nii.gz")
    half_size = tuple((nib.load(scan).affine @ np.diag([0.5, 0.5, 0.5, 1]))[:3].ravel())
    shutil.copy(scan, scans / "two_sizes.nii.gz")
    edit_header(scans / "two_sizes.nii.gz", qform_code=1, sform_code=1, srow=half_size)
    done = run_module("jaxla.predict", f"--run={small_run}", f"--input={scans}", f"--output={masks}", "--probabilities")
    assert done.stdout.count(f"{scans}/two_sizes.nii.gz: sform and qform disagree") == 1
    names = ("scan", *(f"turned_{n}" for n in range(len(turns))), "two_sizes")
    expected = [f"{name}{suffix}.nii.gz" for name in names for suffix in ("", "_probabilities")]
    assert sorted(path.name for path in masks.iterdir()) == expected

    canonical = canonical_mask(masks / "scan.nii.gz")
    assert canonical.any()
    for name in names:
        assert np.array_equal(canonical_mask(masks / f"{name}.nii.gz"), canonical)
        mask, probabilities = nib.load(masks / f"{name}.nii.gz"), nib.load(masks / f"{name}_probabilities.nii.gz")
        assert probabilities.shape == mask.shape
        assert probabilities.get_data_dtype() == np.float32
        assert np.array_equal(np.asarray(probabilities.dataobj) > 0.5, np.asarray(mask.dataobj) == 1)
        millilitres = np.count_nonzero(mask.dataobj) * np.prod(mask.header.get_zooms()) / 1000
        assert f"{masks / name}.nii.gz: LA {millilitres:.1f} ml" in done.stdout


def test_an_unfinished_run_is_used_with_a_note(small_run, scan, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / "report.html").unlink()
    printed = succeed(tmp_path, "jaxla.predict", f"--run={run}", f"--input={scan}", "--output=mask.nii.gz")
    epoch = json.loads((small_run / "test" / "summary.json").read_text())["best_epoch"]
    note = f"{run}: this run of at most 3 epochs is not finished; using its best epoch so far, {epoch}"
    assert note in printed.splitlines()
    assert (tmp_path / "mask.nii.gz").exists()


@pytest.mark.parametrize("existing", ["masks/two.nii.gz", "masks/one_probabilities.nii.gz"])
def test_existing_masks_are_kept(small_run, scan, tmp_path, existing):
    (tmp_path / "scans").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("one.nii.gz", "two_0000.nii.gz"):
        shutil.copy(scan, tmp_path / "scans" / name)
    (tmp_path / existing).write_text("a mask")
    options = (f"--run={small_run}", "--input=scans", "--output=masks", "--probabilities")
    assert refuse(tmp_path, "jaxla.predict", *options) == f"error: {existing}: exists already. Use another --output."


def test_one_bad_scan_is_refused_before_anything_is_written(small_run, scan, tmp_path):
    (tmp_path / "scans").mkdir()
    shutil.copy(scan, tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "scans" / "b.nii.gz").write_bytes(scan.read_bytes()[:5000])
    line = refuse(tmp_path, "jaxla.predict", f"--run={small_run}", "--input=scans", "--output=masks")
    assert line.startswith("error: scans/b.nii.gz: truncated or damaged")


def test_volumes_of_any_size_share_one_compiled_program(segment, scan, caplog):
    volume = read_image(scan)
    mask = segment(volume)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        cropped = volume.array[:, :, 3:10]
        part = segment(Volume(volume.path, cropped, volume.affine, volume.header))
        segment(Volume(volume.path, volume.array[:100, :90], volume.affine, volume.header))
    assert not [record for record in caplog.records if "compil" in record.message.lower()]
    assert part.shape == cropped.shape
    assert mask.shape == volume.array.shape


def test_anisotropic_pixels_keep_their_position(segment, scan):
    """Dropping every other column, which doubles one spacing, leaves the mask at its position in the world."""
    volume = read_image(scan)
    affine = volume.affine @ np.diag([2.0, 1, 1, 1])
    thinned = segment(Volume(volume.path, volume.array[::2], affine, volume.header))
    a, b = segment(volume)[::2] > 0, thinned > 0
    dice = 2 * (a & b).sum() / (a.sum() + b.sum())
    assert dice > 0.99  # measured 0.995: half of the columns are interpolated from the others


def test_a_run_from_another_device_can_be_loaded(small_run, tmp_path):
    """A checkpoint names the device that wrote it; a laptop must read the checkpoint of a GPU."""
    moved = tmp_path / "run"
    shutil.copytree(small_run, moved)
    notes = list(moved.rglob("_sharding"))
    assert notes
    for note in notes:
        note.write_text(note.read_text().replace("cpu:0", "cuda:0"))
    for sums in moved.rglob("*.sha256"):  # of the changed files
        checkpoint = sums.with_suffix("")
        names = json.loads(sums.read_text())
        sums.write_text(json.dumps({n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in names}))
    here, there = (nnx.state(load_run(folder).network) for folder in (small_run, moved))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True))


def test_evaluate_gives_the_scores_that_the_run_reported(small_run, phantoms, tmp_path):
    succeed(
        tmp_path, "jaxla.evaluate", f"--predictions={small_run / 'test' / 'predictions'}", f"--references={phantoms}",
        f"--cases={small_run / 'split.json'}", f"--output={tmp_path / 'scores'}",
    )  # fmt: skip
    again, reported = (
        json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "scores", small_run / "test")
    )
    for metric in ("dice", "hd95_mm", "volume_ml"):
        assert again[metric]["mean"] == pytest.approx(reported[metric]["mean"], rel=1e-12)
        assert again[metric]["n"] == reported[metric]["n"]
