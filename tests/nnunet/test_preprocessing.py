"""Scans as a plan wants them, against nnU-Net's own preprocessing; their folders in the cache; fingerprints."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.data.volumes import slice_geometry, to_slices
from jaxla.nnunet.fingerprint import fingerprint
from jaxla.nnunet.plan import Configuration, Plan
from jaxla.nnunet.preprocessing import plan_image, prepare_planned, require_fitting
from tests.data.nifti import AFFINE, flat, image_array, mask_array, save

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nnunet_preprocessing.npz")


def plan_for(spacing, transpose=(0, 1, 2), within=False, size=None):
    size = tuple(size or (4.0,) * len(spacing))
    ones = tuple((1,) * len(spacing) for _ in range(2))
    c = Configuration(2, (4,) * len(spacing), size, tuple(spacing), True, 2, (1, 1), ones, ones, (1, 1), (1,))
    return Plan(None, (1.0,) * 3, (4,) * 3, tuple(transpose), {}, within), c


@pytest.mark.parametrize("number", range(4))
def test_images_and_masks_are_nnunets_to_the_bit(number, tmp_path):
    """Zeros around a scan and a hole in it, in two dimensions and in three, with axes in another order."""
    of = {name: GOLDEN[f"{name}{number}"] for name in ("image", "mask", "spacing", "target", "transpose", "within")}
    plan, configuration = plan_for(of["target"].tolist(), of["transpose"].tolist(), bool(of["within"]))
    spacing = tuple(of["spacing"].tolist())
    # files whose axes are ours: x to the right-left, y to anterior-posterior, z upside down
    affine = np.diag([-spacing[2], -spacing[1], -spacing[0], 1.0])
    save(tmp_path / "a.nii.gz", of["image"].transpose(2, 1, 0).astype(np.float32), affine)
    save(tmp_path / "a_mask.nii.gz", of["mask"].transpose(2, 1, 0).astype(np.uint8), affine)
    (volume,) = prepare_cases(find_cases(tmp_path, "a:1;b:2"), tmp_path / "cache")
    (planned,) = prepare_planned([volume], plan, configuration, tmp_path / "cache")
    np.testing.assert_array_equal(planned.image, GOLDEN[f"out_image{number}"])
    np.testing.assert_array_equal(planned.mask, GOLDEN[f"out_mask{number}"])
    assert planned.image.dtype == np.float32

    found = plan_image(volume.image, volume.slice_axis, volume.spacing, plan, configuration)
    assert [[side.start, side.stop] for side in found.box] == GOLDEN[f"box{number}"].tolist()
    for k in (1, 2):  # the places of a class are places of that class, each once
        places = [planned.place(k, n) for n in range(planned.class_places[k - 1])]
        assert len(set(places)) == len(places) == np.count_nonzero(planned.mask == k)
        assert all(planned.mask[place] == k for place in places)


def test_the_files_orientation_changes_nothing(tmp_path):
    """nnU-Net takes a file's own axes; here the same scan stored another way is the same image."""
    image, plan = image_array(1), plan_for((2.0, 1.0, 1.0), size=(5, 10, 12))
    found = []
    for turn in ([[0, 1], [1, 1], [2, 1]], [[2, -1], [0, 1], [1, -1]], [[1, 1], [2, -1], [0, -1]]):
        stored = nib.Nifti1Image(image, AFFINE).as_reoriented(np.array(turn))
        geometry = slice_geometry(stored.affine)
        slices = to_slices(np.asarray(stored.dataobj), geometry)
        found.append(plan_image(slices, geometry.axis, geometry.spacing, *plan))
    for other in found[1:]:
        np.testing.assert_array_equal(other.image, found[0].image)
        assert other.box == found[0].box


def test_a_volume_is_made_once_for_each_spacing_and_kind_of_normalisation(tmp_path):
    volumes = prepare_cases(find_cases(flat(tmp_path / "data", 2)), tmp_path / "cache")
    plan, configuration = plan_for((2.0, 1.0, 1.0))

    def folders(plan, configuration):
        return {v.folder for v in prepare_planned(volumes, plan, configuration, tmp_path / "cache")}

    first = folders(plan, configuration)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert folders(plan, configuration._replace(batch_size=9, patch_size=(8, 8, 8))) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    others = [
        folders(plan, configuration._replace(spacing=(2.0, 1.0, 1.5))),
        folders(plan, configuration._replace(spacing=(1.0, 1.0))),
        folders(plan._replace(use_mask_for_norm=True), configuration),
        folders(plan._replace(transpose_forward=(1, 0, 2)), configuration),
    ]
    assert len(set.union(first, *others)) == 2 * 5
    (next(iter(first)) / "places.npy").unlink()  # half a folder is made again
    assert folders(plan, configuration) == first
    assert all((folder / "places.npy").exists() for folder in first)


def test_of_a_large_class_some_places_are_kept(tmp_path):
    image = image_array(1, (60, 50, 40))
    mask = np.zeros(image.shape, np.uint8)
    mask[5:45, 5:45, 5:35] = 1  # 48 000 voxels
    save(tmp_path / "a.nii.gz", image)
    save(tmp_path / "a_mask.nii.gz", mask)
    volumes = prepare_cases(find_cases(tmp_path), tmp_path / "cache")
    (planned,) = prepare_planned(volumes, *plan_for((2.5, 0.75, 0.75)), tmp_path / "cache")
    assert planned.class_places == (10_000,)
    places = np.array([planned.place(1, n) for n in range(10_000)])
    assert len({*map(tuple, places)}) == 10_000
    assert np.abs(places.mean(0) - [19.5, 24.5, 24.5]).max() < 1  # from all over it


