"""The tutorial notebook runs from top to bottom, and gives results for every case."""

import json
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TRAINING_STEPS = 'training.steps\\": 8,'  # per epoch, in the notebook's JSON; here, one


def test_the_tutorial_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "tutorial.ipynb").read_text("utf-8")
    assert text.count(TRAINING_STEPS) == 1
    notebook = nbformat.reads(text.replace(TRAINING_STEPS, TRAINING_STEPS.replace("8", "1")), as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    summary = json.loads((tmp_path / "runs" / "tutorial" / "test" / "summary.json").read_text("utf-8"))
    scores = json.loads((tmp_path / "scores" / "summary.json").read_text("utf-8"))
    assert summary["dice"]["n"] == 2  # test cases
    assert scores["dice"]["n"] == 8  # all scans
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 3  # overlays, a mask, and features
    assert "left atrium: " in "".join(output.get("text", "") for output in outputs)
