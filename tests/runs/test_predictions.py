"""The description of a mask in `predictions.csv`, and which scans count as different from the training scans."""

import nibabel as nib
import numpy as np
import pytest

from jaxla.cli.csv_files import read_csv, write_csv
from jaxla.data.volumes import Volume
from jaxla.runs.predictions import describe_mask, replace_rows
from jaxla.runs.training_scans import KnownScans, ScanFacts, find_differences, find_part, summarise_scans

pytestmark = pytest.mark.quick


def test_a_mask_is_described_by_class():
    """Slices of 5 mm lie along the first axis; a voxel has 0.5 · 0.5 · 5 = 1.25 µl."""
    volume = Volume("scan", np.zeros((6, 4, 4)), np.diag([5.0, 0.5, 0.5, 1]), nib.Nifti1Header())
    classes = np.zeros((6, 4, 4), np.uint8)
    classes[1:3, 1:3, 1:3] = 1
    classes[3, 3, 3] = 1  # touches a corner of the first box, and the border
    classes[4, 1, 1] = 2
    first, second, third = describe_mask(classes, ["a", "b", "c"], volume)
    assert first == {
        "class": "a", "volume_ml": pytest.approx(9 * 1.25e-3), "voxels": 9, "connected_parts": 2, "slices": 3,
        "touches_border": "yes",
    }  # fmt: skip
    assert [second[name] for name in ("voxels", "connected_parts", "slices", "touches_border")] == [1, 1, 1, "no"]
    assert [third[name] for name in ("voxels", "connected_parts", "slices", "touches_border")] == [0, 0, 0, "no"]


def test_the_axis_of_a_single_slice_has_no_border():
    volume = Volume("scan", np.zeros((4, 4, 1)), np.eye(4), nib.Nifti1Header())
    classes = np.zeros((4, 4, 1), np.uint8)
    classes[1:3, 1:3] = 1
    assert describe_mask(classes, ["a"], volume)[0]["touches_border"] == "no"
    classes[0, 1] = 1
    assert describe_mask(classes, ["a"], volume)[0]["touches_border"] == "yes"


def test_rows_are_replaced_by_case_and_columns_of_the_user_are_kept(tmp_path):
    table = tmp_path / "predictions.csv"
    replace_rows(table, ["a", "b"], [{"case": "a", "voxels": 1}, {"case": "b", "voxels": 2}])
    rows = read_csv(table)
    write_csv(table, [*rows[0], "note"], [row | {"note": f"good {row['case']}"} for row in rows])
    replace_rows(table, ["b"], [{"case": "b", "voxels": 3}])
    cells = [(row["case"], row["voxels"], row["note"]) for row in read_csv(table)]
    assert cells == [("a", "1", "good a"), ("b", "3", "")]


LA_SCAN = {
    "slice_axis": "head-foot",
    "spacing_mm": (2.5, 0.625, 0.625),
    "size_mm": (110.0, 360.0, 360.0),
    "grey_median": 0.2,
}


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({}, []),
        ({"spacing_mm": (3.6, 0.5, 0.5), "size_mm": (100.0, 300.0, 400.0), "grey_median": 0.45}, []),
        (
            {"spacing_mm": (4.0, 0.625, 0.625)},
            ["spacing 4 × 0.625 × 0.625 mm (training: 2.5 × 0.625 × 0.625 mm)"],
        ),
        (
            {"size_mm": (36.0, 50.0, 35.0)},
            ["size 36 × 50 × 35 mm (training: 100 × 360 × 360 to 110 × 360 × 360 mm)"],
        ),
        ({"grey_median": 0.6}, ["median grey value at 60% of the range (training: 20% to 30%)"]),
        ({"slice_axis": "left-right"}, ["slices along left-right (training: head-foot)"]),
    ],
)
def test_a_scan_is_different_if_it_exceeds_the_range_of_the_training_scans_by_a_margin(changes, differences):
    second = LA_SCAN | {"size_mm": (100.0, 360, 360), "grey_median": 0.3}
    training = summarise_scans([ScanFacts(**LA_SCAN), ScanFacts(**second)])
    assert find_differences(ScanFacts(**LA_SCAN | changes), training) == differences


def test_the_part_of_a_scan_is_found_by_its_voxels_first_and_then_by_its_name():
    known = KnownScans({"a": "training", "b": "test"}, {"0a": "a", "0b": "b", "0c": "c"}, {})
    parts = [find_part(known, *scan) for scan in (("b", "0a"), ("x", "0b"), ("x", "0c"), ("a", "1"), ("x", "1"))]
    assert parts == ["training", "test", "unused", "training (same name)", ""]
