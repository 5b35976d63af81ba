"""Cases: which files of a folder belong together, their order, and the labels of a data set."""

import json
import logging
import shutil

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.cases import LAYOUTS, find_cases, find_images
from jaxla.data.labels import Labels
from tests.data.nifti import image_array, mask_array, save, write_decathlon, write_flat_pairs, write_lascarqs

ONE_CLASS = {"background": 0, "LA": 1}


def case_ids(dataset):
    return [case.id for case in dataset.cases]


# --- LAScarQS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["..", ".", "task2", "task2/train_data"])
def test_lascarqs_is_found_at_every_level_in_numeric_order(tmp_path, level):
    folder = write_lascarqs(tmp_path / "LAScarQS2022", count=11)
    dataset = find_cases(tmp_path / "LAScarQS2022" / level)
    assert case_ids(dataset) == [f"train_{n}" for n in range(1, 12)]
    assert dataset.layout == "LAScarQS"
    assert dataset.labels == Labels(("LA",))
    for case in dataset.cases:
        assert case.image.samefile(folder / case.id / "enhanced.nii.gz")
        assert case.mask.samefile(folder / case.id / "atriumSegImgMO.nii.gz")


def test_a_single_lascarqs_case_folder_is_a_data_set_with_one_case(tmp_path):
    dataset = find_cases(write_lascarqs(tmp_path) / "train_3")
    assert case_ids(dataset) == ["train_3"]


def test_a_relative_root_gives_the_same_case_ids(tmp_path, monkeypatch):
    folder = write_lascarqs(tmp_path)
    monkeypatch.chdir(folder)
    assert case_ids(find_cases(".")) == [f"train_{n}" for n in range(1, 7)]
    monkeypatch.chdir(folder / "train_3")
    assert list(find_images(".")) == ["train_3"]


def test_task_1_is_read_only_if_there_is_no_task_2(tmp_path, caplog):
    write_lascarqs(tmp_path, count=3)
    shutil.move(write_lascarqs(tmp_path / "other", count=2), tmp_path / "task1" / "train_data")
    shutil.rmtree(tmp_path / "other")
    with caplog.at_level(logging.INFO, "jaxla"):
        assert case_ids(find_cases(tmp_path)) == ["train_1", "train_2", "train_3"]
    assert "2 case folders outside task2 are not read" in caplog.text
    assert case_ids(find_cases(tmp_path / "task1")) == ["train_1", "train_2"]


