"""Write the folder of a study from box masks and the package's metrics, without training."""

import csv
import json
from dataclasses import replace
from typing import NamedTuple

import nibabel as nib
import numpy as np
from jaxla.experiments import EXPERIMENTS, METHODS

from jaxla.data.cases import find_cases
from jaxla.data.labels import Labels
from jaxla.data.prepared import content_key
from jaxla.evaluation.summary import score_case, summarise, write_cases, write_summary
from jaxla.runs.machine import environment
from jaxla.runs.record import Record, write_record

SHAPE, SPACING = (24, 20, 6), (1.0, 1.5, 4.0)  # X, Y, Z; the slices lie along Z
AFFINE = np.diag([*SPACING, 1.0])
LASCARQS_FILES = ("{}/enhanced.nii.gz", "{}/atriumSegImgMO.nii.gz")
TRAIN = [f"t{n}" for n in range(8)]
ONE_CLASS = Labels(("LA",))
TWO_CLASSES = Labels(("LA", "appendage"), ((1,), (2,)))

REFERENCES = {f"c{n}": (4, 14) for n in range(4)}
# Rows predicted in cases c0 to c3, by method and seed. A box of 10 rows that is moved by m rows has Dice 1 − m / 10.
PREDICTED = {
    ("unet", 0): [(4, 14), (5, 15), (6, 16), (7, 17)],
    ("unet", 1): [(4, 14), (5, 15), (6, 16), (9, 19)],
    ("segnet", 0): [(5, 15), (6, 16), (8, 18), (10, 20)],
    ("segnet", 1): [(6, 16), (6, 16), (8, 18), (12, 22)],
}
PROTOCOLS = ("fewshot_1patient", "data_50percent", "paper1")


class BoxRun(NamedTuple):
    """A run: test case -> rows of the box that it predicts."""

    protocol: str
    method: str
    seed: int
    predicted: dict


def make_box_mask(rows, labels=ONE_CLASS):
    """Return a mask with a box of the first class; a second class is the same in all masks."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[rows[0] : rows[1], 5:15, 1:5] = 1
    if len(labels.names) > 1:
        mask[2:5, 16:19, 1:5] = 2
    return mask


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def write_study(folder, scheduled, references, root, labels=ONE_CLASS, files=("{}.nii.gz", "{}_mask.nii.gz")):
    """Write a study with these runs, and its scans into `root`.

    Args:
        references: test case -> rows of the box in its reference mask.
        files: paths of a case's scan and mask; `LASCARQS_FILES` are those of the data set with published results.
    """
    rng = np.random.default_rng(0)
    for case, rows in references.items():
        save(rng.integers(0, 500, SHAPE).astype(np.int16), root / files[0].format(case))
        save(make_box_mask(rows, labels), root / files[1].format(case))
    option = labels.describe().replace(", ", ";").replace(": ", ":") if labels.values else ""
    hashes = {case.id: content_key(case, labels) for case in find_cases(root, option).cases}
    runs = []
    for run in scheduled:
        name = f"{run.protocol}_{run.method}_seed{run.seed}"
        runs.append({"folder": name, "protocol": run.protocol, "method": run.method, "seed": run.seed})
        write_run(folder / "runs" / name, run, references, root, labels, option)
        (folder / "runs" / name / "cases.json").write_text(json.dumps(dict.fromkeys([*TRAIN, "v"], "0") | hashes))
    content = {"name": "tiny", "summary": "boxes", "command": "python -m jaxla.study --name=tiny", "runs": runs}
    (folder / "study.json").write_text(json.dumps(content))


def write_run(folder, run, references, root, labels, option):
    experiment = replace(EXPERIMENTS[run.protocol], method=METHODS[run.method])
    experiment = replace(
        experiment, seed=run.seed, data=replace(experiment.data, root=str(root), labels=option, subset_seed=run.seed)
    )
    patients = experiment.data.train_patients or round(experiment.data.train_percent / 100 * len(TRAIN))
    (folder / "test").mkdir(parents=True)
    hashes = dict.fromkeys(("weights_sha256", "split_sha256", "data_sha256"), "0" * 64)
    start = {"command": "python -m jaxla.train", "begun": "2026-01-02T03:04:05", "environment": environment()}
    words = {"label": run.method, "network": run.method, "input": "96 × 96 pixels", "unit": "per volume"}
    write_record(folder, Record(experiment, labels=labels, weights="random", **words, **hashes, **start))
    split = {"train": TRAIN[:patients], "val": ["v"], "test": list(run.predicted)}
    (folder / "split.json").write_text(json.dumps(split))
    cost = {
        "parameters": 31_000_000, "trained_parameters": 31_000_000, "multiply_adds": 75_000_000_000,
        "step_bytes": 3_300_000_000, "step_slices": 8,
        "peak_host_bytes": 4_000_000_000 + run.seed, "peak_device_bytes": None,
        "inference_seconds": [1.0 + run.seed, 2.0 + run.seed], "inference_slices": [6, 6],
    }  # fmt: skip
    (folder / "cost.json").write_text(json.dumps(cost))
    losses = {"train_loss": 0.3, "val_loss": 0.4, "slices_per_second": 9.5}
    lines = [{"epoch": n, "seconds": 10.0 * n, "val_dice": 0.5, "val_iou": 0.4, **losses} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    rows, slice_rows = [], []
    for case, rows_of_box in run.predicted.items():
        save(make_box_mask(rows_of_box, labels), folder / "test" / "predictions" / f"{case}.nii.gz")
        predicted, reference = (np.moveaxis(make_box_mask(b, labels), 2, 0) for b in (rows_of_box, references[case]))
        spacing = (SPACING[2], *SPACING[:2])
        rows += score_case(case, predicted, reference, spacing, labels.names)
        slice_rows += score_case(case, predicted, reference, spacing, labels.names, "slice")
    for row in rows:
        row |= {"atlas_dice": 0.4, "atlas_iou": 0.25}
    summary = summarise(rows, "volume", "one", labels.names)
    summary["slice"] = summarise(slice_rows, "slice", "one", labels.names)
    summary["atlas"] = {metric: summary[metric] for metric in ("dice", "iou")}  # arbitrary values
    write_cases(rows, folder / "test" / "cases.csv")
    write_cases(slice_rows, folder / "test" / "slices.csv")
    write_summary(summary, folder / "test" / "summary.json")
    (folder / "report.html").write_text("the run is complete")


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_dir(study, protocol="paper1", method="unet", seed=0):
    return study / "runs" / f"{protocol}_{method}_seed{seed}"


def edit_json(path, change):
    """Apply `change(content)` to a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
