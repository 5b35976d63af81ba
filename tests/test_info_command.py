"""python -m jaxla.info: facts about runs and weights, and refused paths."""

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
from safetensors.numpy import save_file

from jaxla.cli.command_line import parse_experiment
from jaxla.models.weights_format import save_weights
from jaxla.runs.checks import check_experiment
from jaxla.runs.folder import require_resumable
from jaxla.runs.machine import processor
from tests.commands import hold_in_another_process, refuse, run_in_this_process


def info(path):
    """Return the facts that the command prints about `path`, by name."""
    done = run_in_this_process(path.parent, "jaxla.info", path)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture
def unfinished_run(small_run, tmp_path):
    """A copy of the small run that stopped after two epochs. Its name contains a space."""
    folder = shutil.copytree(small_run, tmp_path / "my run", ignore=shutil.ignore_patterns("report.html", "test"))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    return folder


def describe_best(lines):
    """Return the expected text about the best epoch in lines of metrics.jsonl."""
    history = [json.loads(line) for line in lines]
    best = max(history, key=lambda metrics: metrics["val_dice"])
    return f"best Dice {best['val_dice']:.3f} (mean per volume) in epoch {best['epoch']}"


# --- runs ------------------------------------------------------------------------------------------------------------


def test_facts_of_a_finished_run(small_run, phantoms):
    summary, split = read_json(small_run / "test" / "summary.json"), read_json(small_run / "split.json")
    record = read_json(small_run / "experiment.json")
    dice, iou, atlas = (s["mean"] for s in (summary["dice"], summary["iou"], summary["atlas"]["dice"]))
    versions = record["environment"]["versions"]
    assert info(small_run) == {
        "run": str(small_run),
        "experiment": "quickstart, method vit_mini8",
        "state": "finished after 3 of at most 3 epochs",
        "validation": describe_best((small_run / "metrics.jsonl").read_text().splitlines()),
        "test": (
            f"Dice {dice:.3f}; IoU {iou:.3f} (mean per volume, n = {len(split['test'])}); "
            f"atlas baseline Dice {atlas:.3f}"
        ),
        "data": f"{phantoms}; {len(split['train'])} train, {len(split['val'])} val, {len(split['test'])} test",
        "classes": "LA: any non-zero value",
        "network": "vit_mini8 (random weights, trained)",
        "weights": "random",
        "options": "decoder=convolutional, decoder_widths=[64, 32, 16]",
        "input": "48 × 48 pixels",
        "seed": "1",
        "device": f"cpu: {processor()}",
        "versions": f"jaxla {versions['jaxla']}, jax {jax.__version__}, flax {versions['flax']}",
        "started by": record["command"],
    }
    assert f"--data.root={phantoms} --run-dir={small_run}" in record["command"]


def test_stopped_run_shows_its_progress_and_the_command_that_resumes_it(unfinished_run):
    facts = info(unfinished_run)
    assert facts["state"] == "stopped: 2 of at most 3 epochs are done"
    assert facts["validation"] == describe_best((unfinished_run / "metrics.jsonl").read_text().splitlines())
    assert "test" not in facts

    python, *words = shlex.split(facts["resume with"])
    assert python == "python"
    assert words[-2:] == [f"--run-dir={unfinished_run}", "--resume"]
    assert words[:2] == ["-m", "jaxla.train"]
    options = parse_experiment(words[2:], EXPERIMENTS, METHODS)
    assert options.resume
    require_resumable(options.run_dir, check_experiment(options.experiment))  # the checks of --resume


def test_facts_of_a_run_that_stopped_in_its_first_epoch(unfinished_run):
    (unfinished_run / "metrics.jsonl").unlink()
    facts = info(unfinished_run)
    assert facts["state"] == "stopped: 0 of at most 3 epochs are done"
    assert "validation" not in facts


def test_running_run_has_no_command_to_resume(unfinished_run):
    hold = "from filelock import FileLock; hold = FileLock(sys.argv[1])"
    with hold_in_another_process(hold, unfinished_run / ".lock"):
        facts = info(unfinished_run)
    assert facts["state"] == "running: 2 of at most 3 epochs are done"
    assert "resume with" not in facts