def test_two_case_folders_with_the_same_name_are_refused(tmp_path):
    shutil.copytree(write_lascarqs(tmp_path / "a", count=1), tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(InputError, match="two case folders have the same name"):
        find_cases(tmp_path)


@pytest.mark.parametrize("value", [255, 420])
def test_any_non_zero_value_of_a_lascarqs_mask_is_the_atrium_and_is_logged(tmp_path, caplog, value):
    write_lascarqs(tmp_path, count=1, value=value)
    with caplog.at_level(logging.INFO, "jaxla"):
        labels = find_cases(tmp_path).labels
    assert "1 case (LAScarQS); classes LA: any non-zero value" in caplog.text
    classes = labels.to_classes(mask_array(value=value), "m.nii.gz")
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(classes, mask_array())
    assert labels.outputs == 1
    np.testing.assert_array_equal(labels.to_values(classes), mask_array())


def test_unlabelled_validation_scans_of_lascarqs_are_not_cases(tmp_path, caplog):
    for folder, names in {
        "train_data/train_1": ("enhanced", "atriumSegImgMO"),
        "val_data/val_1": ("enhanced",),
    }.items():
        for name in names:
            path = tmp_path / "task2" / folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    with caplog.at_level("INFO"):
        assert [case.id for case in find_cases(tmp_path).cases] == ["train_1"]
    assert "1 folders not named train_<n> are not read" in caplog.text
    assert list(find_images(tmp_path)) == ["train_1", "val_1"]


# --- dataset.json ----------------------------------------------------------------------------------------------------


def test_cases_of_an_nnunet_data_set_are_found(tmp_path):
    root = write_decathlon(tmp_path, ["LA_010", "LA_002"], {"background": 0, "LA": 1, "wall": 3}, "_0000", (1, 3))
    dataset = find_cases(root)
    assert case_ids(dataset) == ["LA_002", "LA_010"]
    assert dataset.cases[0].image == root / "imagesTr" / "LA_002_0000.nii.gz"
    assert dataset.cases[0].mask == root / "labelsTr" / "LA_002.nii.gz"
    assert dataset.layout == "dataset.json"
    assert dataset.labels == Labels(("LA", "wall"), ((1,), (3,)))
    assert dataset.labels.outputs == 3


def test_cases_of_a_decathlon_task_are_found(tmp_path):
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    dataset = find_cases(write_decathlon(tmp_path, ["hippocampus_001", "hippocampus_003"], labels, values=(1, 2)))
    assert case_ids(dataset) == ["hippocampus_001", "hippocampus_003"]
    assert dataset.labels == Labels(("Anterior", "Posterior"), ((1,), (2,)))


def test_hidden_files_are_not_scans(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b"], ONE_CLASS)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder / "._a.nii.gz").write_bytes(b"resource fork")
    (root / "._atlas.nii.gz").write_bytes(b"resource fork")
    assert case_ids(find_cases(root)) == ["a", "b"]


def test_a_stray_volume_next_to_dataset_json_is_ignored(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b"], ONE_CLASS)
    save(root / "atlas.nii.gz", image_array())
    assert case_ids(find_cases(root)) == ["a", "b"]


@pytest.mark.parametrize("zero", ["background", "Background", "nothing"])
def test_the_value_0_is_the_background_whatever_its_name(tmp_path, zero):
    dataset = find_cases(write_decathlon(tmp_path, ["a"], {"0": zero, "1": "LA"}))
    assert dataset.labels == Labels(("LA",), ((1,),))


def test_given_labels_replace_the_labels_of_the_data_set(tmp_path):
    root = write_decathlon(tmp_path, ["a"], {"0": "background", "1": "Anterior", "2": "Posterior"}, values=(1, 2))
    assert find_cases(root, "hippocampus:1,2").labels == Labels(("hippocampus",), ((1, 2),))


def test_given_labels_replace_overlapping_labels_of_the_data_set(tmp_path):
    root = write_decathlon(tmp_path, ["a"], {"background": 0, "whole": [1, 2], "core": [2]}, values=(1, 2))
    with pytest.raises(InputError, match=r"dataset.json: overlapping .*\. Set data.labels\."):
        find_cases(root)
    assert find_cases(root, "whole:1,2").labels == Labels(("whole",), ((1, 2),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ("[]", "not readable"),
        ("{}", "not readable.*labels"),
        ('{"labels": ["LA"]}', "not readable"),
        ('{"labels": {"LA": null}}', "not readable"),
        ('{"labels": {"LA": "one"}}', "not readable"),
        ('{"labels": {"1": "LA", "2": "LA"}}', "the label 'LA' occurs twice"),
        ('{"labels": {"background": 0}}', "names no class except the background"),
        ('{"labels": {}}', "names no class"),
        ('{"labels": {"LA": 1.5}}', "the label 'LA' has the value 1.5, not a non-negative integer"),
        ('{"labels": {"LA": true}}', "the label 'LA' has the value True"),
        ('{"labels": {"LA": Infinity}}', "the label 'LA' has the value inf"),
        ('{"labels": {"LA": NaN}}', "the label 'LA' has the value nan"),
        ('{"labels": {"LA": -1}}', "the label 'LA' has the value -1"),
        ('{"labels": {"LA": 1e300}}', "is more than a mask can hold"),
        ('{"labels": {"1": null}}', "the label '1' has the value None"),
        ('{"labels": {"1": ""}}', "the label name '' is empty or not printable"),
        (r'{"labels": {"\ud800": 1}}', "the label name .* is empty or not printable"),
        ('{"labels": ' + "[" * 100_000, "not readable"),
        (json.dumps({"labels": {f"c{n}": n for n in range(1, 257)}}), "names 256 classes, but at most 255"),
    ],
)
def test_a_dataset_json_without_usable_labels_is_named(tmp_path, text, message):
    root = write_decathlon(tmp_path, ["a"], ONE_CLASS)
    (root / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=f"^{root / 'dataset.json'}: .*{message}"):
        find_cases(root)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"labels": ONE_CLASS}).encode("utf-8-sig"),
        json.dumps({"labels": ONE_CLASS}).encode("utf-16"),
        b'{"labels": {"background": "0", "LA": "1"}}',
        b'{"labels": {"background": 0, "LA": 1.0}}',
        b'{"labels": {"0": "background", "LA": 1}, "numTraining": Infinity, "channel_names": 3, "training": 7}',
    ],
)
def test_the_labels_of_a_dataset_json_are_read_as_other_programs_write_them(tmp_path, content):
    root = write_decathlon(tmp_path, ["a"], ONE_CLASS)
    (root / "dataset.json").write_bytes(content)
    assert find_cases(root).labels == Labels(("LA",), ((1,),))


