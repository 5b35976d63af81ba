"""Scores per case and their means: which units are averaged, and that a missed structure always lowers the mean."""

import csv
import json
from statistics import stdev

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.evaluation.summary import (
    case_means,
    format_summary,
    score_case,
    summarise,
    write_cases,
    write_lascarqs2022,
    write_summary,
)

SPACING = (1.0, 1.0, 2.0)


def labels(**boxes):
    """Return a volume [8, 8, 6] with box `a` as class 1 and box `b` as class 2: (start, stop) along each axis."""
    volume = np.zeros((8, 8, 6), np.uint8)
    for value, name in enumerate("ab", start=1):
        if name in boxes:
            volume[tuple(slice(*r) for r in boxes[name])] = value
    return volume


A, A_HALF = ((0, 4), (0, 4), (0, 4)), ((0, 4), (0, 4), (0, 2))
B = ((4, 8), (4, 8), (0, 4))


def test_scores_are_averaged_over_classes_first_and_then_over_cases():
    reference = labels(a=A, b=B)
    rows = score_case("one", reference, reference, SPACING, ["a", "b"])
    rows += score_case("two", labels(a=A_HALF), reference, SPACING, ["a", "b"])
    assert [(row["case"], row["class"]) for row in rows] == [("one", "a"), ("one", "b"), ("two", "a"), ("two", "b")]
    summary = summarise(rows, "volume", "one", ["a", "b"])
    second = (2 / 3 + 0) / 2  # half of a is found, b is missed
    assert summary["dice"] == pytest.approx(
        {"mean": (1 + second) / 2, "sd": stdev([1, second]), "n": 2, "unit": "volume"}
    )
    assert summary["classes"]["b"]["dice"]["mean"] == pytest.approx(0.5)
    assert summary["classes"]["a"]["recall"]["mean"] == pytest.approx(0.75)
    assert summary["classes"]["a"]["volume_ml"]["mean"] == pytest.approx((0.128 + 0.064) / 2)


@pytest.mark.parametrize("empty", ["one", "zero", "skip"])
def test_a_missed_structure_lowers_the_mean_under_every_policy(empty):
    found = score_case("found", labels(a=A_HALF), labels(a=A), SPACING, ["a"], empty=empty)
    missed = score_case("missed", labels(), labels(a=A), SPACING, ["a"], empty=empty)
    without, with_miss = (summarise(rows, "volume", empty, ["a"]) for rows in (found, found + missed))
    for metric in ("dice", "iou", "precision", "recall", "nsd_1mm", "nsd_2mm"):
        assert with_miss[metric]["mean"] == pytest.approx(without[metric]["mean"] / 2)
    for metric in ("hd_mm", "hd95_mm", "assd_mm"):
        assert with_miss[metric]["mean"] > without[metric]["mean"]
    assert with_miss["dice"]["n"] == 2
    assert with_miss["skipped"] == {"units": 0, "rows": 0}


def test_dice_of_the_same_masks_depends_on_unit_and_policy():
    """Ten slices, five with LA: four are segmented perfectly, one is missed; there are no false positives."""
    reference = np.zeros((10, 6, 6), np.uint8)
    reference[:5, 1:5, 1:5] = 1
    prediction = reference.copy()
    prediction[4] = 0

    def dice(unit, empty):
        rows = score_case("case", prediction, reference, SPACING, ["LA"], unit=unit, empty=empty)
        summary = summarise(rows, unit, empty, ["LA"])
        return summary["dice"]["mean"], summary["dice"]["n"], summary["skipped"]["units"]

    assert dice("volume", "one") == pytest.approx((2 * 64 / (64 + 80), 1, 0))
    assert dice("slice", "one") == pytest.approx((9 / 10, 10, 0))
    assert dice("slice", "zero") == pytest.approx((4 / 10, 10, 0))
    assert dice("slice", "skip") == pytest.approx((4 / 5, 5, 5))


def test_slices_lie_along_the_first_axis_and_use_the_spacing_of_the_last_two():
    reference = labels(a=A)
    rows = score_case("case", reference, reference, (5.0, 1.0, 2.0), ["a", "b"], unit="slice")
    assert [(row["slice"], row["class"]) for row in rows] == [(i, c) for i in range(8) for c in "ab"]
    assert [row["reference_area_mm2"] for row in rows if row["class"] == "a"] == 4 * [4 * 4 * 2] + 4 * [0]


def test_skip_leaves_out_classes_and_units_and_counts_them():
    rows = score_case("both", labels(a=A), labels(a=A), SPACING, ["a", "b"], empty="skip")  # no mask contains b
    rows += score_case("none", labels(a=A), labels(), SPACING, ["a", "b"], empty="skip")
    summary = summarise(rows, "volume", "skip", ["a", "b"])
    assert summary["dice"] == {"mean": 1, "sd": None, "n": 1, "unit": "volume"}
    assert summary["classes"]["b"]["dice"] == {"mean": None, "sd": None, "n": 0, "unit": "volume"}
    assert summary["skipped"] == {"units": 1, "rows": 3}


