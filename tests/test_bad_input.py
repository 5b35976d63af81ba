"""Commands refuse bad input with exit code 2 and one line that names the file or option, and leave nothing behind."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jaxla.experiments import EXPERIMENTS

from jaxla.config import Data
from jaxla.data.cases import find_cases
from jaxla.data.labels import Labels
from jaxla.data.prepared import prepare_cases
from jaxla.data.split import make_split
from jaxla.runs.record import Record, write_record
from tests.commands import refuse, refuse_to_train, run_in_new_process
from tests.data.nifti import (
    image_array,
    image_with_voxel,
    mask_array,
    save,
    save_raw_spacing,
    truncate,
    write_decathlon,
    write_flat_pairs,
    write_lascarqs,
)
from tests.training.faults import limit_memory


def run_with_default_cache(folder, module, *options):
    """Run a command in a new process, with the default cache folder inside `folder`."""
    return run_in_new_process(folder, module, *options, XDG_CACHE_HOME=str(folder / "cache"))


BAD_SCANS = {  # examples; tests/data/test_volumes.py has every kind
    "4d.nii.gz": (lambda p: save(p, np.stack([image_array()] * 2, -1)), "4D"),
    "nan.nii.gz": (lambda p: save(p, image_with_voxel(np.nan)), "NaN"),
    "constant.nii.gz": (lambda p: save(p, np.full_like(image_array(), 7)), "every voxel is 7"),
    "cut.nii.gz": (lambda p: truncate(save(p, image_array())), "truncated"),
    "text.nii": (lambda p: p.write_text("no scan " * 99), "not a NIfTI"),
    "zero_spacing.nii": (lambda p: save_raw_spacing(p, (0, 0.75, 2.5)), r"spacing \[0.0, 0.75, 2.5\]"),
}

# --- scans and masks that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_SCANS)
def test_training_refuses_a_scan_that_cannot_be_used(tmp_path, name):
    root = write_flat_pairs(tmp_path / "data")
    (root / "case_2.nii.gz").unlink()
    path = root / f"case_2.{name.split('.', 1)[1]}"
    make, message = BAD_SCANS[name]
    make(path)
    assert re.search(f"^error: {path}: .*{message}", refuse_to_train(tmp_path))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--model.windows=40"],
            r"\S+/data/\w+.nii.gz: has [45] slices, fewer than the 40 windows along the slices\. Use",
        ),
        (["--model.windows=1x1x9"], r"--preprocessing.image_size=64: 8x8 patches are too few for 1x9 windows\. Use"),
        (["--model.windows=two"], r"--model.windows=two: not a number of windows\. Use 2 for two along the slices"),
        (["--preprocessing.image_size=4"], r"--preprocessing.image_size=4: not a multiple of the patch size 8 of vit"),
        (["--data.other_labels=background"], r"--data.other_labels=background: --data.labels is missing\. List the"),
        (["--method=vit_mini8", "--training.gradient=two_pass"], r"--training.gradient: method vit_mini8 has no such"),
        (
            ["--method=vit_mini8", "--model.windows=2"],
            r"--model.windows: method vit_mini8 has no such option; windows_",
        ),
    ],
)
def test_training_refuses_windows_that_do_not_fit(tmp_path, options, line):
    write_flat_pairs(tmp_path / "data")
    assert re.search(f"^error: {line}", refuse_to_train(tmp_path, "--method=windows_vit_mini8", *options))


def test_unknown_labels_are_refused_unless_the_experiment_makes_them_background(tmp_path):
    """In neonatal brains the structure is one of many labels."""
    root, mask = write_flat_pairs(tmp_path / "data", 5), mask_array()
    mask[-1, -1, -1] = 7
    save(root / "case_1_mask.nii.gz", mask)
    options = ("--method=windows_vit_mini8", "--data.labels=hippocampus:1")
    assert "label values 7 are not among the classes (hippocampus: 1)" in refuse_to_train(tmp_path, *options)
    protocol = replace(EXPERIMENTS["paper3_albert"].data, labels="hippocampus:1")
    volumes = prepare_cases(find_cases(root, protocol.all_labels), tmp_path / "cache of albert")
    assert {v.class_voxels[1] for v in volumes} == {int((mask_array() == 1).sum())}


@pytest.mark.parametrize("name", BAD_SCANS)
def test_prediction_refuses_a_scan_that_cannot_be_used(tmp_path, run_folder, name):
    make, message = BAD_SCANS[name]
    save(tmp_path / "scans" / "a_good_scan.nii.gz", image_array())
    make(tmp_path / "scans" / name)
    run = shutil.copytree(run_folder, tmp_path / "run")
    line = refuse(tmp_path, "jaxla.predict", f"--run={run}", "--input=scans", "--output=masks")
    assert re.search(f"^error: scans/{name}: .*{message}", line)


def give_mask_another_shape(root):
    return save(root / "case_2_mask.nii.gz", mask_array(shape=(16, 14, 5)))


def give_mask_another_affine(root):
    return save(root / "case_2_mask.nii.gz", mask_array(), np.diag([-1, -1, 2.5, 1]))


def remove_mask(root):
    (root / "case_2_mask.nii.gz").unlink()
    return root / "case_2.nii.gz"


def remove_image(root):
    (root / "case_2.nii.gz").unlink()
    return root / "case_2_mask.nii.gz"


def save_fractional_mask(root):
    return save(root / "case_2_mask.nii.gz", mask_array().astype(np.float32) / 2)


def truncate_mask(root):
    (root / "case_2_mask.nii.gz").unlink()
    return truncate(save(root / "case_2_mask.nii", mask_array()))


def duplicate_image(root):
    return Path(shutil.copy(root / "case_0.nii.gz", root / "case_2.nii.gz"))


def save_unknown_label(root):
    return save(root / "case_2_mask.nii.gz", mask_array(value=3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_mask, "has no mask"),
        (remove_image, "has no image"),
        (
            give_mask_another_shape,
            r"not on the grid of .*case_2.nii.gz \(shape \(16, 14, 5\) instead of \(16, 14, 4\)\)",
        ),
        (
            give_mask_another_affine,
            r"not on the grid of .*case_2.nii.gz \(same shape, different affine: ",
        ),
        (save_fractional_mask, "holds the value 0.5, which is not a label"),
        (truncate_mask, "truncated"),
        (save_unknown_label, r"label values 3 are not among the classes \(LA: 1\)"),
        (duplicate_image, "the same image as case case_0"),
    ],
)
def test_training_refuses_cases_that_do_not_fit_together(tmp_path, spoil, message):
    path = spoil(write_flat_pairs(tmp_path / "data"))
    line = refuse_to_train(tmp_path, "--data.labels=LA:1")
    assert re.search(f"^error: {path}: .*{message}", line)


def test_training_refuses_values_that_dataset_json_does_not_name(tmp_path):
    names = [f"a_{n}" for n in range(5)]
    write_decathlon(tmp_path / "data", names, {"background": 0, "LA": 1}, "_0000", values=(1, 2))
    line = refuse_to_train(tmp_path)
    assert re.search(
        rf"^error: {tmp_path}/data/labelsTr/a_0.nii.gz: label values 2 are not among the classes \(LA: 1\)", line
    )


def test_training_refuses_masks_that_are_all_empty(tmp_path):
    write_lascarqs(tmp_path / "data", 5, value=0)
    line = refuse_to_train(tmp_path)
    assert re.search(f"^error: {tmp_path}/data: none of the 3 training cases contains LA. ", line)


def test_training_refuses_a_subset_without_a_class_that_other_patients_have(tmp_path):
    folder = write_lascarqs(tmp_path / "data", 8)
    (first,) = make_split([path.name for path in folder.iterdir()], Data(train_patients=1)).train
    save(folder / first / "atriumSegImgMO.nii.gz", mask_array(value=0))
    assert refuse_to_train(tmp_path, "--data.train_patients=1") == (
        f"error: --data.subset_seed=0: no training case contains LA among the 1 that this protocol uses ({first}). "
        "Use another seed, or more training patients."
    )


@pytest.mark.parametrize("fold", ["all", "2"])
def test_a_fold_whose_training_cases_lack_a_class_is_refused_before_any_fold_begins(tmp_path, fold):
    """Only the validation patients of fold 2 have the class."""
    folder = write_flat_pairs(tmp_path / "data", 12)
    names = [path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz") if "mask" not in path.name]
    for name in make_split(names, Data(), "2").val:
        mask = mask_array()
        mask[0, 0, 0] = 2
        save(folder / f"{name}_mask.nii.gz", mask)
    assert refuse_to_train(tmp_path, "--data.labels=LA:1;scar:2", f"--fold={fold}") == (
        "error: fold 2: no training case contains scar; every case with scar is in the validation set. "
        "Use another --fold."
    )


@pytest.mark.parametrize("module", ["jaxla.train", "jaxla.predict"])
def test_a_folder_without_any_case_is_named(tmp_path, module):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no scans")
    if module == "jaxla.train":
        line = refuse_to_train(tmp_path)
        for layout in (f"{tmp_path / 'data'}: no case found", "LAScarQS", "dataset.json", "flat pairs"):
            assert layout in line
    else:
        line = refuse(tmp_path, module, "--run=run", "--input=data", "--output=masks")
        assert "--input=data: no image to segment; the folder holds no scan. " in line


def test_training_refuses_fewer_patients_than_the_protocol_needs(tmp_path):
    write_flat_pairs(tmp_path / "data", 5)
    line = refuse_to_train(tmp_path, "--exp=fewshot_10patients", "--method=vit_mini8")
    assert "--data.train_patients=10: there are only 3 training patients (of 5 cases" in line
    for n in (2, 3, 4):
        for path in (tmp_path / "data").glob(f"case_{n}*"):
            path.unlink()
    assert "--data.root: holds 2 patients, but training, validation and test need at least 3" in refuse_to_train(
        tmp_path
    )


def test_training_refuses_a_batch_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    write_flat_pairs(tmp_path / "data", 5)
    limit_memory(monkeypatch, 2_000_000)
    options = ("--model.widths=[8,8]", "--preprocessing.image_size=32", "--training.batch_size=99")
    line = refuse_to_train(tmp_path, "--method=unet", *options)
    problem = r"a training step needs \S+, but the device has 2\.00MB\. Start a new run"
    assert re.search(f"^error: --training.batch_size=99: {problem}", line)
    monkeypatch.undo()
    for too_large in (
        "--preprocessing.image_size=99999",
        "--training.batch_size=999999999",
    ):  # the images alone do not fit
        line = refuse_to_train(tmp_path, "--method=unet", "--model.widths=[8,8]", too_large)
        assert re.search(r"^error: --training.batch_size=\d+: a training step needs .*, but the device has", line)


def test_training_never_overwrites_a_run(tmp_path, run_folder):
    write_flat_pairs(tmp_path / "data", 5)
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert f"--run-dir={run}: holds an unfinished run. Add --resume to continue it" in refuse_to_train(tmp_path)
    (run / "report.html").touch()
    assert f"--run-dir={run}: holds a finished run. Use another folder." in refuse_to_train(tmp_path)


# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that stopped before its first checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    text = dict.fromkeys(
        ("label", "network", "input", "unit", "weights_sha256", "split_sha256", "data_sha256", "command", "begun"), ""
    )
    environment = {"device": "cpu: cpu", "versions": {}}
    write_record(
        folder,
        Record(EXPERIMENTS["quickstart"], labels=Labels(("LA",)), weights="random", environment=environment, **text),
    )
    return folder


@pytest.fixture
def scan_and_run(tmp_path, run_folder):
    """A folder with `scan.nii.gz` and `run`."""
    save(tmp_path / "scan.nii.gz", image_array())
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=nowhere"], "nowhere: not a run folder"),
        (["--run=scan.nii.gz"], "scan.nii.gz: not a run folder"),
        (["--run=run"], "run: no checkpoint"),
        (["--input=nowhere.nii.gz"], "--input=nowhere.nii.gz: no such file or folder"),
        (["--input=.", "--data.image=*/lge"], r"--input=\.: no image to segment; the folder holds 1 .nii.gz file"),
        (["--output=scan.nii.gz"], "scan.nii.gz: already exists, and scan_predictions.csv does not list"),
        (["--output=scan.nii.gz", "--overwrite"], "scan.nii.gz: already exists, .* Use another --output."),
        (["--output=scan.nii.gz/below"], "--output=scan.nii.gz/below: .*/scan.nii.gz is not a writable folder"),
        (["--output=."], r"--output=\.: masks would be among the scans of --input=scan.nii.gz"),
        (["--input=.", "--output=./masks"], r"--output=masks: masks would be among the scans of --input=\."),
        (["--input=.", "--output=mask.nii.gz"], "--output=mask.nii.gz: a file, but --input=. is a folder"),
        (["--input=run/experiment.json"], "experiment.json: not a NIfTI file"),
        (["--probability"], r"--probability: unknown option \(did you mean --probabilities\?\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_prediction_names_the_faulty_option_or_file(scan_and_run, options, message):
    """The options of a row override the defaults."""
    defaults = ("--run=run", "--input=scan.nii.gz", "--output=mask.nii.gz")
    assert re.search(f"^error: .*{message}", refuse(scan_and_run, "jaxla.predict", *defaults, *options))


@pytest.mark.parametrize("missing", ["run", "input", "output"])
def test_prediction_names_a_missing_option(scan_and_run, missing):
    given = {"run": "run", "input": "scan.nii.gz", "output": "mask.nii.gz"}
    options = [f"--{option}={value}" for option, value in given.items() if option != missing]
    assert re.search(rf"^error: .*\b{missing}\b", refuse(scan_and_run, "jaxla.predict", *options))


def test_prediction_names_a_damaged_record(scan_and_run):
    (scan_and_run / "run" / "experiment.json").write_text('{"version": 5}')
    options = ("--run=run", "--input=scan.nii.gz", "--output=mask.nii.gz")
    assert "run/experiment.json: damaged" in refuse(scan_and_run, "jaxla.predict", *options)


# --- in a new process ------------------------------------------------------------------------------------------------


def spoil_case_2(name):
    """Return a function that replaces case_2 by a bad scan."""

    def spoil(root):
        (root / "case_2.nii.gz").unlink()
        BAD_SCANS[name][0](root / f"case_2.{name.split('.', 1)[1]}")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (spoil_case_2("nan.nii.gz"), [], "data/case_2.nii.gz: 1 of 896 voxels are NaN or infinite. "),
        (write_flat_pairs, ["--training.epoch=3"], "error: --training.epoch: unknown option"),
    ],
)
def test_a_user_who_trains_sees_one_line(tmp_path, spoil, options, message):
    spoil(write_flat_pairs(tmp_path / "data"))
    assert message in refuse_to_train(tmp_path, *options, run=run_with_default_cache)


def test_a_user_who_predicts_sees_one_line(scan_and_run):
    truncate(save(scan_and_run / "cut.nii", image_array()))
    options = ("--run=run", "--input=cut.nii", "--output=mask.nii.gz")
    assert "cut.nii: truncated or damaged" in refuse(
        scan_and_run, "jaxla.predict", *options, run=run_with_default_cache
    )