def test_a_second_channel_is_refused(tmp_path):
    root = write_decathlon(tmp_path, ["a"], ONE_CLASS, "_0000")
    second = save(root / "imagesTr" / "a_0001.nii.gz", image_array(9))
    for find in (find_cases, find_images):  # training and prediction
        with pytest.raises(InputError, match=f"^{second}: a second image channel"):
            find(root)


def test_a_dataset_json_with_several_channels_is_refused(tmp_path):
    root = write_decathlon(tmp_path, ["a"], ONE_CLASS, "_0000")
    content = json.loads((root / "dataset.json").read_text())
    for key in ("channel_names", "modality"):
        (root / "dataset.json").write_text(json.dumps(content | {key: {"0": "LGE", "1": "cine"}}))
        with pytest.raises(InputError, match=r"dataset.json: names 2 image channels \(LGE, cine\)"):
            find_cases(root)


def test_a_dataset_json_without_files_is_named(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": ONE_CLASS}))
    with pytest.raises(InputError, match=f"^{tmp_path}: has a dataset.json, but imagesTr and labelsTr hold no scan"):
        find_cases(tmp_path)


# --- flat pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["_mask", "_seg", "_label", "_labels", "_gt"])
@pytest.mark.parametrize("channel", ["", "_0000"])
def test_pairs_in_one_folder_are_found(tmp_path, suffix, channel):
    for name in ("b", "a"):
        save(tmp_path / f"{name}{channel}.nii.gz", image_array())
        save(tmp_path / f"{name}{suffix}.nii", mask_array())
    dataset = find_cases(tmp_path)
    assert [(c.id, c.image.name, c.mask.name) for c in dataset.cases] == [
        (name, f"{name}{channel}.nii.gz", f"{name}{suffix}.nii") for name in ("a", "b")
    ]
    assert dataset.layout == "flat pairs"
    assert dataset.labels == Labels(("foreground",), one_value=True)


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "labels"), ("imagesTr", "labelsTr"), ("image", "mask"), ("images", "masks")]
)
@pytest.mark.parametrize("suffix", ["", "_seg"])
def test_pairs_in_two_folders_are_found(tmp_path, images, masks, suffix):
    for name in ("b", "a"):
        save(tmp_path / images / f"{name}.nii.gz", image_array())
        save(tmp_path / masks / f"{name}{suffix}.nii.gz", mask_array())
    assert [(c.id, c.image.parent.name, c.mask.name) for c in find_cases(tmp_path).cases] == [
        (name, images, f"{name}{suffix}.nii.gz") for name in ("a", "b")
    ]


def test_a_case_with_two_masks_is_refused(tmp_path):
    write_flat_pairs(tmp_path, 2)
    save(tmp_path / "case_1_seg.nii.gz", mask_array(value=2))
    with pytest.raises(InputError, match="case_1"):
        find_cases(tmp_path)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_case_with_two_images_or_two_masks_of_the_same_name_is_refused(tmp_path, folder):
    root = write_decathlon(tmp_path, ["a", "b"], ONE_CLASS)
    save(root / folder / "a.nii", mask_array(value=2))
    with pytest.raises(InputError, match=f"{folder}/a.nii"):
        find_cases(root)


# --- incomplete and missing cases ------------------------------------------------------------------------------------


