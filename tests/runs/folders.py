"""Helpers for the tests of end-to-end runs."""

import json

import nibabel as nib
import numpy as np

from tests.commands import succeed


def read_json(path):
    return json.loads(path.read_text())


def train(folder, phantoms, *options):
    """Train on phantoms in `folder / "run"`, with the cache next to it; return the run's folder and the output."""
    run = folder / "run"
    folders = (f"--data.root={phantoms}", f"--run-dir={run}", f"--cache-dir={folder / 'cache'}")
    return run, succeed(folder, "jaxla.train", *folders, *options)


def predict(run, scan, mask):
    """Segment a scan with a run; return the output."""
    return succeed(mask.parent, "jaxla.predict", f"--run={run}", f"--input={scan}", f"--output={mask}")


def scan_file(phantoms, case):
    return phantoms / "task2" / "train_data" / case / "enhanced.nii.gz"


def assert_predict_reproduces_test_mask(run, phantoms, folder):
    """Check that `predict` gives the mask of the run's first test case; return that mask and the output."""
    case = read_json(run / "split.json")["test"][0]
    printed = predict(run, scan_file(phantoms, case), folder / "mask.nii.gz")
    expected, mask = (
        nib.load(path).get_fdata() for path in (run / "test" / "predictions" / f"{case}.nii.gz", folder / "mask.nii.gz")
    )
    np.testing.assert_array_equal(mask, expected)
    return mask, printed
