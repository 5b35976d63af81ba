"""python -m jaxla.predict, and masks of a finished run for scans of any size and orientation."""

import csv
import hashlib
import json
import logging
import shlex
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from jaxla.cli.process import Stopped
from jaxla.data.volumes import Volume, read_image
from jaxla.inference.segment import segment_volume
from jaxla.predict import main
from jaxla.runs.trained import load_run
from tests.commands import refuse, run_module, succeed
from tests.data.nifti import edit_header


@pytest.fixture(scope="module")
def scan(phantoms):
    return phantoms / "task2" / "train_data" / "train_2" / "enhanced.nii.gz"


@pytest.fixture(scope="module")
def segment(small_run):
    """Segment a volume with the small run and return its mask."""
    segment_slices = load_run(small_run).segment
    return lambda volume: segment_volume(segment_slices, volume)[0]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def canonical_mask(path):
    """Return a mask in canonical orientation, in which the voxels of reoriented copies coincide."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def test_a_folder_of_reoriented_copies_gets_the_same_masks_and_probabilities(small_run, scan, tmp_path):
    """The command runs in a new process."""
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
    files = [f"{name}.nii.gz" for name in names]
    assert sorted(path.name for path in masks.iterdir()) == ["predictions.csv", "probabilities", *files]
    assert sorted(path.name for path in (masks / "probabilities").iterdir()) == files

    canonical = canonical_mask(masks / "scan.nii.gz")
    assert canonical.any()
    for name in names:
        assert np.array_equal(canonical_mask(masks / f"{name}.nii.gz"), canonical)
        mask, probabilities = (nib.load(folder / f"{name}.nii.gz") for folder in (masks, masks / "probabilities"))
        assert probabilities.shape == mask.shape
        assert probabilities.get_data_dtype() == np.float32
        assert np.array_equal(np.asarray(probabilities.dataobj) > 0.5, np.asarray(mask.dataobj) == 1)
        millilitres = np.count_nonzero(mask.dataobj) * np.prod(mask.header.get_zooms()) / 1000
        assert f"{masks / name}.nii.gz: LA {millilitres:.1f} ml" in done.stdout
    rows = read_csv(masks / "predictions.csv")
    measured = [{name: row[name] for name in ("voxels", "connected_parts", "slices", "touches_border")} for row in rows]
    assert measured == [measured[0]] * len(names)
    for metric, value in (("voxels", np.count_nonzero(canonical)), ("slices", canonical.any(axis=(0, 1)).sum())):
        assert measured[0][metric] == str(value)

    main([f"--run={small_run}", f"--input={scan}", f"--output={tmp_path / 'one.nii.gz'}", "--probabilities"])
    expected_files = ["one.nii.gz", "one_predictions.csv", "one_probabilities.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == expected_files
    (row,) = read_csv(tmp_path / "one_predictions.csv")
    assert {name: row[name] for name in measured[0]} == measured[0]


@pytest.fixture
def thin_scans(scan, tmp_path):
    """A folder with the scans `a`, `b` and `c`, of four slices each."""
    (tmp_path / "scans").mkdir()
    for n, name in enumerate("abc"):
        nib.save(nib.load(scan).slicer[:, :, 8 + n : 12 + n], tmp_path / "scans" / f"{name}.nii.gz")
    return tmp_path / "scans"


class StopAt(logging.Handler):
    """Raise KeyboardInterrupt when the package logs `text`, as Ctrl-C does."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def emit(self, record):
        if self.text in record.getMessage():
            raise KeyboardInterrupt


def stop_at(text, *options):
    """Run the command until it logs `text`; return the options of the resume command that it prints."""
    handler, package = StopAt(text), logging.getLogger("jaxla")
    level = package.level
    package.addHandler(handler)
    package.setLevel("INFO")
    try:
        with pytest.raises(Stopped) as stop:
            main([*options])
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
    return shlex.split(stop.value.resume_command)[3:]


