"""Several scans of one patient: which cases are grouped, and that no split separates them."""

import json
import logging
import re
from dataclasses import replace

import pytest
from jaxla.experiments import EXPERIMENTS

from jaxla.config import Data, InputError
from jaxla.data.dataset import prepare_data
from jaxla.data.patients import describe_shared_patients, group_by_patient
from jaxla.data.split import make_split
from tests.commands import run_in_this_process
from tests.data.nifti import image_array, mask_array, save

IDS = [f"P{n:02}_t{k}" for n in range(20) for k in range(2)]


def patient_ids(cases):
    return {case[:3] for case in cases}


def write_folds(path, folds):
    path.write_text(json.dumps(folds))
    return Data(split=str(path))


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        ["P1_t0", "P1_t1"],
        ["smith_t0", "smith_t12"],
        ["patient001_ED", "patient001_ES"],
        ["P1_visit2", "P1_visit3"],
        ["P1-visit-1-ED", "P1-visit-2-ED"],
        ["P1-1", "P1-2"],
        ["P1_pre", "P1_post"],
        ["P1_scan1", "P1_scan2"],
        ["P1_frame01", "P1_frame12"],
        ["sub-01_ses-1_LGE", "sub-01_ses-2_LGE"],
        ["sub-01_ses-pre", "sub-01_ses-post"],
        ["P1", "P1_t1"],
    ],
)
def test_scans_of_one_patient_are_recognised_by_their_ids(ids):
    problem, fix = describe_shared_patients([*ids, "P2_t0"])
    first, second = sorted(ids)
    assert problem == f"cases {first} and {second} seem to be scans of one patient, which the split may separate"
    assert "data.patients=auto" in fix
    assert sorted(map(len, group_by_patient([*ids, "P2_t0"], "auto").values())) == [1, 2]


@pytest.mark.parametrize("form", ["train_{}", "hippocampus_{:03}", "case-{}", "ISLES-2022-{}", "scan{}", "LA_scan{}"])
def test_numbered_cases_are_patients(form):
    assert describe_shared_patients([form.format(n) for n in range(12)]) is None


def test_a_regular_expression_names_the_patient_by_its_group_or_its_match():
    for expression in (r"P\d+", r"(P\d+)_t\d"):
        assert group_by_patient(["P1_t0", "P2_t0", "P1_t1"], expression) == {"P1": ["P1_t0", "P1_t1"], "P2": ["P2_t0"]}


@pytest.mark.parametrize(
    "table", ["case,patient\na,X\nb,X\nc,Y\n", "\ufeffpatient;case;age\r\nX;a;1\r\nX;b;2\r\nY;c;3\r\n"]
)
def test_a_table_names_the_patients(tmp_path, table):
    path = tmp_path / "patients.csv"
    path.write_text(table, encoding="utf-8")
    assert group_by_patient(["a", "b", "c"], str(path)) == {"X": ["a", "b"], "Y": ["c"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "not a table"),
        (b"\xff\xfe\x00", "not a table"),
        (b"a,X\nb,X\n", "not a table"),
        (b"case,patient\na\n", "not a table"),
        (b"case,patient\na,X\na,Y\n", "assigns no patient, or several, to case a"),
        (b"case,patient\na,\nb,X\n", "assigns no patient, or several, to case a"),
        (b"case,patient\na,X\n", "assigns no patient to case b"),
    ],
)
def test_a_table_that_does_not_name_every_patient_is_refused(tmp_path, content, message):
    path = tmp_path / "patients.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^data.patients={path}: {message}"):
        group_by_patient(["a", "b"], str(path))


@pytest.mark.parametrize(
    ("expression", "message"), [("(P", "not a regular expression"), ("P0", "assigns no patient to case P10_t0")]
)
def test_an_expression_that_does_not_name_every_patient_is_refused(expression, message):
    with pytest.raises(InputError, match=f"^data.patients={re.escape(expression)}: {message}"):
        group_by_patient(IDS, expression)


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["", "0", "1", "2", "3", "4", "all"])
def test_no_drawn_split_separates_a_patient(fold):
    split = make_split(IDS, Data(patients="auto"), fold)
    parts = (split.train, split.val, split.test)
    assert sorted(case for part in parts for case in part) == IDS
    assert sum(len(patient_ids(part)) for part in parts) == 20
    assert len(split.test) == 8


def test_patients_are_drawn_like_cases_with_the_same_names():
    """The patients P00 to P19 are split like twenty cases of these names."""
    names = [f"P{n:02}" for n in range(20)]
    for options in ({}, {"split_seed": 3}, {"train_patients": 3}, {"train_percent": 50, "subset_seed": 2}):
        expected = make_split(names, Data(**options))
        split = make_split(IDS, Data(patients=r"P\d+", **options))
        for part in ("train", "val", "test", "unused"):
            assert getattr(split, part) == tuple(f"{p}_t{k}" for p in getattr(expected, part) for k in range(2))