def write_layouts(tmp_path):
    """Make a data set of at least two cases in each layout; return layout -> (image, mask) of its last case."""
    write_lascarqs(tmp_path / "lascarqs", 2)
    write_decathlon(tmp_path / "decathlon", ["a", "b"], ONE_CLASS)
    write_flat_pairs(tmp_path / "flat", 2)
    for name in ("a", "b"):
        save(tmp_path / "folders" / "images" / f"{name}.nii.gz", image_array())
        save(tmp_path / "folders" / "labels" / f"{name}.nii.gz", mask_array())
    case = tmp_path / "lascarqs" / "task2" / "train_data" / "train_2"
    return {
        "lascarqs": (case / "enhanced.nii.gz", case / "atriumSegImgMO.nii.gz"),
        "decathlon": (tmp_path / "decathlon/imagesTr/b.nii.gz", tmp_path / "decathlon/labelsTr/b.nii.gz"),
        "flat": (tmp_path / "flat/case_1.nii.gz", tmp_path / "flat/case_1_mask.nii.gz"),
        "folders": (tmp_path / "folders/images/b.nii.gz", tmp_path / "folders/labels/b.nii.gz"),
    }


@pytest.mark.parametrize("layout", ["lascarqs", "decathlon", "flat", "folders"])
def test_an_image_without_mask_and_a_mask_without_image_are_named(tmp_path, layout):
    image, mask = write_layouts(tmp_path)[layout]
    backup = tmp_path / "backup"
    mask.rename(backup)
    with pytest.raises(InputError, match=f"^{image}: has no mask\\. Add the mask"):
        find_cases(tmp_path / layout)
    backup.rename(mask)
    image.unlink()
    with pytest.raises(InputError, match=f"^{mask}: has no image\\. Add the image"):
        find_cases(tmp_path / layout)


def test_other_images_without_mask_are_counted(tmp_path):
    write_flat_pairs(tmp_path, 4)
    for n in (0, 2, 3):
        (tmp_path / f"case_{n}_mask.nii.gz").unlink()
    with pytest.raises(InputError, match=r"case_0.nii.gz: this image and 2 others have no mask\."):
        find_cases(tmp_path)


def test_the_error_for_a_folder_without_cases_names_the_layouts_and_sources_of_data(tmp_path):
    (tmp_path / "notes.txt").write_text("no scans")
    with pytest.raises(InputError, match=f"^{tmp_path}: no case found") as raised:
        find_cases(tmp_path)
    for layout in (*(layout.description for layout in LAYOUTS), "Register for LAScarQS", "data.root=phantom"):
        assert layout in str(raised.value)
    with pytest.raises(InputError, match=r"^data.root=.*/nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")


# --- images to predict -----------------------------------------------------------------------------------------------


def test_a_single_file_is_the_image_to_predict(tmp_path):
    path = save(tmp_path / "scan.nii.gz", image_array())
    assert find_images(path) == {"scan": path}


def test_the_images_of_a_folder_are_found_without_its_masks(tmp_path, caplog):
    write_flat_pairs(tmp_path, 2)
    with caplog.at_level(logging.INFO, "jaxla"):
        assert find_images(tmp_path) == {f"case_{n}": tmp_path / f"case_{n}.nii.gz" for n in range(2)}
    assert "masks are skipped (2): case_0_mask.nii.gz, case_1_mask.nii.gz" in caplog.text


@pytest.mark.parametrize(
    ("layout", "ids"),
    [
        ("lascarqs", ["train_1", "train_2"]),
        ("decathlon", ["a", "b"]),
        ("folders", ["a", "b"]),
        ("lascarqs/task2/train_data/train_2", ["train_2"]),
    ],
)
def test_the_images_of_a_data_set_are_found_without_its_masks(tmp_path, layout, ids):
    last_images = [image for image, _ in write_layouts(tmp_path).values()]
    images = find_images(tmp_path / layout)
    assert list(images) == ids
    assert images[ids[-1]] in last_images


def test_lascarqs_images_need_no_masks_to_be_predicted(tmp_path):
    folder = write_lascarqs(tmp_path, 2)
    for mask in folder.glob("*/atriumSegImgMO.nii.gz"):
        mask.unlink()
    assert find_images(tmp_path) == {name: folder / name / "enhanced.nii.gz" for name in ("train_1", "train_2")}


def test_channel_suffixes_are_not_part_of_the_case_id(tmp_path):
    path = save(tmp_path / "a_0000.nii.gz", image_array())
    assert find_images(tmp_path) == {"a": path}


def test_a_folder_without_images_to_predict_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^input={tmp_path}: no image to segment; the folder holds no scan"):
        find_images(tmp_path)
    with pytest.raises(InputError, match=r"^input=.*/nowhere: no such file or folder"):
        find_images(tmp_path / "nowhere")
