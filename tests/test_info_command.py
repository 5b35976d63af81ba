"""python -m jaxla.info: what it says of runs and weights, and what it refuses."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.pipeline.checks import checked

from jaxla.cli.command_line import parse_experiment
from jaxla.models.weights_format import save_weights
from jaxla.runs.folder import require_resumable
from jaxla.runs.machine import processor
from tests.commands import in_this_process, refuse
from tests.test_cache_command import held_by_another_process


def info(path):
    """What the command says of `path`: name -> value."""
    done = in_this_process(path.parent, "jaxla.info", path)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture
def unfinished(small_run, tmp_path):
    """The small run as it stands when it was ended before its test, with a blank in its name."""
    folder = shutil.copytree(small_run, tmp_path / "my run", ignore=shutil.ignore_patterns("report.html", "test"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    return folder


def best_of(lines):
    """Epoch and validation Dice of the best epoch among lines of metrics.jsonl."""
    history = [json.loads(line) for line in lines]
    best = max(history, key=lambda metrics: metrics["val_dice"])
    return f"best Dice {best['val_dice']:.3f} (mean per volume) in epoch {best['epoch']}"


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_told_whole(small_run, phantoms):
    summary, split = read_json(small_run / "test" / "summary.json"), read_json(small_run / "split.json")
    record = read_json(small_run / "experiment.json")
    dice, iou, atlas = (s["mean"] for s in (summary["dice"], summary["iou"], summary["atlas"]["dice"]))
    versions = record["environment"]["versions"]
    assert info(small_run) == {
        "run": str(small_run),
        "experiment": "quickstart, method vit_mini8",
        "state": "finished after 3 of at most 3 epochs",
        "validation": best_of((small_run / "metrics.jsonl").read_text().splitlines()),
        "test": f"Dice {dice:.3f}; IoU {iou:.3f} (mean per volume, n = {len(split['test'])}); atlas Dice {atlas:.3f}",
        "data": f"{phantoms}; {len(split['train'])} train, {len(split['val'])} val, {len(split['test'])} test",
        "classes": "LA: any non-zero value",
        "backbone": "vit_mini8, finetuned, random weights",
        "decoder": "convolutional",
        "input": "48 × 48 pixels",
        "seed": "1",
        "device": f"cpu: {processor()}",
        "versions": f"jaxla {versions['jaxla']}, jax {jax.__version__}, flax {versions['flax']}",
        "begun by": record["command"],
    }
    assert f"--data.root={phantoms} --run-dir={small_run}" in record["command"]


def test_an_unfinished_run_says_how_far_it_came_and_what_finishes_it(unfinished):
    said = info(unfinished)
    assert said["state"] == "ended before it was finished: 2 of at most 3 epochs are done"
    assert said["validation"] == best_of((unfinished / "metrics.jsonl").read_text().splitlines())
    assert "test" not in said

    python, *words = shlex.split(said["go on with"])
    assert python == "python"
    assert words[-2:] == [f"--run-dir={unfinished}", "--resume"]
    assert words[:2] == ["-m", "jaxla.train"]
    given = parse_experiment(words[2:], EXPERIMENTS, METHODS)
    assert given.resume
    require_resumable(given.run_dir, checked(given.experiment))  # what --resume checks of its options


def test_a_run_before_its_first_epoch(unfinished):
    (unfinished / "metrics.jsonl").unlink()
    said = info(unfinished)
    assert said["state"] == "ended before it was finished: 0 of at most 3 epochs are done"
    assert "validation" not in said


def test_a_run_in_progress_is_told_as_such_and_not_to_be_resumed(unfinished):
    hold = "from filelock import FileLock; hold = FileLock(sys.argv[1])"
    with held_by_another_process(hold, unfinished / ".lock"):
        said = info(unfinished)
    assert said["state"] == "running: 2 of at most 3 epochs are done"
    assert "go on with" not in said


def test_asking_leaves_a_run_as_it_is(unfinished):
    def contents():
        return {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}

    before = contents()
    info(unfinished)
    assert contents() == before


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    arrays = {"a.kernel": np.zeros((500, 600), np.float32), "a.bias": np.zeros(7, np.float32)}
    metadata = {"arch": "dinov2_vits14", "source": "hub.pth", "source_sha256": "ab12", "licence": "Apache-2.0"}
    save_weights(path, arrays, metadata)
    return path


def test_a_weights_file_says_what_it_holds_and_where_it_came_from(weights):
    assert info(weights) == {
        "weights": str(weights),
        "architecture": "dinov2_vits14",
        "parameters": "300007 in 2 arrays, 1.2 MB",
        "source": "hub.pth (sha256 ab12)",
        "licence": "Apache-2.0",
    }


def test_weights_that_nobody_released_say_so(tmp_path):
    metadata = {"arch": "vit_mini8", "source": "random, seed 5", "source_sha256": "", "licence": ""}
    save_weights(tmp_path / "mine.safetensors", {}, metadata)
    said = info(tmp_path / "mine.safetensors")
    assert said["source"] == "random, seed 5"
    assert said["licence"] == "none: these weights were not released by anyone"


# --- neither ---------------------------------------------------------------------------------------------------------


def of_version(folder, change):
    record = read_json(folder / "experiment.json")
    record["version"] += change
    (folder / "experiment.json").write_text(json.dumps(record))


BAD_RUNS = {
    "newer": (lambda folder: of_version(folder, 1), "written by a newer version of this package; update the"),
    "earlier": (lambda folder: of_version(folder, -1), "written by an earlier version of this package"),
    "damaged": (lambda folder: (folder / "experiment.json").write_text('{"version": 4'), "experiment.json: damaged"),
    "no record": (lambda folder: (folder / "experiment.json").unlink(), r"not a run folder \(no experiment.json\)"),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_a_folder_that_is_no_run_of_this_version(unfinished, kind):
    spoil, message = BAD_RUNS[kind]
    spoil(unfinished)
    assert re.search(f"^error: {unfinished}.*{message}", refuse(unfinished.parent, "jaxla.info", str(unfinished)))


def test_what_is_neither_a_run_nor_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    assert refuse(tmp_path, "jaxla.info", "nowhere") == (
        "error: nowhere: no such file or folder; give a run folder or a .safetensors file"
    )
    assert "error: notes.txt: truncated, or not a safetensors file" in refuse(tmp_path, "jaxla.info", "notes.txt")
    assert "required and not given: PATH" in refuse(tmp_path, "jaxla.info")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    assert "error: study: a study; give one of its runs, which lie in study/runs" in refuse(
        tmp_path, "jaxla.info", "study"
    )


# --- how it answers --------------------------------------------------------------------------------------------------


def test_it_answers_without_importing_jax(small_run, unfinished, weights):
    code = "import sys, jaxla.info\nfor path in sys.argv[1:]: jaxla.info.main([path])\nsys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, small_run, unfinished, weights], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()].count("versions") == 2