def test_a_class_absent_from_all_references_is_left_out_of_means_over_classes():
    rows = score_case("one", labels(a=A_HALF), labels(a=A), SPACING, ["a", "b"])
    rows += score_case("two", labels(a=A, b=B), labels(a=A), SPACING, ["a", "b"])
    assert case_means(rows, "dice") == pytest.approx({"one": 2 / 3, "two": 1})
    summary = summarise(rows, "volume", "one", ["a", "b"])
    assert summary["dice"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert summary["classes"]["b"]["dice"]["mean"] == 0.5  # absent in one prediction, and wrongly found in the other
    rows += score_case("three", labels(), labels(b=B), SPACING, ["a", "b"])
    summary = summarise(rows, "volume", "one", ["a", "b"])
    assert summary["absent_classes"] == []
    assert summary["dice"]["mean"] == pytest.approx(((2 / 3 + 1) / 2 + (1 + 0) / 2 + (1 + 0) / 2) / 3)


def test_a_summary_is_json_with_definitions_of_its_metrics(tmp_path):
    rows = score_case("case", labels(a=A_HALF), labels(a=A), SPACING, ["a"])
    summary = summarise(rows, "volume", "one", ["a"])
    write_summary(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["dice"]["sd"] is None
    assert summary["empty_policy"] == "one"
    assert set(summary["definitions"]) == {metric for metric in summary if isinstance(summary[metric], dict)} - {
        "classes", "skipped", "definitions",
    }  # fmt: skip
    assert "volume_ml" in summary["definitions"]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_summary({"dice": float("nan")}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_cases_csv_has_extra_columns_and_empty_cells_for_skipped_rows(tmp_path):
    rows = score_case("x", labels(a=A), labels(a=A), SPACING, ["a", "b"], empty="skip")
    rows = [{**row, "atlas_dice": 0.5} for row in rows]
    write_cases(rows, tmp_path / "cases.csv")
    with open(tmp_path / "cases.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first)[:4] == ["case", "class", "dice", "iou"]
    assert list(first)[-1] == "atlas_dice"
    assert (first["dice"], first["atlas_dice"], second["dice"]) == ("1.0", "0.5", "")


def test_cases_csv_has_a_slice_column_only_for_slices(tmp_path):
    rows = score_case("x", labels(a=A), labels(a=A), SPACING, ["a"], unit="slice")
    write_cases(rows, tmp_path / "cases.csv")
    header = (tmp_path / "cases.csv").read_text().splitlines()[0]
    assert header.startswith("case,slice,class,dice,")
    assert header.endswith(",area_mm2,reference_area_mm2")


def test_the_challenge_table_has_the_columns_of_lascarqs2022(tmp_path):
    rows = score_case("train_1", labels(a=A_HALF), labels(a=A), SPACING, ["LA"])
    write_lascarqs2022(rows, tmp_path / "table.csv")
    header, line = (tmp_path / "table.csv").read_text().splitlines()
    assert header == "Casename,LAcavity_Dice,LAcavity_ASD,LAcavity_HD"
    case, *values = line.split(",")
    assert case == "train_1"
    assert [float(v) for v in values] == [rows[0]["dice"], rows[0]["assd_mm"], rows[0]["hd_mm"]]
    assert float(values[2]) == 4  # the prediction lacks two slices of 2 mm

    several = score_case("x", labels(a=A), labels(a=A), SPACING, ["a", "b"])
    slices = score_case("x", labels(a=A), labels(a=A), SPACING, ["a"], unit="slice")
    for rows in (several, slices):
        with pytest.raises(InputError, match="protocol=lascarqs2022"):
            write_lascarqs2022(rows, tmp_path / "never.csv")


def test_the_printed_summary_names_unit_and_n():
    rows = score_case("x", labels(a=A), labels(a=A), SPACING, ["a", "b"])
    lines = format_summary(summarise(rows, "volume", "one", ["a", "b"])).splitlines()
    assert lines[0].split() == ["metric", "mean", "sd", "n", "unit"]
    assert lines[1].split() == ["dice", "1.0000", "-", "1", "volume"]
    assert lines[-1].split() == ["dice", "of", "b", "1.0000", "-", "1", "volume"]


def test_unknown_classes_different_shapes_and_empty_summaries_are_refused():
    volume = labels(a=A, b=B)
    with pytest.raises(InputError, match="case x: the prediction holds values"):
        score_case("x", volume, labels(), SPACING, ["a"])
    with pytest.raises(InputError, match="case x: the prediction has shape"):
        score_case("x", volume[:4], volume, SPACING, ["a", "b"])
    with pytest.raises(InputError, match="rows: empty"):
        summarise([], "volume", "one", ["a"])
