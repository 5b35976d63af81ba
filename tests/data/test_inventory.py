"""The inventory of a folder: facts of its cases, and findings with their files."""

import json
import math
import re
import shutil
import tracemalloc

import numpy as np
import pytest

from jaxla.config import Data
from jaxla.data.cases import find_cases
from jaxla.data.inventory import find_volume_outliers, take_inventory
from jaxla.data.prepared import prepare_cases
from jaxla.data.split import make_split
from tests.data.nifti import (
    AFFINE,
    image_array,
    mask_array,
    save,
    truncate,
    write_decathlon,
    write_flat_pairs,
    write_lascarqs,
)

BOX_ML = 50 * 0.75 * 0.75 * 2.5 / 1000  # volume of nifti.mask_array
ONE_CLASS = {"background": 0, "LA": 1}
TWO_CLASSES = {"background": 0, "LA": 1, "wall": 2}


def summarise(inventory, level=None):
    """Return (kind, file or folder name, case) of every finding."""
    return [(f.kind, f.file.name, f.case) for f in inventory.findings if level in (None, f.level)]


# --- facts -----------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_case_are_exact(tmp_path):
    write_flat_pairs(tmp_path, 3)
    inventory = take_inventory(tmp_path)
    assert inventory.layout == "flat pairs"
    assert [case.id for case in inventory.cases] == ["case_0", "case_1", "case_2"]
    case = inventory.cases[1]
    assert (case.image, case.mask) == (tmp_path / "case_1.nii.gz", tmp_path / "case_1_mask.nii.gz")
    assert case.shape == (16, 14, 4)
    assert case.spacing == (0.75, 0.75, 2.5)
    assert case.orientation == "LPS"
    assert case.oblique == 0
    assert (case.slice_axis, case.slices, case.slice_spacing) == ("head-foot", 4, (2.5, 0.75, 0.75))
    assert case.mask_values == (1,)
    assert case.volumes == {"foreground": pytest.approx(BOX_ML)}
    assert inventory.findings == ()
    assert inventory.unread == ()


def test_slices_and_spacing_equal_those_of_training_in_every_orientation(tmp_path):
    for n, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        affine = AFFINE[:, [*order, 3]]
        save(tmp_path / f"{n}.nii.gz", image_array(n).transpose(order), affine)
        save(tmp_path / f"{n}_mask.nii.gz", mask_array().transpose(order), affine)
    inventory = take_inventory(tmp_path)
    prepared = prepare_cases(find_cases(tmp_path), tmp_path / "cache")
    assert len({case.orientation for case in inventory.cases}) == 3
    for case, volume in zip(inventory.cases, prepared, strict=True):
        assert (case.slices, case.slice_axis, case.slice_spacing) == (
            volume.shape[0],
            volume.slice_axis,
            volume.spacing,
        )
        assert (case.image_sha256, case.mask_values) == (volume.image_sha256, volume.mask_values)
        assert case.volumes["foreground"] == pytest.approx(volume.class_voxels[1] * math.prod(volume.spacing) / 1000)
    assert inventory.findings == ()


def test_the_volumes_of_several_classes_are_exact(tmp_path):
    write_decathlon(tmp_path, ["a", "b", "c"], TWO_CLASSES, values=(1, 2))
    case = take_inventory(tmp_path).cases[0]
    voxel_ml = 0.75 * 0.75 * 2.5 / 1000
    assert case.volumes == {"LA": pytest.approx(50 * voxel_ml), "wall": pytest.approx(voxel_ml)}
    merged = take_inventory(tmp_path, "all:1,2").cases[0]
    assert merged.volumes == {"all": pytest.approx(51 * voxel_ml)}


def test_the_default_split_equals_that_of_training(tmp_path):
    write_flat_pairs(tmp_path, 10)
    assert take_inventory(tmp_path).split == make_split([f"case_{n}" for n in range(10)], Data())


