"""--data.split=all: runs that use every patient for training, without validation or test."""

import json

import numpy as np
import pytest

from tests.commands import run_in_this_process, succeed
from tests.runs.folders import predict, read_json, scan_file, train

pytestmark = pytest.mark.usefixtures("fast_compilation")

LAPTOP = (
    "--exp=laptop", "--model.widths=[4,8]", "--preprocessing.image_size=32", "--training.epochs=2",
    "--training.minutes=0", "--training.steps=2", "--data.split=all",
)  # fmt: skip
WINDOWS = (
    "--exp=paper3_left_atrium", "--model.arch=vit_mini8", "--model.weights=random", "--preprocessing.image_size=48",
    "--model.windows=2x2x2", "--model.decoder_widths=[16,8,8,8]", "--training.epochs=1", "--training.checkpoint=last",
    "--training.patience=0", "--data.split=all",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    run, printed = train(folder, phantoms, *LAPTOP)
    (folder / "printed.txt").write_text(printed)
    return run


def test_output_and_report_state_that_nothing_was_tested(run):
    printed = (run.parent / "printed.txt").read_text()
    assert "patients: 6 training, 0 validation, 0 test" in printed
    assert "unet_small (random weights, trained): trained; no test cases. To test, segment" in printed
    assert read_json(run / "test" / "summary.json").keys() == {"best_epoch", "backbone"}
    assert [path.name for path in (run / "test").iterdir()] == ["summary.json"]
    assert len(read_json(run / "cost.json")["inference_seconds"]) >= 1
    page = (run / "report.html").read_text()
    assert "<b>No test cases:</b>" in page
    assert "Test Dice" not in page
    facts = succeed(run.parent, "jaxla.info", run)
    assert "finished after 2 of at most 2 epochs" in facts
    assert "no test cases" in facts
    assert "no validation cases; epoch 2 is the last" in facts
    assert "6 train, 0 val, 0 test" in facts


def test_the_network_segments_scans(run, phantoms, tmp_path):
    predict(run, scan_file(phantoms, "train_1"), tmp_path / "mask.nii.gz")
    assert (tmp_path / "mask.nii.gz").exists()


def test_evaluate_refuses_a_split_without_test_cases(run, phantoms, tmp_path):
    (tmp_path / "masks").mkdir()
    predict(run, scan_file(phantoms, "train_1"), tmp_path / "masks" / "train_1.nii.gz")
    options = ("--predictions=masks", f"--references={phantoms}", "--output=scores", f"--cases={run / 'split.json'}")
    done = run_in_this_process(tmp_path, "jaxla.evaluate", *options)
    assert (done.returncode, done.stderr) == (
        2, f"error: --cases={run / 'split.json'}: lists no test cases. Remove --cases to score every prediction.\n",
    )  # fmt: skip


def test_a_dry_run_needs_neither_validation_nor_test(phantoms, tmp_path):
    folders = (f"--data.root={phantoms}", f"--cache-dir={tmp_path}")
    printed = succeed(tmp_path, "jaxla.train", *LAPTOP, *folders, "--dry-run")
    assert "6 train, 0 val, 0 test" in printed
    assert "; test " in printed


def test_training_on_whole_volumes_works_without_validation(phantoms, tmp_path):
    run, _ = train(tmp_path, phantoms, *WINDOWS)
    (line,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert np.isfinite(line["train_loss"])
    assert "val_loss" not in line


@pytest.fixture(scope="module")
def folds(phantoms, tmp_path_factory):
    """A run of five folds with a time limit, and its output. At a constant rate, the folds share compiled programs."""
    options = [word for word in LAPTOP if not word.startswith("--training.steps=")]
    options += ["--fold=all", "--training.minutes=0.0001", "--training.schedule=constant"]
    return train(tmp_path_factory.mktemp("folds"), phantoms, *options)


def test_five_folds_validate_every_patient_once(folds):
    run, printed = folds
    validated = [name for k in range(5) for name in read_json(run / f"fold_{k}" / "split.json")["val"]]
    assert sorted(validated) == sorted(read_json(run / "split.json")["train"])
    assert "no test cases" in printed
    assert "val loss" in printed
    page = (run / "report.html").read_text()
    assert page.count("<td>–</td>") == 10  # test Dice and IoU of each fold


def test_the_warning_about_a_too_short_time_limit_states_the_time_of_one_epoch(folds):
    run, printed = folds
    line = "--training.minutes=0.0001: too short for one pass over the training data, which takes "
    assert printed.count(line) == 5
    assert printed.count("0.0001 minutes: 1 epoch of 1 step") == 5
    for k in range(5):
        record = read_json(run / f"fold_{k}" / "experiment.json")
        assert (record["fitted_epochs"], record["fitted_steps"]) == (1, 1)