def contents(folder):
    """Return file name -> content and modification time; for CSV files only the content."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() if name.endswith(".csv") else (path.read_bytes(), path.stat().st_mtime_ns)
        for name, path in files.items()
    }


def test_an_interrupted_prediction_can_be_continued_only_by_the_same_run(small_run, thin_scans, tmp_path, caplog):
    caplog.set_level("INFO", "jaxla")
    masks, run = tmp_path / "masks", f"--run={small_run}"
    options = (run, f"--input={thin_scans}", f"--output={masks}", "--probabilities")
    resume = stop_at("2/3", *options)
    assert resume == [*options, "--continue"]
    begun = contents(masks)
    assert sorted(begun) == [
        "a.nii.gz", "b.nii.gz", "predictions.unfinished.json", "probabilities/a.nii.gz", "probabilities/b.nii.gz",
    ]  # fmt: skip
    problem = f"{masks / 'a.nii.gz'}: already exists. Add --continue to keep existing masks, --overwrite to replace"
    assert problem in refuse(tmp_path, "jaxla.predict", *options)

    other = shutil.copytree(small_run, tmp_path / "other")
    record = json.loads((other / "experiment.json").read_text())
    (other / "experiment.json").write_text(json.dumps(record | {"begun": "2026-01-01T00:00:00+00:00"}))
    line = refuse(tmp_path, "jaxla.predict", f"--run={other}", *resume[1:])
    assert f"predictions.unfinished.json: written by {run}, epoch" in line

    alone = (run, f"--input={thin_scans / 'c.nii.gz'}", f"--output={masks}")
    line = refuse(tmp_path, "jaxla.predict", *alone)
    assert "predictions.unfinished.json: the command that wrote the mask of a was interrupted. Run it again" in line

    (masks / "probabilities" / "b.nii.gz").unlink()  # so `b` is incomplete
    (masks / f".{'0' * 32}.c.nii.gz").write_text("half a mask, left by SIGKILL")
    main(resume)
    finished = contents(masks)
    assert {name: finished[name] for name in ("a.nii.gz", "probabilities/a.nii.gz")}.items() <= begun.items()
    assert f"{masks / 'a.nii.gz'}: kept; LA " in caplog.text
    main([*options[:2], f"--output={tmp_path / 'uninterrupted'}", "--probabilities"])
    expected = contents(tmp_path / "uninterrupted")
    assert finished.keys() == expected.keys()
    assert finished["predictions.csv"] == expected["predictions.csv"]
    assert all(finished[name][0] == expected[name][0] for name in finished if name != "predictions.csv")
    line = refuse(tmp_path, "jaxla.predict", f"--run={other}", *resume[1:])
    assert f"{masks / 'a.nii.gz'}: not written by --run={other}" in line


def test_overwrite_replaces_masks_and_keeps_the_rows_of_other_cases(small_run, thin_scans, tmp_path):
    masks = tmp_path / "masks"
    for name in "ab":  # one command per scan, into the same folder
        main([f"--run={small_run}", f"--input={thin_scans / f'{name}.nii.gz'}", f"--output={masks}"])
    rows = read_csv(masks / "predictions.csv")
    assert [row["case"] for row in rows] == ["a", "b"]
    nib.save(nib.load(thin_scans / "c.nii.gz"), thin_scans / "b.nii.gz")
    options = (f"--run={small_run}", f"--input={thin_scans / 'b.nii.gz'}", f"--output={masks}", "--overwrite")
    stop_at("1/1", *options)
    assert [row["case"] for row in read_csv(masks / "predictions.csv")] == ["a"]
    line = refuse(tmp_path, "jaxla.predict", *options[:3], "--continue")
    assert "predictions.unfinished.json: --overwrite was interrupted, so some masks are new and some are not" in line
    main(options)
    again = read_csv(masks / "predictions.csv")
    assert [row["case"] for row in again] == ["a", "b"]
    assert again[0] == rows[0]
    assert again[1]["voxels"] == str(np.count_nonzero(nib.load(masks / "b.nii.gz").dataobj)) != rows[1]["voxels"]


def test_masks_on_another_grid_or_not_written_by_predict_are_not_kept(small_run, thin_scans, tmp_path):
    options = (f"--run={small_run}", f"--input={thin_scans / 'a.nii.gz'}", f"--output={tmp_path / 'a.nii.gz'}")
    shutil.copy(thin_scans / "b.nii.gz", tmp_path / "a.nii.gz")
    for more in ([], ["--continue"], ["--overwrite"]):
        assert refuse(tmp_path, "jaxla.predict", *options, *more) == (
            f"error: {tmp_path / 'a.nii.gz'}: already exists, and a_predictions.csv does not list it as written by "
            "predict. Use another --output."
        )
    assert "--continue: contradicts --overwrite" in refuse(
        tmp_path, "jaxla.predict", *options, "--continue", "--overwrite"
    )
    (tmp_path / "a.nii.gz").unlink()
    main([*options])
    assert "a.nii.gz: already exists. Add --continue" in refuse(tmp_path, "jaxla.predict", *options)
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    assert "a.nii.gz: not on the grid of" in refuse(tmp_path, "jaxla.predict", *options, "--continue")
    (tmp_path / "a_predictions.csv").write_text("name,size\na,1\n")
    assert "a_predictions.csv: not a table of predictions (no column case)" in refuse(
        tmp_path, "jaxla.predict", *options, "--overwrite"
    )


def test_overwrite_leaves_no_probabilities_of_earlier_masks(small_run, thin_scans, tmp_path):
    options = (f"--run={small_run}", f"--input={thin_scans / 'b.nii.gz'}", f"--output={tmp_path / 'masks'}")
    main([*options, "--probabilities"])
    line = refuse(tmp_path, "jaxla.predict", *options, "--overwrite")
    assert "masks/probabilities/b.nii.gz: would not match the new mask that --overwrite writes" in line


def test_scans_of_the_run_are_recognised_by_their_voxels_and_unusual_scans_are_reported(
    small_run, phantoms, hippocampus, tmp_path
):
    split = json.loads((small_run / "split.json").read_text())
    scans = tmp_path / "scans"
    scans.mkdir()
    for new, case in (("p", split["train"][0]), ("q", split["val"][0]), ("r", split["test"][0])):
        shutil.copy(phantoms / "task2" / "train_data" / case / "enhanced.nii.gz", scans / f"{new}.nii.gz")
    for new in (split["train"][0], "s"):
        shutil.copy(hippocampus / "imagesTr" / "hippocampus_004.nii.gz", scans / f"{new}.nii.gz")
    printed = succeed(tmp_path, "jaxla.predict", f"--run={small_run}", "--input=scans", "--output=masks")
    rows = {row["case"]: row for row in read_csv(tmp_path / "masks" / "predictions.csv")}
    assert {case: row["part_of_run"] for case, row in rows.items()} == {
        "p": "training", "q": "validation", "r": "test", "s": "", split["train"][0]: "training (same name)",
    }  # fmt: skip
    unlike = "spacing 1 × 1 × 1 mm (training: 2.5 × 0.625 × 0.625 mm); size 38 × 52 × 36 mm (training: "
    for case, row in rows.items():
        is_unlike = case not in "pqr"
        line = f"scans/{case}.nii.gz: unlike the training scans, so its mask may be wrong: {unlike}"
        assert (line in printed) == is_unlike
        assert row["unlike_training_scans"].startswith(unlike) if is_unlike else not row["unlike_training_scans"]
    assert "scans/p.nii.gz: this run used it for training" in printed
    epoch = json.loads((small_run / "test" / "summary.json").read_text())["best_epoch"]
    assert {(row["run"], row["epoch"]) for row in rows.values()} == {(str(small_run), str(epoch))}


def test_an_unfinished_run_is_used_with_a_note(small_run, scan, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / "report.html").unlink()
    (run / "scans.json").unlink()  # as in runs of earlier versions
    printed = succeed(tmp_path, "jaxla.predict", f"--run={run}", f"--input={scan}", "--output=mask.nii.gz")
    epoch = json.loads((small_run / "test" / "summary.json").read_text())["best_epoch"]
    note = f"{run}: this run of at most 3 epochs is not finished; using its best epoch so far, {epoch}"
    assert note in printed.splitlines()
    assert printed.count("the run did not record its training scans, so scans are not compared with them") == 1
    assert (tmp_path / "mask.nii.gz").exists()


@pytest.mark.parametrize("existing", ["masks/two.nii.gz", "masks/probabilities/one.nii.gz"])
def test_existing_masks_are_kept(small_run, scan, tmp_path, existing):
    (tmp_path / "scans").mkdir()
    (tmp_path / existing).parent.mkdir(parents=True)
    for name in ("one.nii.gz", "two_0000.nii.gz"):
        shutil.copy(scan, tmp_path / "scans" / name)
    (tmp_path / existing).write_text("a mask")
    options = (f"--run={small_run}", "--input=scans", "--output=masks", "--probabilities")
    assert refuse(tmp_path, "jaxla.predict", *options) == (
        f"error: {existing}: already exists, and predictions.csv does not list it as written by predict. "
        "Use another --output."
    )


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
    """Dropping every other column, which doubles one spacing, keeps the mask's position in world coordinates."""
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
    for checksums in moved.rglob("*.sha256"):
        checkpoint = checksums.with_suffix("")
        files = json.loads(checksums.read_text())
        checksums.write_text(json.dumps({n: hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() for n in files}))
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
