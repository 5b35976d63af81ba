"""--fold=all with a method on a frozen backbone: five runs, tested together; ended on the way, and gone on with."""

import json
import shutil

import numpy as np
import pytest
from jaxla.inference.trained import load_run

from tests.commands import in_this_process, refuse

OPTIONS = (
    "--exp=quickstart", "--model.backbone=frozen", "--preprocessing.image_size=32", "--training.epochs=1",
    "--training.batch_size=16", "--fold", "all",
)  # fmt: skip


def options(phantoms, folder, *more):
    return (*OPTIONS, f"--data.root={phantoms}", f"--run-dir={folder}", f"--cache-dir={folder.parent / 'cache'}", *more)


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds") / "run"
    done = in_this_process(folder.parent, "jaxla.train", *options(phantoms, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_folds_share_all_but_what_they_trained(run):
    trained = load_run(run)
    assert len(trained.networks) == 5
    assert len({id(network.backbone) for network in trained.networks}) == 1
    kernels = {np.asarray(network.decoder.logits.kernel[...]).tobytes() for network in trained.networks}
    assert len(kernels) == 5
    records = [json.loads((run / f"fold_{k}" / "experiment.json").read_text()) for k in range(5)]
    assert len({record["extent"] for record in records}) == 1
    assert len({record["weights_sha256"] for record in records}) == 1
    for k, record in enumerate(records):  # a command that a user may run again
        words = record["command"].split()
        assert words.count(f"--fold={k}") == 1
        assert not {"--fold", "all"} & set(words)


def test_what_a_step_took_is_the_most_of_any_fold(run):
    steps = [json.loads((run / f"fold_{k}" / "cost.json").read_text())["step_bytes"] for k in range(5)]
    assert json.loads((run / "cost.json").read_text())["step_bytes"] == max(steps) > 0


def test_a_run_that_was_ended_in_a_fold_goes_on_to_the_same_result(run, phantoms, tmp_path):
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "fold_4")  # not begun; the fourth before its test, after all of its training
    for place in (folder, folder / "fold_3"):
        shutil.rmtree(place / "test")
        (place / "report.html").unlink()
    again = options(phantoms, folder, "--resume")
    said = in_this_process(tmp_path, "jaxla.train", *again, "--dry-run")
    assert said.returncode == 0, said.stderr
    assert "the first of 5 folds" in said.stdout
    kept = (folder / "fold_0" / "report.html").stat().st_mtime_ns
    done = in_this_process(tmp_path, "jaxla.train", *again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "fold_0" / "report.html").stat().st_mtime_ns == kept
    for name in ("test/cases.csv", "fold_3/test/cases.csv", "fold_4/test/cases.csv"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_too_few_patients_for_folds_leave_nothing(tmp_path):
    more = ("--data.root=phantom", "--data.phantom_cases=5", f"--run-dir={tmp_path / 'run'}")
    said = refuse(tmp_path, "jaxla.train", *OPTIONS, *more, f"--cache-dir={tmp_path / 'cache'}")
    assert "--fold=all: needs at least 5 training and validation patients, but there are 4" in said
    assert not (tmp_path / "run").exists()