def test_a_split_file_that_separates_a_patient_is_refused(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": IDS[:5], "val": IDS[5:8], "test": IDS[8:]}))
    assert len(make_split(IDS, Data(split=str(path))).train) == 5
    message = f"^data.split={path}: separates the scans of patient P02: P02_t0 is in train, P02_t1 in val"
    with pytest.raises(InputError, match=message):
        make_split(IDS, Data(split=str(path), patients="auto"))


def test_a_split_file_that_keeps_patients_together_is_used_as_it_is(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": IDS[:7], "val": IDS[8:10], "test": IDS[10:]}))  # without P03_t1
    split = make_split(IDS, Data(split=str(path), patients="auto"))
    assert (split.train, split.val, split.test) == (tuple(IDS[:7]), tuple(IDS[8:10]), tuple(IDS[10:]))


def test_folds_of_nnunet_are_used_with_their_number(tmp_path):
    vals = [IDS[2 * k : 2 * k + 2] for k in range(5)]
    folds = [{"train": [case for case in IDS[:10] if case not in val], "val": val} for val in vals]
    protocol = write_folds(tmp_path / "splits_final.json", folds)
    for k, fold in enumerate(folds):
        split = make_split(IDS, protocol, str(k))
        assert (list(split.train), list(split.val), split.test) == (fold["train"], fold["val"], ())
    assert make_split(IDS, protocol, "all") == make_split(IDS, protocol, "0")
    with pytest.raises(InputError, match=r"holds 5 folds without test cases\. Choose one with fold=0"):
        make_split(IDS, protocol)


@pytest.mark.parametrize(
    ("folds", "fold", "message"),
    [
        ([{"train": ["P00_t0"], "val": ["P00_t1"]}], "3", r"fold=3: data.split=.* holds only 1 fold"),
        ([{"train": ["P00_t0"], "val": ["P00_t1"]}], "all", "holds 1 fold, but fold=all trains 5"),
        ([{"train": ["P00_t0"], "val": ["x"]}], "0", "case x is not in the data"),
        ([{"train": ["P00_t0", "P01_t0"], "val": ["P01_t0"]}], "0", "lists case P01_t0 twice"),
        ([{"train": ["P00_t0"], "val": ["P00_t1"]}], "0", "separates the scans of patient P00"),
        ([{"train": ["P00_t0"], "val": "P00_t1"}], "0", "not a split file"),
        ([{"train": ["P00_t0"]}], "0", "not a split file"),
        ([], "0", "not a split file"),
    ],
)
def test_folds_that_do_not_fit_the_data_are_refused(tmp_path, folds, fold, message):
    write_folds(tmp_path / "splits_final.json", folds)
    protocol = Data(split=str(tmp_path / "splits_final.json"), patients="auto")
    with pytest.raises(InputError, match=message):
        make_split(IDS, protocol, fold)


# --- in commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def visits(tmp_path):
    """A folder with two scans of each of four patients, with file names that no layout recognises."""
    for n in range(8):
        folder = tmp_path / "visits" / f"P{n // 2:02}_t{n % 2}"
        save(folder / "lge.nii.gz", image_array(n))
        save(folder / "atrium.nii.gz", mask_array())
    return tmp_path / "visits"


def test_training_warns_once_unless_patients_are_grouped(visits, tmp_path, caplog):
    files = {"root": str(visits), "image": "*/lge", "mask": "*/atrium"}
    with caplog.at_level(logging.WARNING, "jaxla"):
        prepare_data(replace(EXPERIMENTS["quickstart"], data=Data(**files)), tmp_path / "cache")
        (warning,) = caplog.messages
        assert "cases P00_t0 and P00_t1 seem to be scans of one patient" in warning
        assert "(4 patients with several scans)" in warning
        caplog.clear()
        grouped = Data(**files, patients="auto")
        split = prepare_data(replace(EXPERIMENTS["quickstart"], data=grouped), tmp_path / "cache").split
        assert caplog.messages == []
    assert (len(split.train), len(split.val), len(split.test)) == (4, 2, 2)
    assert not patient_ids(split.train) & patient_ids(split.val + split.test)


def test_verify_reads_patterns_and_patients_as_training_does(visits, tmp_path):
    options = (f"--data.root={visits}", "--data.image=*/lge", "--data.mask=*/atrium")
    ungrouped, grouped = (
        run_in_this_process(tmp_path, "jaxla.verify", *options, *p) for p in ((), ("--data.patients=auto",))
    )
    assert (ungrouped.returncode, grouped.returncode) == (0, 0)
    assert "cases P00_t0 and P00_t1 seem to be scans of one patient" in ungrouped.stdout
    assert "Use --data.patients=auto to keep them together" in ungrouped.stdout
    assert "8; default split: 4 training, 2 validation, 2 test" in grouped.stdout
    assert "0 errors, 0 warnings" in grouped.stdout
