"""python -m jaxla.evaluate: its output files, and its errors."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.dicom_seg import write_segmentation
from jaxla.evaluate import main
from tests.commands import ROOT, run_in_new_process
from tests.data.formats import save_dicom
from tests.data.nifti import image_array, mask_array
from tests.data.nifti import save as save_mask

AFFINE = np.diag([1.0, 1.0, 2.5, 1.0])
SHAPE = (16, 14, 8)


def save(path, *boxes, values=(1, 2), affine=AFFINE, shape=SHAPE):
    """Write a mask with a box of each value; a box is (start, stop) along each axis."""
    array = np.zeros(shape, np.int16)
    for value, box in zip(values, boxes, strict=False):
        array[tuple(slice(*r) for r in box)] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


BOX, HALF_BOX, OTHER_BOX = ((2, 6), (2, 6), (2, 6)), ((2, 6), (2, 6), (2, 4)), ((8, 12), (2, 6), (2, 6))


@pytest.fixture
def folders(tmp_path):
    """Write two cases with one class and the mask values of LAScarQS: one is half predicted, the other is missed."""
    for case, value in (("train_1", 255), ("train_2", 420)):
        save(tmp_path / "references" / f"{case}.nii.gz", BOX, values=[value])
    save(tmp_path / "predictions" / "train_1.nii.gz", HALF_BOX)
    save(tmp_path / "predictions" / "train_2.nii")
    return tmp_path


def options(folder, *extra):
    names = {"predictions": folder / "predictions", "references": folder / "references", "output": folder / "out"}
    return [*(f"--{name}={path}" for name, path in names.items()), *extra]


def run_evaluate(*arguments):
    return run_in_new_process(ROOT, "jaxla.evaluate", *arguments)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_writes_all_tables(folders):
    done = run_evaluate(*options(folders, "--protocol=lascarqs2022"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "one class: any non-zero value (found [1, 255, 420])" in done.stdout
    assert "dice" in done.stdout
    assert sorted(path.name for path in (folders / "out").iterdir()) == [
        "cases.csv",
        "lascarqs2022.csv",
        "summary.json",
    ]
    assert not list(folders.glob(".*"))

    rows = read_csv(folders / "out" / "cases.csv")
    assert [(row["case"], row["class"]) for row in rows] == [("train_1", "foreground"), ("train_2", "foreground")]
    assert [float(row["dice"]) for row in rows] == pytest.approx([2 / 3, 0])
    assert float(rows[0]["hd_mm"]) == 5  # two slices of 2.5 mm
    assert float(rows[0]["reference_volume_ml"]) == pytest.approx(0.16)
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["dice"] == pytest.approx({"mean": 1 / 3, "sd": (2 / 9) ** 0.5, "n": 2, "unit": "volume"})
    challenge = read_csv(folders / "out" / "lascarqs2022.csv")
    assert list(challenge[0]) == ["Casename", "LAcavity_Dice", "LAcavity_ASD", "LAcavity_HD"]
    assert [row["Casename"] for row in challenge] == ["train_1", "train_2"]


def test_volumes_are_sliced_along_the_coarsest_axis(folders):
    """Dice is 1 in two and 0 in two slices of `train_1`, and 0 in four slices of `train_2`."""
    main(options(folders, "--unit=slice", "--empty=skip"))
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["dice"] == pytest.approx({"mean": 0.25, "sd": 0.46291, "n": 8, "unit": "slice"}, abs=1e-5)
    assert summary["skipped"]["units"] == 8
    assert len(read_csv(folders / "out" / "cases.csv")) == 16  # eight slices of each case


def test_several_classes_are_taken_from_the_references(tmp_path, capsys):
    save(tmp_path / "references" / "a.nii.gz", BOX, OTHER_BOX, values=(2, 5))
    save(tmp_path / "predictions" / "a.nii.gz", BOX, values=[2])
    main(options(tmp_path))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: values["dice"]["mean"] for name, values in summary["classes"].items()} == {"2": 1, "5": 0}
    assert summary["dice"]["mean"] == 0.5
    assert "dice of 5" in capsys.readouterr().out


def test_references_may_be_a_data_set(tmp_path):
    for n in (2, 10):
        folder = tmp_path / "references" / "task2" / "train_data" / f"train_{n}"
        save(folder / "atriumSegImgMO.nii.gz", BOX, values=[420])
        save(folder / "enhanced.nii.gz", BOX)
        save(tmp_path / "predictions" / f"train_{n}.nii.gz", BOX)
    main(options(tmp_path))
    rows = read_csv(tmp_path / "out" / "cases.csv")
    assert [(row["case"], row["class"], row["dice"]) for row in rows] == [
        ("train_2", "LA", "1.0"),
        ("train_10", "LA", "1.0"),
    ]


def test_references_may_be_patient_folders_with_dicom_slices(tmp_path):
    for name in ("P1", "P2"):
        series = save_dicom(tmp_path / "references" / name, image_array())
        save_mask(series / "mask.nii.gz", mask_array())
        save_mask(tmp_path / "predictions" / f"{name}.nii.gz", mask_array())
    main(options(tmp_path))
    rows = read_csv(tmp_path / "out" / "cases.csv")
    assert [(row["case"], row["dice"]) for row in rows] == [("P1", "1.0"), ("P2", "1.0")]


def test_segment_numbers_of_a_predicted_dicom_segmentation_are_class_indices(tmp_path):
    """The references store class 1 as 2, and class 2 as 1."""
    series, classes = save_dicom(tmp_path / "series", image_array()), mask_array()
    classes[classes.shape[0] // 3] *= 2
    write_segmentation(tmp_path / "predictions" / "a.dcm", classes, ["a", "b"], series)
    save_mask(tmp_path / "references" / "a.nii.gz", np.array([0, 2, 1], np.uint8)[classes])
    main(options(tmp_path, "--data.labels=a:2;b:1"))
    assert [row["dice"] for row in read_csv(tmp_path / "out" / "cases.csv")] == ["1.0", "1.0"]


@pytest.mark.parametrize(
    ("labels", "classes"), [("a:2;background:5", {"a": 1}), ("a:2,5", {"a": 2 / 3}), ("a:5;b:2", {"a": 0, "b": 1})]
)
@pytest.mark.parametrize("images", [True, False], ids=["a data set", "only masks"])
def test_labels_are_interpreted_as_in_training(tmp_path, labels, classes, images):
    """The reference has a box of 2 and a box of 5, both of the same size; the prediction has only the box of 2."""
    save(tmp_path / "references" / "a_mask.nii.gz", BOX, OTHER_BOX, values=(2, 5))
    if images:
        save(tmp_path / "references" / "a.nii.gz", BOX)
    save(tmp_path / "predictions" / "a.nii.gz", BOX, values=[2])
    main(options(tmp_path, f"--data.labels={labels}"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: values["dice"]["mean"] for name, values in summary["classes"].items()} == pytest.approx(classes)


def test_background_rest_refuses_values_that_only_predictions_contain(tmp_path, caplog):
    save(tmp_path / "references" / "a.nii.gz", BOX, OTHER_BOX, values=(1, 7))
    save(tmp_path / "predictions" / "a.nii.gz", BOX, OTHER_BOX, values=(1, 7))
    labels = "--data.labels=hippocampus:1;background:rest"
    with caplog.at_level("INFO", "jaxla"):
        main(options(tmp_path, labels))
    assert "classes: hippocampus: 1; all other values are background" in caplog.text
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["dice"]["mean"] == 1
    save(tmp_path / "predictions" / "a.nii.gz", BOX, values=[255])
    with pytest.raises(InputError, match=r"predictions/a.nii.gz: label values 255 are not among the classes \(hippoc"):
        main([*options(tmp_path, labels), f"--output={tmp_path / 'again'}"])


def test_predictions_of_cases_outside_the_split_are_ignored_and_counted(folders, caplog):
    (folders / "split.json").write_text('{"train": ["train_2"], "val": ["x"], "test": ["train_1"]}')
    with caplog.at_level("INFO", "jaxla"):
        main(options(folders, f"--cases={folders / 'split.json'}"))
    assert [row["case"] for row in read_csv(folders / "out" / "cases.csv")] == ["train_1"]
    assert "split.json: 1 prediction of other cases ignored" in caplog.text


def test_a_class_that_no_reference_contains_does_not_raise_the_mean(folders, capsys):
    """Both predictions also lack the class `scar`, which counts as perfect."""
    for case in (1, 2):
        save(folders / "references" / f"train_{case}.nii.gz", BOX)
    main(options(folders, "--data.labels=LA:1;scar:7"))
    summary = json.loads((folders / "out" / "summary.json").read_text())
    assert summary["dice"] == pytest.approx({"mean": 1 / 3, "sd": (2 / 9) ** 0.5, "n": 2, "unit": "volume"})
    assert summary["absent_classes"] == ["scar"]
    assert summary["classes"]["scar"]["dice"]["mean"] == 1
    assert "no reference contains scar, so the mean over classes leaves it out" in capsys.readouterr().out


def test_labels_absent_from_all_references_are_refused(folders):
    message = r"references: the references hold the values 255, 420, but no value of a class \(LA: 3; all other val"
    with pytest.raises(InputError, match=message):
        main(options(folders, "--data.labels=LA:3;background:rest"))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ('["train_1", "train_1"]', "lists case train_1 twice"),
        ('"train_1"', "not a split file"),
        ("[[1]]", "not a split file"),
        ("[]", "lists no test cases"),
    ],
)
def test_a_split_with_a_faulty_list_of_test_cases_is_refused(folders, test, message):
    (folders / "split.json").write_text(f'{{"train": ["train_2"], "val": ["x"], "test": {test}}}')
    with pytest.raises(InputError, match=f"cases=.*split.json: {message}"):
        main(options(folders, f"--cases={folders / 'split.json'}"))


def test_probabilities_among_the_masks_are_logged_and_not_scored(folders, caplog):
    save(folders / "predictions" / "train_1_probabilities.nii.gz", BOX)
    with caplog.at_level("INFO", "jaxla"):
        main(options(folders))
    assert "train_1_probabilities.nii.gz: probabilities, not scored" in caplog.text
    assert [row["case"] for row in read_csv(folders / "out" / "cases.csv")] == ["train_1", "train_2"]


def test_an_error_is_one_line_and_writes_no_files(folders):
    save(folders / "predictions" / "stray.nii.gz")
    done = run_evaluate(*options(folders))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "stray.nii.gz: this prediction has no reference" in done.stderr
    assert sorted(path.name for path in folders.iterdir()) == ["predictions", "references"]


def two_masks_of_one_case(folder):
    for path in (folder / "references").iterdir():
        path.unlink()
    for suffix in ("mask", "seg"):
        save(folder / "references" / f"train_1_{suffix}.nii.gz", BOX)


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        (
            lambda f: (f / "predictions" / "train_2.nii").unlink(),
            (),
            "train_2.nii.gz: this reference has no prediction",
        ),
        (
            lambda f: save(f / "predictions" / "train_2.nii.gz"),
            (),
            "train_2.nii.gz: belongs to the same case as train_2.nii",
        ),
        (lambda f: save(f / "predictions" / "train_2.nii", shape=(4, 4, 4)), (), "train_2.nii: .*shape .*4, 4, 4"),
        (lambda f: save(f / "predictions" / "train_2.nii", affine=np.eye(4)), (), "train_2.nii: .*different affine"),
        (
            lambda f: save(f / "predictions" / "train_2.nii", BOX, OTHER_BOX),
            (),
            "train_2.nii: label values 1, 2 are not",
        ),
        (lambda f: (f / "predictions" / "train_2.nii").write_bytes(b"text"), (), "train_2.nii: not a NIfTI"),
        (lambda f: (f / "out").mkdir(), (), "--output=.*exists"),
        (two_masks_of_one_case, (), "train_1_seg.nii.gz: belongs to the same case as train_1_mask.nii.gz"),
        (lambda f: None, ("--unit=slice", "--protocol=lascarqs2022"), "--protocol=lascarqs2022"),
        (lambda f: None, ("--empty=skip", "--protocol=lascarqs2022"), "--protocol=lascarqs2022"),
        (lambda f: None, ("--unit=patient",), '"unit".*patient'),
        (lambda f: None, ("--predictions=nowhere",), "^predictions=nowhere: no such folder"),
    ],
)
def test_bad_input_is_named(folders, change, extra, message):
    change(folders)
    before = sorted(folders.rglob("*"))
    with pytest.raises(InputError, match=message):
        main(options(folders, *extra))
    assert sorted(folders.rglob("*")) == before


def test_masks_are_not_scored_against_themselves(folders):
    with pytest.raises(InputError, match="the same folder as --predictions"):
        main(options(folders, f"--references={folders / 'predictions'}"))


def test_an_image_instead_of_a_mask_is_refused(folders):
    noise = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    nib.save(nib.Nifti1Image(noise, AFFINE), folders / "predictions" / "train_2.nii")
    with pytest.raises(InputError, match="so it looks like an image"):
        main(options(folders))


def test_masks_of_a_data_set_may_contain_only_its_classes(tmp_path):
    root = tmp_path / "references"
    for folder in ("imagesTr", "labelsTr"):
        save(root / folder / "a.nii.gz", BOX, OTHER_BOX)
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "front", "2": "back"}}))
    save(tmp_path / "predictions" / "a.nii.gz", BOX)
    main(options(tmp_path))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: values["dice"]["mean"] for name, values in summary["classes"].items()} == {"front": 1, "back": 0}
    save(root / "labelsTr" / "a.nii.gz", BOX, OTHER_BOX, values=(1, 7))
    with pytest.raises(InputError, match=r"labelsTr/a.nii.gz: label values 7 are not"):
        main([*options(tmp_path), f"--output={tmp_path / 'again'}"])


def test_the_challenge_table_needs_one_class(tmp_path):
    save(tmp_path / "references" / "a.nii.gz", BOX, OTHER_BOX)
    save(tmp_path / "predictions" / "a.nii.gz", BOX, OTHER_BOX)
    with pytest.raises(InputError, match="one class"):
        main(options(tmp_path, "--protocol=lascarqs2022"))


def test_a_missing_option_is_named():
    with pytest.raises(InputError, match="predictions"):
        main([])
