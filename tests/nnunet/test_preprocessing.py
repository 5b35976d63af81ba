"""Preprocessing equals nnU-Net's; its folders in the cache; fingerprints; plans that do not fit the scans."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.nnunet.plan import Configuration, Plan
from jaxla.nnunet.planner import check_plan, collect_fingerprint
from jaxla.nnunet.preprocessing import preprocess_image, preprocess_volumes
from tests.data.nifti import AFFINE, image_array, mask_array, save, write_flat_pairs

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nnunet_preprocessing.npz")


def make_tiny_plan(spacing, transpose=(0, 1, 2), use_mask_for_norm=False, size=None):
    """Return a plan and its only configuration."""
    size = tuple(size or (4.0,) * len(spacing))
    ones = tuple((1,) * len(spacing) for _ in range(2))
    patch = (4,) * len(spacing)
    configuration = Configuration(2, patch, size, tuple(spacing), True, 2, (1, 1), ones, ones, (1, 1), (1,))
    plan = Plan(None, (1.0,) * 3, (4,) * 3, tuple(transpose), {"3d_fullres": configuration}, use_mask_for_norm)
    return plan, configuration


@pytest.mark.parametrize("number", range(4))
def test_images_and_masks_equal_nnunet_bit_for_bit(number, tmp_path):
    """Scans with zeros around them and a hole, in 2D and 3D, with permuted axes."""
    golden = {name: GOLDEN[f"{name}{number}"] for name in ("image", "mask", "spacing", "target", "transpose", "within")}
    plan, configuration = make_tiny_plan(
        golden["target"].tolist(), golden["transpose"].tolist(), bool(golden["within"])
    )
    spacing = tuple(golden["spacing"].tolist())
    # files with our axes: x from right to left, y from anterior to posterior, z from head to foot
    affine = np.diag([-spacing[2], -spacing[1], -spacing[0], 1.0])
    save(tmp_path / "a.nii.gz", golden["image"].transpose(2, 1, 0).astype(np.float32), affine)
    save(tmp_path / "a_mask.nii.gz", golden["mask"].transpose(2, 1, 0).astype(np.uint8), affine)
    (volume,) = prepare_cases(find_cases(tmp_path, "a:1;b:2"), tmp_path / "cache")
    (result,) = preprocess_volumes([volume], plan, configuration, tmp_path / "cache")
    np.testing.assert_array_equal(result.image, GOLDEN[f"out_image{number}"])
    np.testing.assert_array_equal(result.mask, GOLDEN[f"out_mask{number}"])
    assert result.image.dtype == np.float32

    found = preprocess_image(volume.image, volume.slice_axis, volume.spacing, plan, configuration)
    assert [[side.start, side.stop] for side in found.box] == GOLDEN[f"box{number}"].tolist()
    for k in (1, 2):  # the locations of a class are its voxels, each once
        locations = [result.location(k, i) for i in range(result.location_counts[k - 1])]
        assert len(set(locations)) == len(locations) == np.count_nonzero(result.mask == k)
        assert all(result.mask[location] == k for location in locations)


def test_orientation_of_the_file_does_not_change_the_image(tmp_path):
    """nnU-Net uses the axes of the file; jaxla gives the same image however the scan is stored."""
    image, plan = image_array(1), make_tiny_plan((2.0, 1.0, 1.0), size=(5, 10, 12))
    found = []
    for orientation in ([[0, 1], [1, 1], [2, 1]], [[2, -1], [0, 1], [1, -1]], [[1, 1], [2, -1], [0, -1]]):
        stored = nib.Nifti1Image(image, AFFINE).as_reoriented(np.array(orientation))
        geometry = slice_geometry(stored.affine)
        slices = to_slices(np.asarray(stored.dataobj), geometry)
        found.append(preprocess_image(slices, geometry.axis, geometry.spacing, *plan))
    for image in found[1:]:
        np.testing.assert_array_equal(image.image, found[0].image)
        assert image.box == found[0].box


def test_volumes_are_cached_by_spacing_axes_and_normalisation(tmp_path):
    volumes = prepare_cases(find_cases(write_flat_pairs(tmp_path / "data", 2)), tmp_path / "cache")
    plan, configuration = make_tiny_plan((2.0, 1.0, 1.0))

    def folders(plan, configuration):
        return {v.folder for v in preprocess_volumes(volumes, plan, configuration, tmp_path / "cache")}

    first = folders(plan, configuration)
    modified = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert folders(plan, configuration._replace(batch_size=9, patch_size=(8, 8, 8))) == first
    assert modified == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    changed = [
        folders(plan, configuration._replace(spacing=(2.0, 1.0, 1.5))),
        folders(plan, configuration._replace(spacing=(1.0, 1.0))),
        folders(plan._replace(use_mask_for_norm=True), configuration),
        folders(plan._replace(transpose_forward=(1, 0, 2)), configuration),
    ]
    assert len(set.union(first, *changed)) == 2 * 5  # two volumes, five different plans
    (next(iter(first)) / "locations.npy").unlink()  # an incomplete folder is replaced
    assert folders(plan, configuration) == first
    assert all((folder / "locations.npy").exists() for folder in first)


def test_large_classes_keep_a_sample_of_their_locations(tmp_path):
    image = image_array(1, (60, 50, 40))
    mask = np.zeros(image.shape, np.uint8)
    mask[5:45, 5:45, 5:35] = 1  # 48 000 voxels
    save(tmp_path / "a.nii.gz", image)
    save(tmp_path / "a_mask.nii.gz", mask)
    volumes = prepare_cases(find_cases(tmp_path), tmp_path / "cache")
    (result,) = preprocess_volumes(volumes, *make_tiny_plan((2.5, 0.75, 0.75)), tmp_path / "cache")
    assert result.location_counts == (10_000,)
    locations = np.array([result.location(1, i) for i in range(10_000)])
    assert len({*map(tuple, locations)}) == 10_000
    assert np.abs(locations.mean(0) - [19.5, 24.5, 24.5]).max() < 1  # spread over the whole class


def test_fingerprint_describes_the_cropped_scan(tmp_path):
    image = np.zeros((16, 14, 6), np.int16)
    image[2:12, 3:13, 1:5] = image_array(1, (10, 10, 4)) + 1
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz", image + (image > 0) * (name == "b"))
        save(tmp_path / f"{name}_mask.nii.gz", mask_array(image.shape))
    found = collect_fingerprint(prepare_cases(find_cases(tmp_path), tmp_path / "cache"))
    assert found.shapes_after_crop == ((4, 10, 10),) * 2  # head to foot, anterior to posterior, left to right
    assert found.spacings == ((2.5, 0.75, 0.75),) * 2
    assert found.median_relative_size_after_cropping == pytest.approx(400 / (16 * 14 * 6))
    json.dumps(found)


def test_plan_for_scans_of_another_size_is_refused(tmp_path):
    volumes = prepare_cases(
        find_cases(write_flat_pairs(tmp_path / "data", 2)), tmp_path / "cache"
    )  # 4 × 14 × 16 voxels
    plan, configuration = make_tiny_plan((2.5, 0.75, 0.75), size=(4, 14, 16))

    def check(**changes):
        changed = plan._replace(configurations={"3d_fullres": configuration._replace(**changes)})
        check_plan(changed, "3d_fullres", volumes, "--model.plan")

    check()
    check(median_image_size_in_voxels=(7, 14, 31))
    for size, spacing in (((4, 14, 33), (2.5, 0.75, 0.75)), ((4, 14, 16), (2.5, 0.3, 0.75))):
        with pytest.raises(InputError, match=r"^--model.plan: the scans have 4×.* but the plan was made for 4×14×"):
            check(median_image_size_in_voxels=size, spacing=spacing)


def test_plan_with_another_normalisation_is_refused():
    plan, _ = make_tiny_plan((2.5, 0.75, 0.75))
    with pytest.raises(InputError, match=r"model\.plan: normalises by CTNormalization, but jaxla supports only ZScore"):
        check_plan(plan._replace(normalisation="CTNormalization"), "3d_fullres", [], "--model.plan")


def test_plan_fits_scans_with_zeros_around_them(tmp_path):
    """Plans are made for cropped scans."""
    image = np.zeros((40, 36, 10), np.int16)
    image[2:16, 3:15, 1:5] = image_array(1, (14, 12, 4)) + 1
    save(tmp_path / "a.nii.gz", image)
    save(tmp_path / "a_mask.nii.gz", mask_array(image.shape))
    volumes = prepare_cases(find_cases(tmp_path), tmp_path / "cache")
    plan, _ = make_tiny_plan((2.5, 0.75, 0.75), size=(4, 12, 14))
    check_plan(plan, "3d_fullres", volumes, "--model.plan")


def test_normalisation_within_the_nonzero_region_includes_structures(tmp_path):
    """As in nnU-Net, zero voxels inside a structure are included."""
    image = np.zeros((12, 10, 6), np.int16)
    image[2:9, 2:8, 1:5] = image_array(1, (7, 6, 4)) + 1
    mask = np.zeros(image.shape, np.uint8)
    mask[5:9, 2:8, 1:5] = 1
    image[8, 7, 1:4] = 0  # at the edge, so not a hole, and within the structure
    plan, configuration = make_tiny_plan((2.5, 0.75, 0.75), use_mask_for_norm=True)
    slices, classes = (array.transpose(2, 1, 0) for array in (image, mask))
    spacing = (2.5, 0.75, 0.75)
    found = preprocess_image(slices, "head-foot", spacing, plan, configuration, classes)
    inside = (slices[found.box] != 0) | (classes[found.box] > 0)
    values = slices[found.box].astype(np.float32)[inside]
    np.testing.assert_allclose(found.image[inside], (values - values.mean()) / values.std(), atol=1e-6)
    assert (found.image[~inside] == 0).all()
    without = preprocess_image(slices, "head-foot", spacing, plan, configuration)
    assert not np.array_equal(without.image, found.image)


def test_empty_masks_have_no_locations(tmp_path):
    folder = write_flat_pairs(tmp_path / "data", 1)
    save(next(folder.glob("*_mask.nii.gz")), np.zeros_like(mask_array()))
    (volume,) = prepare_cases(find_cases(folder, "LA:1"), tmp_path / "cache")
    (result,) = preprocess_volumes([volume], *make_tiny_plan((2.5, 0.75, 0.75)), tmp_path / "cache")
    assert result.location_counts == (0,)
    assert result.shape == result.image.shape


def test_masks_keep_more_than_127_classes(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 1)
    mask = np.zeros(image_array().shape, np.int16)
    mask[4:8, 4:8, 1:3] = np.arange(1, 33).reshape(4, 4, 2)
    mask[8, 8, 1:3] = 127, 140
    save(root / "case_0_mask.nii.gz", mask)
    names = ";".join(f"c{k}:{k}" for k in range(1, 141))
    (volume,) = prepare_cases(find_cases(root, names), tmp_path / "cache")
    plan, configuration = make_tiny_plan((2.5, 0.75, 0.75))
    (result,) = preprocess_volumes([volume], plan, configuration, tmp_path / "cache")
    counts = np.bincount(result.mask[result.mask > 0], minlength=141)
    np.testing.assert_array_equal(counts[1:], volume.class_voxels[1:])
    assert result.mask[result.location(140, 0)] == 140
