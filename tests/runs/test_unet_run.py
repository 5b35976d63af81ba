"""An end-to-end run of a convolutional network, with its own pre- and postprocessing."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tests.runs.folders import assert_predict_reproduces_test_mask, predict, read_json, scan_file, train

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    options = (
        "--exp=quickstart", "--method=unet", "--preprocessing.image_size=48", "--training.epochs=4",
        "--training.learning_rate=0.01", "--training.batch_size=8", "--model.widths=[8,16]",
        "--augmentation.rotation=10", "--augmentation.flips=true", "--augmentation.intensity=0.1",
    )  # fmt: skip
    folder, _ = train(tmp_path_factory.mktemp("unet"), phantoms, *options)
    return folder


def test_unet_learns_and_predict_reproduces_its_test_mask(run, phantoms, tmp_path):
    summary = read_json(run / "test" / "summary.json")
    assert summary["backbone"] == "unet (random weights, trained)"
    assert summary["dice"]["mean"] > summary["atlas"]["dice"]["mean"] / 2
    assert_predict_reproduces_test_mask(run, phantoms, tmp_path)


def test_slices_are_padded_to_the_largest_training_slice_and_masks_are_closed(run, phantoms):
    record, split = read_json(run / "experiment.json"), read_json(run / "split.json")
    scans = [nib.load(scan_file(phantoms, case)) for case in split["train"]]
    assert record["extent"] == max(n * 0.625 for scan in scans for n in scan.shape[:2])
    square = np.ones((3, 3, 1), bool)
    for path in (run / "test" / "predictions").iterdir():
        mask = nib.load(path).get_fdata() > 0
        assert mask.any()
        np.testing.assert_array_equal(ndimage.binary_closing(mask, square)[2:-2, 2:-2], mask[2:-2, 2:-2])


def test_only_the_centre_of_a_larger_scan_is_segmented(run, phantoms, tmp_path):
    case = read_json(run / "split.json")["test"][0]
    scan = nib.load(scan_file(phantoms, case))
    large = nib.Nifti1Image(np.pad(scan.get_fdata(), ((64, 64), (64, 64), (0, 0)), mode="reflect"), scan.affine)
    nib.save(large, tmp_path / "large.nii.gz")
    printed = predict(run, tmp_path / "large.nii.gz", tmp_path / "mask.nii.gz")
    assert "large.nii.gz: slices of " in printed
    assert "the network sees their centre, and the rest becomes background" in printed
    mask, extent = nib.load(tmp_path / "mask.nii.gz"), read_json(run / "experiment.json")["extent"]
    assert mask.shape == large.shape
    tolerance = 8  # voxels, for an input pixel and interpolation
    margins = [int((n - extent / 0.625) / 2) - tolerance for n in mask.shape[:2]]
    assert min(margins) > 0
    edges = mask.get_fdata().copy()
    edges[margins[0] : -margins[0], margins[1] : -margins[1]] = 0
    assert not edges.any()
