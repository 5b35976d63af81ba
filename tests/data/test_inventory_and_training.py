"""The inventory reports what training refuses, for the same file and in the same words; the rest are warnings."""

import contextlib
import math
import shutil

import numpy as np
import pytest

from jaxla.config import Data, InputError
from jaxla.data.cases import find_cases
from jaxla.data.inventory import take_inventory
from jaxla.data.prepared import prepare_cases
from jaxla.data.split import make_split
from tests.data.nifti import AFFINE, image_array, mask_array, save, truncate, write_flat_pairs

# Each of these functions writes one fault or peculiarity into a folder of five flat pairs.


def write_nan(root):
    save(root / "case_1.nii.gz", np.where(image_array(1) > 990, np.nan, image_array(1)).astype(np.float32))


def write_constant_image(root):
    save(root / "case_1.nii.gz", np.full_like(image_array(), 3))


def truncate_mask(root):
    truncate(root / "case_1_mask.nii.gz")


def write_fractional_mask(root):
    save(root / "case_1_mask.nii.gz", mask_array().astype(np.float32) / 2)


def change_mask_shape(root):
    save(root / "case_1_mask.nii.gz", mask_array(shape=(16, 14, 5)))


def change_mask_affine(root):
    save(root / "case_1_mask.nii.gz", mask_array(), np.diag([-1, -1, 2.5, 1]))


def add_mask_value(root):
    mask = mask_array()
    mask[0, 0, 0] = 2
    save(root / "case_1_mask.nii.gz", mask)


def change_mask_value(root):
    save(root / "case_1_mask.nii.gz", mask_array(value=2))


def duplicate_image(root):
    shutil.copy(root / "case_0.nii.gz", root / "case_3.nii.gz")


def duplicate_voxels_on_another_grid(root):
    for name, array in (("case_3", image_array(0)), ("case_3_mask", mask_array())):
        save(root / f"{name}.nii.gz", array, np.diag([-0.8, -0.8, 2.5, 1]))


def remove_mask(root):
    (root / "case_1_mask.nii.gz").unlink()


def remove_image(root):
    (root / "case_1.nii.gz").unlink()


def add_second_mask(root):
    save(root / "case_1_seg.nii.gz", mask_array())


def keep_two_cases(root):
    for n in (2, 3, 4):
        remove_case(root, n)


def remove_case(root, n):
    (root / f"case_{n}.nii.gz").unlink()
    (root / f"case_{n}_mask.nii.gz").unlink()


def empty_mask(root):
    save(root / "case_1_mask.nii.gz", mask_array(value=0))


def shrink_mask(root):
    mask = np.zeros_like(mask_array())
    mask[5, 5, 2] = 1
    save(root / "case_1_mask.nii.gz", mask)


def change_slice_axis(root):
    for name, array in (("case_1", image_array(1)), ("case_1_mask", mask_array())):
        save(root / f"{name}.nii.gz", array, np.diag([-3, -0.75, 0.625, 1]))


def widen_rows(root):
    for name, array in (("case_1", image_array(1)), ("case_1_mask", mask_array())):
        save(root / f"{name}.nii.gz", array, np.diag([-1.125, -0.75, 2.5, 1]))


def rotate_case(root):
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    rotation = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for name, array in (("case_1", image_array(1)), ("case_1_mask", mask_array())):
        save(root / f"{name}.nii.gz", array, rotation @ AFFINE)


def change_nothing(root):
    pass


REFUSED = {  # fault that training refuses -> kind and file of the finding
    write_nan: ("image", "case_1.nii.gz"),
    write_constant_image: ("image", "case_1.nii.gz"),
    truncate_mask: ("mask", "case_1_mask.nii.gz"),
    write_fractional_mask: ("mask", "case_1_mask.nii.gz"),
    change_mask_shape: ("grid", "case_1_mask.nii.gz"),
    change_mask_affine: ("grid", "case_1_mask.nii.gz"),
    add_mask_value: ("labels", "case_1_mask.nii.gz"),
    change_mask_value: ("labels", "data"),
    duplicate_image: ("same image", "case_3.nii.gz"),
    duplicate_voxels_on_another_grid: ("same image", "case_3.nii.gz"),
    remove_mask: ("no mask", "case_1.nii.gz"),
    remove_image: ("no image", "case_1_mask.nii.gz"),
    add_second_mask: ("two files", "case_1_seg.nii.gz"),
    keep_two_cases: ("too few cases", "data"),
}
ACCEPTED = {  # peculiarity that training accepts -> kind and file of each warning
    change_nothing: [],
    empty_mask: [("empty mask", "case_1_mask.nii.gz")],
    shrink_mask: [("volume", "case_1_mask.nii.gz")],
    change_slice_axis: [("slice axis", "case_1.nii.gz")],
    widen_rows: [("volume", "case_1_mask.nii.gz"), ("spacing", "case_1.nii.gz")],
    rotate_case: [("oblique", "case_1.nii.gz")],
}


def prepare_like_training(root, cache, labels=""):
    dataset = find_cases(root, labels)
    make_split([case.id for case in dataset.cases], Data())
    prepare_cases(dataset, cache)


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_a_fault_that_training_refuses_is_an_error_on_the_same_file(tmp_path, change):
    root = write_flat_pairs(tmp_path / "data", 5)
    change(root)
    with pytest.raises(InputError) as refused:
        prepare_like_training(root, tmp_path / "cache")
    errors = take_inventory(root).errors
    assert [(f.kind, f.file.name) for f in errors] == [REFUSED[change]]
    assert (errors[0].problem, errors[0].fix) == (refused.value.problem, refused.value.fix)


@pytest.mark.parametrize("change", ACCEPTED, ids=lambda f: f.__name__)
def test_a_peculiarity_that_training_accepts_is_a_warning(tmp_path, change):
    root = write_flat_pairs(tmp_path / "data", 5)
    change(root)
    prepare_like_training(root, tmp_path / "cache")
    findings = take_inventory(root).findings
    assert [(f.kind, f.file.name) for f in findings] == ACCEPTED[change]
    assert {f.level for f in findings} <= {"warning"}


@pytest.mark.parametrize("labels", ["", "a:1,2", "a:1;b:2", "a:1", "a:1;background:2", "a:2;background:1"])
def test_labels_are_checked_as_in_training(tmp_path, labels):
    root = write_flat_pairs(tmp_path / "data", 5)
    for n in range(5):
        mask = mask_array()
        mask[0, 0, 0] = 2
        save(root / f"case_{n}_mask.nii.gz", mask)
    is_refused = labels in ("", "a:1")
    with pytest.raises(InputError) if is_refused else contextlib.nullcontext():
        prepare_like_training(root, tmp_path / "cache", labels)
    assert bool(take_inventory(root, labels).errors) == is_refused


def test_different_values_in_two_masks_are_named_with_both_possible_labels(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 5)
    change_mask_value(root)
    (error,) = take_inventory(root).errors
    values = "1 in case case_4, 2 in case case_1"
    assert error.problem == f"the masks contain different values ({values}), but no classes are defined"
    assert "data.labels='a:1,2'" in error.fix
    assert "data.labels='a:1;b:2'" in error.fix
    assert take_inventory(root, "a:1,2").errors == []