def test_a_fingerprint_says_what_zeros_leave(tmp_path):
    image = np.zeros((16, 14, 6), np.int16)
    image[2:12, 3:13, 1:5] = image_array(1, (10, 10, 4)) + 1
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz", image + (image > 0) * (name == "b"))
        save(tmp_path / f"{name}_mask.nii.gz", mask_array(image.shape))
    found = fingerprint(prepare_cases(find_cases(tmp_path), tmp_path / "cache"))
    assert found.shapes_after_crop == ((4, 10, 10),) * 2  # head to foot, anterior to posterior, left-right
    assert found.spacings == ((2.5, 0.75, 0.75),) * 2
    assert found.median_relative_size_after_cropping == pytest.approx(400 / (16 * 14 * 6))
    json.dumps(found)


def test_a_plan_of_other_scans_is_refused(tmp_path):
    volumes = prepare_cases(find_cases(flat(tmp_path / "data", 2)), tmp_path / "cache")  # 4 × 14 × 16 voxels
    plan, configuration = plan_for((2.5, 0.75, 0.75), size=(4, 14, 16))
    require_fitting(plan, configuration, volumes, "it")
    require_fitting(plan, configuration._replace(median_image_size_in_voxels=(7, 14, 31)), volumes, "it")
    for size, spacing in (((4, 14, 33), (2.5, 0.75, 0.75)), ((4, 14, 16), (2.5, 0.3, 0.75))):
        other = configuration._replace(median_image_size_in_voxels=size, spacing=spacing)
        with pytest.raises(InputError, match="it: does not fit the data: at its spacing the scans have 4×"):
            require_fitting(plan, other, volumes, "it")


def test_zeros_around_a_scan_do_not_make_a_plan_unfit(tmp_path):
    """A plan is made of what they leave."""
    image = np.zeros((40, 36, 10), np.int16)
    image[2:16, 3:15, 1:5] = image_array(1, (14, 12, 4)) + 1
    save(tmp_path / "a.nii.gz", image)
    save(tmp_path / "a_mask.nii.gz", mask_array(image.shape))
    volumes = prepare_cases(find_cases(tmp_path), tmp_path / "cache")
    require_fitting(*plan_for((2.5, 0.75, 0.75), size=(4, 12, 14)), volumes, "it")


def test_what_has_a_class_counts_as_not_zero_where_zeros_are_left_out(tmp_path):
    """As in nnU-Net: grey values are normalised over the scan and its structures."""
    image = np.zeros((12, 10, 6), np.int16)
    image[2:9, 2:8, 1:5] = image_array(1, (7, 6, 4)) + 1
    mask = np.zeros(image.shape, np.uint8)
    mask[5:9, 2:8, 1:5] = 1
    image[8, 7, 1:4] = 0  # at the edge, so no hole, and within the structure
    plan, configuration = plan_for((2.5, 0.75, 0.75), within=True)
    slices, classes = (array.transpose(2, 1, 0) for array in (image, mask))
    spacing = (2.5, 0.75, 0.75)
    found = plan_image(slices, "head-foot", spacing, plan, configuration, classes)
    inside = (slices[found.box] != 0) | (classes[found.box] > 0)
    values = slices[found.box].astype(np.float32)[inside]
    np.testing.assert_allclose(found.image[inside], (values - values.mean()) / values.std(), atol=1e-6)
    assert (found.image[~inside] == 0).all()
    without = plan_image(slices, "head-foot", spacing, plan, configuration)
    assert not np.array_equal(without.image, found.image)


def test_volumes_of_empty_masks_have_no_places(tmp_path):
    folder = flat(tmp_path / "data", 1)
    save(next(folder.glob("*_mask.nii.gz")), np.zeros_like(mask_array()))
    (volume,) = prepare_cases(find_cases(folder, "LA:1"), tmp_path / "cache")
    (planned,) = prepare_planned([volume], *plan_for((2.5, 0.75, 0.75)), tmp_path / "cache")
    assert planned.class_places == (0,)
    assert replace(planned, id="other").shape == planned.image.shape


def test_masks_of_many_classes_keep_them_all(tmp_path):
    root = flat(tmp_path / "data", 1)
    mask = np.zeros(image_array().shape, np.int16)
    mask[4:8, 4:8, 1:3] = np.arange(1, 33).reshape(4, 4, 2)
    mask[8, 8, 1:3] = 127, 140
    save(root / "case_0_mask.nii.gz", mask)
    names = ";".join(f"c{k}:{k}" for k in range(1, 141))
    (volume,) = prepare_cases(find_cases(root, names), tmp_path / "cache")
    plan, configuration = plan_for((2.5, 0.75, 0.75))
    (planned,) = prepare_planned([volume], plan, configuration, tmp_path / "cache")
    counts = np.bincount(planned.mask[planned.mask > 0], minlength=141)
    np.testing.assert_array_equal(counts[1:], volume.class_voxels[1:])
    assert planned.mask[planned.place(140, 0)] == 140
