"""--training.minutes: the number of steps that fit into the time is chosen once and recorded."""

import re
import shutil

import pytest

from jaxla.config import Training
from jaxla.runs.speed import Speed, fit_to_minutes, measuring_seconds
from tests.commands import refuse, refuse_to_train, succeed
from tests.runs.folders import assert_predict_reproduces_test_mask, read_json, train

pytestmark = pytest.mark.usefixtures("fast_compilation")

OPTIONS = (
    "--exp=laptop", "--model.widths=[4,8]", "--preprocessing.image_size=32", "--training.epochs=2",
    "--training.minutes=0.02", "--training.learning_rate=0.01",
)  # fmt: skip


SPEED = Speed(
    trained=0, checkpoint_bytes=0, step_bytes=0, steps=20, compile_seconds=9.0, step_seconds=0.5,
    batch_seconds=0.1, validation_seconds=3.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """A finished run and what it printed."""
    return train(tmp_path_factory.mktemp("minutes"), phantoms, *OPTIONS)


def test_the_number_of_steps_is_recorded_and_used(trained):
    run, printed = trained
    record = read_json(run / "experiment.json")
    assert record["fitted_epochs"] == 2
    assert record["fitted_steps"] >= 1
    assert f"0.02 minutes: 2 epochs of {record['fitted_steps']} step" in printed
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert read_json(run / "test" / "summary.json")["best_epoch"] == 2
    assert "finished" in succeed(run.parent, "jaxla.info", run)


def test_none_of_a_few_patients_are_used_for_validation(trained):
    run, printed = trained
    assert {part: len(ids) for part, ids in read_json(run / "split.json").items()} == {"train": 5, "val": 0, "test": 1}
    assert "val loss" not in printed
    assert "val_loss" not in (run / "metrics.jsonl").read_text()
    assert "no validation cases; epoch 2 is the last" in succeed(run.parent, "jaxla.info", run)
    page = (run / "report.html").read_text()
    assert "was tested. No validation cases." in " ".join(page.split())
    assert "the best one on the training cases" in page
    assert "Only the largest connected component of LA is kept." in page


def test_a_run_with_too_little_time_for_an_update_leaves_no_folder(phantoms, tmp_path):
    options = (*OPTIONS, "--training.accumulated_steps=50000", f"--data.root={phantoms}", f"--run-dir={tmp_path}/run")
    line = refuse(tmp_path, "jaxla.train", *options)
    problem = r"--training.accumulated_steps=50000: more than the \d+ steps of this run"
    assert re.fullmatch(rf"error: {problem}\. Use fewer, or train longer\.", line)


def test_a_resumed_run_uses_the_recorded_number_of_steps(trained, phantoms, tmp_path):
    run, _ = trained
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    resumed = shutil.copytree(run, tmp_path / "run")
    (resumed / "report.html").unlink()
    shutil.rmtree(resumed / "test")
    _, printed = train(tmp_path, phantoms, *OPTIONS, "--resume")
    steps = read_json(run / "experiment.json")["fitted_steps"]
    assert f"0.02 minutes: 2 epochs of {steps} step" in printed
    assert (resumed / "test" / "cases.csv").read_bytes() == (run / "test" / "cases.csv").read_bytes()


def test_predict_reproduces_the_test_mask(trained, phantoms, tmp_path):
    run, _ = trained
    assert_predict_reproduces_test_mask(run, phantoms, tmp_path)


@pytest.mark.parametrize(
    ("minutes", "epochs", "steps"),
    [
        (10, 10, 114),  # (60 s - 3 s) / 0.5 s
        (1, 4, 24),  # four validations take 12 s, 20 % of the time; (15 s - 3 s) / 0.5 s
        (0.01, 1, 1),
    ],
)
def test_validation_takes_at_most_20_percent_of_the_time(minutes, epochs, steps):
    fitted = fit_to_minutes(Training(epochs=10, minutes=minutes), SPEED)
    assert (fitted.epochs, fitted.steps) == (epochs, steps)


def test_without_validation_all_time_is_spent_on_steps():
    fitted = fit_to_minutes(Training(epochs=10, minutes=1), SPEED._replace(validation_seconds=0.0))
    assert (fitted.epochs, fitted.steps) == (10, 12)


def test_a_forecast_includes_the_time_for_measuring_steps():
    """The timed steps take at most five seconds."""
    assert [measuring_seconds(Training(minutes=minutes)) for minutes in (0, 0.05, 10)] == [0.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--training.minutes=-1"], "--training.minutes=-1.0: less than 0, or not finite. Use 0 or more."),
        (
            ["--training.minutes=1", "--training.steps=5"],
            "--training.steps=5: has no effect, because --training.minutes=1 sets the number of steps. Remove "
            "one of the two.",
        ),
        (
            ["--training.average_decay=1"],
            "--training.average_decay=1.0: must be at least 0 and less than 1. Use 0.99, or 0 to turn it off.",
        ),
        (
            ["--training.foreground_fraction=1"],
            "--training.foreground_fraction=1.0: must be at least 0 and less than 1. Use 0.5, for example, or 0 to "
            "turn it off.",
        ),
        (
            ["--method=windows_vit_mini8", "--training.foreground_fraction=0.5"],
            "--training.foreground_fraction=0.5: has no effect, because windows_vit_mini8 does not train on single "
            "slices. Remove the option.",
        ),
        (
            ["--training.false_negative_weight=1"],
            "--training.false_negative_weight=1.0: must be above 0 and below 1. Use 0.7, for example, or 0.5 for Dice.",
        ),
        (
            ["--training.false_negative_weight=0.7"],
            "--training.false_negative_weight=0.7: has no effect, because --training.loss=cross_entropy does not use "
            "it. Use --training.loss=dice_cross_entropy, or remove the option.",
        ),
        (
            ["--method=nnunet_2d", "--training.minutes=5"],
            "--training.minutes=5: cannot be used with nnunet_2d, whose number of validation batches follows from "
            "--training.steps. Use --training.epochs and --training.steps.",
        ),
        (
            ["--method=nnunet_2d", "--training.weight_decay=0.1"],
            "--training.weight_decay=0.1: has no effect, because --training.optimiser=sgd uses a fixed value. Remove "
            "one of the two.",
        ),
    ],
)
def test_contradictory_options_are_refused(tmp_path, options, line):
    assert refuse_to_train(tmp_path, *options) == f"error: {line}"