def test_scans_without_a_case_are_listed(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b", "c"], ONE_CLASS)
    unlabelled = save(root / "imagesTs" / "d.nii.gz", image_array(8))
    stray = save(root / "atlas.nii.gz", image_array(9))
    (root / "imagesTr" / "._a.nii.gz").write_bytes(b"resource fork")
    inventory = take_inventory(root)
    assert inventory.unread == (stray, unlabelled)
    assert inventory.findings == ()


def test_a_misspelt_lascarqs_file_is_listed(tmp_path):
    folder = write_lascarqs(tmp_path, 4)
    for n in (2, 4):
        (folder / f"train_{n}" / "atriumSegImgMO.nii.gz").rename(folder / f"train_{n}" / "mask.nii.gz")
    (folder / "train_4" / "enhanced.nii.gz").rename(folder / "train_4" / "Enhanced.nii.gz")
    inventory = take_inventory(tmp_path)
    assert [case.id for case in inventory.cases] == ["train_1", "train_3"]
    assert ("no mask", "enhanced.nii.gz", "train_2") in summarise(inventory, "error")
    assert [f"{path.parent.name}/{path.name}" for path in inventory.unread] == [
        "train_2/mask.nii.gz", "train_4/Enhanced.nii.gz", "train_4/mask.nii.gz",
    ]  # fmt: skip


# --- classes ---------------------------------------------------------------------------------------------------------


def test_a_class_that_no_mask_contains_is_an_error(tmp_path):
    write_flat_pairs(tmp_path, 5)
    inventory = take_inventory(tmp_path, "LA:1;wall:2")
    assert [(f.level, f.kind, f.problem) for f in inventory.findings] == [("error", "class", "no mask contains wall")]
    assert take_inventory(write_lascarqs(tmp_path / "empty", 4, value=0)).errors[0].problem == "no mask contains LA"


def test_a_class_missing_from_the_default_training_set_is_a_warning(tmp_path):
    root = write_decathlon(tmp_path, [f"c{n}" for n in range(6)], TWO_CLASSES)
    split = take_inventory(root).split
    mask = mask_array()
    mask[0, 0, 0] = 2
    save(root / "labelsTr" / f"{split.test[0]}.nii.gz", mask)
    inventory = take_inventory(root)
    assert inventory.errors == []
    (warning,) = (f for f in inventory.findings if f.kind == "class")
    assert warning.problem == f"no training case of the default split contains wall, only {split.test[0]}"
    save(root / "labelsTr" / f"{split.train[0]}.nii.gz", mask)
    assert not [f for f in take_inventory(root).findings if f.kind == "class"]


# --- several findings ------------------------------------------------------------------------------------------------


def test_all_faults_are_reported(tmp_path):
    root = write_flat_pairs(tmp_path, 12)
    for n in (0, 3, 5):
        (root / f"case_{n}_mask.nii.gz").unlink()
    for n in (1, 2):
        (root / f"case_{n}.nii.gz").unlink()
    truncate(root / "case_4.nii.gz")
    truncate(root / "case_4_mask.nii.gz")
    save(root / "case_6_mask.nii.gz", mask_array(shape=(16, 14, 5), value=0))
    shutil.copy(root / "case_7.nii.gz", root / "case_8.nii.gz")
    shutil.copy(root / "case_7.nii.gz", root / "case_9.nii.gz")
    inventory = take_inventory(root)
    assert summarise(inventory, "error") == [
        ("no mask", "case_0.nii.gz", "case_0"),
        ("no mask", "case_3.nii.gz", "case_3"),
        ("no mask", "case_5.nii.gz", "case_5"),
        ("no image", "case_1_mask.nii.gz", "case_1"),
        ("no image", "case_2_mask.nii.gz", "case_2"),
        ("image", "case_4.nii.gz", "case_4"),
        ("mask", "case_4_mask.nii.gz", "case_4"),
        ("grid", "case_6_mask.nii.gz", "case_6"),
        ("same image", "case_8.nii.gz", "case_8"),
        ("same image", "case_9.nii.gz", "case_9"),
    ]
    assert summarise(inventory, "warning") == [("empty mask", "case_6_mask.nii.gz", "case_6")]
    assert [case.id for case in inventory.cases] == [f"case_{n}" for n in (10, 11, 4, 6, 7, 8, 9)]
    assert all(f.problem and f.fix and f.file.is_absolute() for f in inventory.findings)
    broken = inventory.cases[2]
    assert (broken.shape, broken.mask_values, broken.volumes) == (None, None, None)


def test_every_second_file_of_a_case_is_named(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b", "c"], ONE_CLASS)
    for seed, name in enumerate(("a", "c"), start=7):
        save(root / "imagesTr" / f"{name}.nii", image_array(seed))
    inventory = take_inventory(root)
    assert [(f.kind, f.case) for f in inventory.errors] == [("two files", "a"), ("two files", "c")]


def test_cases_are_reported_even_without_readable_labels(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b", "c"], ONE_CLASS, values=(1, 4))
    (root / "dataset.json").write_text("{}")
    inventory = take_inventory(root)
    (error,) = inventory.errors
    assert (error.file, error.fix) == (root / "dataset.json", "Correct the file, or set data.labels.")
    assert re.match("not readable as a data set description", error.problem)
    assert inventory.labels is None
    assert [case.mask_values for case in inventory.cases] == [(1, 4)] * 3
    assert inventory.cases[0].shape == (16, 14, 4)
    assert take_inventory(root, "a:1,4").errors == []


def test_a_mask_that_lacks_one_of_several_classes_is_a_warning(tmp_path):
    root = write_decathlon(tmp_path, [f"c{n}" for n in range(6)], TWO_CLASSES, values=(1, 2))
    save(root / "labelsTr" / "c1.nii.gz", mask_array())
    save(root / "labelsTr" / "c4.nii.gz", mask_array(value=0))
    inventory = take_inventory(root)
    assert summarise(inventory) == [("lacks a class", "c1.nii.gz", "c1"), ("empty mask", "c4.nii.gz", "c4")]
    assert inventory.findings[0].problem == "the mask contains no wall"


def test_an_incomplete_download_of_a_decathlon_task_is_a_warning(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b", "c"], ONE_CLASS)
    names = ("a", "b", "c", "d", "e")
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    (root / "dataset.json").write_text(json.dumps({"labels": ONE_CLASS, "numTraining": 5, "training": training}))
    (warning,) = take_inventory(root).findings
    assert (warning.level, warning.file) == ("warning", root / "dataset.json")
    assert warning.problem == "lists 5 training cases, but d and 1 other are missing"


@pytest.mark.parametrize(
    ("count", "warns"), [(3, False), (5, True), (None, False), ("many", False), (float("inf"), False), ([5], False)]
)
def test_the_number_of_cases_in_an_nnunet_dataset_json_is_checked(tmp_path, count, warns):
    root = write_decathlon(tmp_path, ["a", "b", "c"], ONE_CLASS, "_0000")
    (root / "dataset.json").write_text(json.dumps({"labels": ONE_CLASS, "numTraining": count}))
    problems = [finding.problem for finding in take_inventory(root).findings]
    assert problems == (["lists 5 training cases, but the folder holds 3"] if warns else [])


# --- outliers --------------------------------------------------------------------------------------------------------


def by_case(volumes):
    return {str(n): volume for n, volume in enumerate(volumes)}


def test_outlier_scores_match_a_worked_example():
    # Logarithms -4, -0.6, -0.3, 0, 0.3, 0.6, 4: median 0, median absolute deviation 0.6
    scores = find_volume_outliers(by_case(np.exp([-4, -0.6, -0.3, 0, 0.3, 0.6, 4])))
    z = 4 * 0.6744897501960817 / 0.6  # 0.6745: ratio of median absolute to standard deviation of a normal distribution
    assert scores == {"0": pytest.approx(-z), "6": pytest.approx(z)}
    assert find_volume_outliers(by_case(np.exp([-3, -0.6, -0.3, 0, 0.3, 0.6, 3]))) == {}  # z = 3.37


def test_nearly_equal_volumes_do_not_make_an_ordinary_volume_an_outlier():
    equal_volumes = [100.0, 100.0, 100.0, 100.0]
    assert find_volume_outliers(by_case([*equal_volumes, 140])) == {}
    assert find_volume_outliers(by_case([*equal_volumes, 150])) == {"4": pytest.approx(math.log(1.5) / 0.1)}
    assert find_volume_outliers(by_case([*equal_volumes, 100 / 1.5])) == {"4": pytest.approx(-math.log(1.5) / 0.1)}


def test_fewer_than_five_cases_have_no_outliers():
    assert find_volume_outliers(by_case([100, 100, 100, 1])) == {}
    assert find_volume_outliers({}) == {}


def test_outliers_do_not_depend_on_the_unit():
    volumes = np.random.default_rng(3).lognormal(4, 0.3, 130)
    volumes[[7, 99]] = 2, 2000
    scores = find_volume_outliers(by_case(volumes))
    assert scores.keys() >= {"7", "99"}
    assert len(scores) < 5
    in_litres = find_volume_outliers(by_case(volumes / 1000))
    assert in_litres == {name: pytest.approx(z) for name, z in scores.items()}


def test_an_outlier_is_named_with_its_class(tmp_path):
    root = write_decathlon(tmp_path, [f"c{n}" for n in range(6)], TWO_CLASSES, values=(1, 2))
    mask = mask_array()
    mask[0] = 2
    save(root / "labelsTr" / "c3.nii.gz", mask)
    (warning,) = take_inventory(root).findings
    assert (warning.kind, warning.case, warning.file) == ("volume", "c3", root / "labelsTr" / "c3.nii.gz")
    assert warning.problem.startswith("wall has 0.0788 ml, the median is 0.00141 ml")


# --- memory and real scans -------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_cases(tmp_path):
    shape = (64, 64, 40)
    for n in range(12):
        for root in (tmp_path / "few", tmp_path / "many")[n >= 3 :]:  # three cases in few, twelve in many
            save(root / f"{n}.nii.gz", image_array(n, shape))  # compressed: an uncompressed file would be memory-mapped
            save(root / f"{n}_mask.nii.gz", mask_array(shape))
    peaks = []
    for folder in ("few", "few", "many"):  # the first run is a warm-up
        tracemalloc.start()
        assert take_inventory(tmp_path / folder).errors == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] > 2 * np.prod(shape)  # the peak includes the arrays
    assert peaks[2] < peaks[1] + np.prod(shape)  # half of one image


def test_real_scans_have_no_errors(hippocampus):
    inventory = take_inventory(hippocampus)
    assert len(inventory.cases) == 60
    assert inventory.errors == []
    assert {case.slice_axis for case in inventory.cases} == {"head-foot"}
    assert {case.mask_values for case in inventory.cases} == {(1, 2)}
    totals = [sum(case.volumes.values()) for case in inventory.cases]
    assert 2 < min(totals) < max(totals) < 5  # ml, plausible for a hippocampus
