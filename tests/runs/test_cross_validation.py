"""--fold=all with a frozen backbone: five runs that share prepared data and are tested together; resuming."""

import json
import re
import shutil

import numpy as np
import pytest

import jaxla
from jaxla.runs.trained import load_run
from tests.commands import refuse, succeed
from tests.runs.folders import assert_predict_reproduces_test_mask

pytestmark = pytest.mark.usefixtures("fast_compilation")

# With a fixed number of steps and a constant rate, all folds share one compiled program.
OPTIONS = (
    "--exp=quickstart", "--method=vit_mini8", "--model.backbone=frozen", "--model.decoder=linear",
    "--preprocessing.image_size=48", "--training.epochs=1", "--training.steps=3", "--training.schedule=constant",
    "--seed=1", "--fold", "all", "--postprocessing.largest=if_better",
)  # fmt: skip


def options(phantoms, folder, *extra):
    folders = (f"--data.root={phantoms}", f"--run-dir={folder}", f"--cache-dir={folder.parent / 'cache'}")
    return (*OPTIONS, *folders, *extra)


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds") / "run"
    printed = succeed(folder.parent, "jaxla.train", *options(phantoms, folder))
    (folder / "stdout.txt").write_text(printed)
    return folder


def test_data_are_prepared_once_for_all_folds(run):
    assert (run / "stdout.txt").read_text().count("reading: 6 of 6 cases") == 1


def test_each_fold_logs_its_own_lines_and_the_run_logs_all(run):
    for k in range(5):
        log = (run / f"fold_{k}" / "train.log").read_text()
        assert len(re.findall("epoch 1/1: train loss", log)) == len(re.findall("parameters are trained", log)) == 1
        assert "testing: " in log
    log = (run / "train.log").read_text()
    assert re.findall(r"fold (\d) of 5", log) == list("12345")
    assert "fold 2 of 5" not in (run / "fold_0" / "train.log").read_text()
    assert len(re.findall("epoch 1/1: train loss", log)) == 5
    assert log.count("reading: 6 of 6 cases") == 1


def test_folds_share_everything_but_their_trained_parameters(run):
    trained = load_run(run)
    assert len(trained.networks) == 5
    assert len({id(network.backbone) for network in trained.networks}) == 1
    kernels = {np.asarray(network.decoder.classifier.kernel[...]).tobytes() for network in trained.networks}
    assert len(kernels) == 5
    records = [json.loads((run / f"fold_{k}" / "experiment.json").read_text()) for k in range(5)]
    assert len({record["extent"] for record in records}) == 1
    assert len({record["backbone_sha256"] for record in records}) == 1
    for k, record in enumerate(records):  # a user can run the command of a fold
        words = record["command"].split()
        assert words.count(f"--fold={k}") == 1
        assert not {"--fold", "all"} & set(words)


def test_a_frozen_random_backbone_is_determined_by_the_seed(run):
    assert json.loads((run / "test" / "summary.json").read_text())["backbone"] == "vit_mini8 (random weights, frozen)"
    drawn = jaxla.build_network("vit_mini8", seed=1, weights="random").backbone
    loaded = jaxla.load_network(run / "fold_2").backbone
    assert np.array_equal(drawn.blocks.mlp.expand.kernel[...], loaded.blocks.mlp.expand.kernel[...])


def test_folds_validate_on_every_patient_once_and_share_the_test_patients(run):
    split = json.loads((run / "split.json").read_text())
    pool = sorted(split["train"] + split["val"])
    folds = [json.loads((run / f"fold_{k}" / "split.json").read_text()) for k in range(5)]
    assert sorted(name for fold in folds for name in fold["val"]) == pool
    assert all(fold["test"] == split["test"] for fold in folds)
    assert sorted(json.loads((run / "validation" / "largest.json").read_text())["dice"]) == pool
    assert json.loads((run / "test" / "summary.json").read_text())["dice"]["n"] == len(split["test"])


def test_report_info_and_prediction_combine_all_folds(run, phantoms, tmp_path):
    page = (run / "report.html").read_text()
    assert "5 folds of 5 patients" in page
    assert "5 patients for training and validation in turn, 1 for testing" in page
    assert 'href="fold_4/report.html"' in page
    assert "finished after 5 of 5 folds" in succeed(tmp_path, "jaxla.info", run)
    assert "best Dice 0." in succeed(tmp_path, "jaxla.info", run / "fold_2")
    with pytest.raises(jaxla.InputError, match="Pass the folder of one fold, such as fold_0"):
        jaxla.load_network(run)
    assert_predict_reproduces_test_mask(run, phantoms, tmp_path)


def test_step_memory_is_the_maximum_over_folds(run):
    steps = [json.loads((run / f"fold_{k}" / "cost.json").read_text())["step_bytes"] for k in range(5)]
    assert json.loads((run / "cost.json").read_text())["step_bytes"] == max(steps) > 0


def test_a_run_that_stopped_in_a_fold_resumes_to_identical_results(run, phantoms, tmp_path):
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "fold_4")  # as if the run had stopped after training the fourth fold, before its test
    for unfinished in (folder, folder / "fold_3"):
        shutil.rmtree(unfinished / "test")
        (unfinished / "report.html").unlink()
    resume = options(phantoms, folder, "--resume")
    assert "forecast of the first of 5 folds" in succeed(tmp_path, "jaxla.train", *resume, "--dry-run")
    finished = (folder / "fold_0" / "report.html").stat().st_mtime_ns
    succeed(tmp_path, "jaxla.train", *resume)
    assert (folder / "fold_0" / "report.html").stat().st_mtime_ns == finished
    for name in ("test/cases.csv", "fold_3/test/cases.csv", "fold_4/test/cases.csv"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_too_few_patients_for_folds_are_refused(tmp_path):
    phantoms = ("--data.root=phantom", "--data.phantom_cases=5", f"--run-dir={tmp_path / 'run'}")
    line = refuse(tmp_path, "jaxla.train", *OPTIONS, *phantoms, f"--cache-dir={tmp_path / 'cache'}")
    assert line.startswith("error: --fold=all: ")
    assert "5 training and validation patients" in line
    assert not (tmp_path / "run").exists()