def test_a_run_is_not_changed(unfinished_run):
    def contents():
        return {path: path.read_bytes() for path in unfinished_run.rglob("*") if path.is_file()}

    before = contents()
    info(unfinished_run)
    assert contents() == before


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    arrays = {"a.kernel": np.zeros((500, 600), np.float32), "a.bias": np.zeros(7, np.float32)}
    metadata = {"arch": "dinov2_vits14", "source": "hub.pth", "source_sha256": "ab12", "licence": "Apache-2.0"}
    save_weights(path, arrays, metadata)
    return path


def test_weights_show_their_architecture_and_source(weights):
    assert info(weights) == {
        "weights": str(weights),
        "architecture": "dinov2_vits14",
        "parameters": "300007 in 2 arrays, 1.2 MB",
        "source": "hub.pth (sha256 ab12)",
        "licence": "Apache-2.0",
    }


def test_facts_of_weights_that_were_not_released(tmp_path):
    metadata = {"arch": "vit_mini8", "source": "random, seed 5", "source_sha256": "", "licence": ""}
    save_weights(tmp_path / "mine.safetensors", {}, metadata)
    facts = info(tmp_path / "mine.safetensors")
    assert facts["source"] == "random, seed 5"
    assert facts["licence"] == "none: these weights were never released"


def test_control_characters_of_a_file_are_escaped(tmp_path):
    metadata = {"arch": "vit\x1b[2J", "source": "hub.pth\nlicence  MIT", "source_sha256": "", "licence": "\u202eCC-BY"}
    save_weights(tmp_path / "mine.safetensors", {}, metadata)
    facts = info(tmp_path / "mine.safetensors")
    assert facts["architecture"] == r"vit\x1b[2J"
    assert facts["source"] == r"hub.pth\nlicence  MIT"
    assert facts["licence"] == r"\u202eCC-BY"


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"format": "jaxla-1"}, {"format": "jaxla-1", "arch": "a"}]
)
def test_weights_of_another_package_are_refused(tmp_path, metadata):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "theirs.safetensors", metadata)
    line = refuse(tmp_path, "jaxla.info", "theirs.safetensors")
    assert line.startswith("error: theirs.safetensors: not written by convert_weights. If it is a released checkpoint")


# --- refused paths --------------------------------------------------------------------------------------------------


def change_version(folder, change):
    record = read_json(folder / "experiment.json")
    record["version"] += change
    (folder / "experiment.json").write_text(json.dumps(record))


def change_metric(folder, name, value):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {name: value})
    (folder / "metrics.jsonl").write_text("\n".join(lines))


BAD_RUNS = {
    "newer": (lambda folder: change_version(folder, 1), "written by a newer version of jaxla. Update jaxla."),
    "earlier": (
        lambda folder: change_version(folder, -1),
        "written by an earlier version of jaxla. Use that version, or train again.",
    ),
    "damaged": (lambda folder: (folder / "experiment.json").write_text('{"version": 4'), "experiment.json: damaged"),
    "a Dice of 7": (lambda folder: change_metric(folder, "val_dice", 7), r"metrics.jsonl, line 1: damaged: .*<= 1"),
    "an infinite loss": (lambda folder: change_metric(folder, "val_loss", 1e300), "metrics.jsonl, line 1: damaged"),
    "no record": (lambda folder: (folder / "experiment.json").unlink(), r"not a run folder \(no experiment.json\)"),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_unusable_runs_are_refused(unfinished_run, kind):
    spoil, message = BAD_RUNS[kind]
    spoil(unfinished_run)
    assert re.search(
        f"^error: {unfinished_run}.*{message}", refuse(unfinished_run.parent, "jaxla.info", str(unfinished_run))
    )


def test_paths_that_are_neither_runs_nor_weights_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no weights")
    assert refuse(tmp_path, "jaxla.info", "nowhere") == (
        "error: nowhere: no such file or folder. Pass a run folder or a .safetensors file."
    )
    assert "error: notes.txt: neither a run folder nor a .safetensors file" in refuse(
        tmp_path, "jaxla.info", "notes.txt"
    )
    assert "path" in refuse(tmp_path, "jaxla.info")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    line = refuse(tmp_path, "jaxla.info", "study")
    assert line == "error: study: a study, not a run. Pass one of its runs in study/runs."


# --- speed ----------------------------------------------------------------------------------------------------------


def test_jax_is_not_imported(small_run, unfinished_run, weights):
    code = "import sys, jaxla.info\nfor path in sys.argv[1:]: jaxla.info.main([path])\nsys.exit('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, small_run, unfinished_run, weights], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()].count("versions") == 2
