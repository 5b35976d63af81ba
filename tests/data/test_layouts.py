"""Layouts: which files of a folder are images, masks, channels, or unused. Finding them reads no voxels."""

import logging
import os
import unicodedata
from pathlib import Path

import pytest

from jaxla.config import InputError
from jaxla.data.cases import find_cases, find_images, survey_cases
from jaxla.data.labels import Labels

DICOM_SLICE = b"\0" * 128 + b"DICM"
DATASET_JSON = b'{"labels": {"background": 0, "LA": 1}}'


CONTENT = {".dcm": DICOM_SLICE, ".json": DATASET_JSON}


def write(root, *paths):
    """Write files; a path that ends in / becomes a folder with a DICOM slice."""
    for path in paths:
        file = root / path / "1.dcm" if path.endswith("/") else root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(CONTENT.get(file.suffix, b""))
    return root


def relative_paths(root, cases):
    """Return case id -> image and mask, as paths in `root`."""
    return {case.id: tuple(path.relative_to(root).as_posix() for path in (case.image, case.mask)) for case in cases}


# --- recognised layouts ----------------------------------------------------------------------------------------------

LAYOUTS = {  # name -> expected layout, expected class, and expected case id -> image and mask
    "LA challenge 2018": (
        "LA 2018",
        "LA",
        {
            "4RBX": ("Training Set/4RBX/lgemri.nrrd", "Training Set/4RBX/laendo.nrrd"),
            "7FDK": ("Training Set/7FDK/lgemri.nrrd", "Training Set/7FDK/laendo.nrrd"),
        },
    ),
    "LAScarQS in other formats": (
        "LAScarQS",
        "LA",
        {
            "train_2": ("train_data/train_2/enhanced.NII.GZ", "train_data/train_2/atriumSegImgMO.nii"),
            "train_10": ("train_data/train_10/enhanced.mha", "train_data/train_10/atriumSegImgMO.nrrd"),
        },
    ),
    "nnU-Net in other formats": (
        "dataset.json",
        "LA",
        {
            "a": ("imagesTr/a_0000.nrrd", "labelsTr/a.nrrd"),
            "b": ("imagesTr/b_0000.MHA", "labelsTr/b.nii.gz"),
            "c": ("imagesTr/c", "labelsTr/c.nrrd"),
        },
    ),
    "flat pairs in other formats": (
        "flat pairs",
        "foreground",
        {"a": ("a.NRRD", "a_mask.nii.gz"), "b": ("b.mhd", "b_seg.NII"), "c": ("c", "c_gt.nrrd")},
    ),
    "DICOM series in a folder of images": (
        "flat pairs",
        "foreground",
        {"P1": ("images/P1", "labels/P1.nrrd"), "P2": ("images/P2", "labels/P2_mask.nii.gz")},
    ),
    "patient folders": (
        "patient folders",
        "foreground",
        {
            "P001": ("P001/image.nii.gz", "P001/mask.nii.gz"),
            "P002": ("P002/lge.nrrd", "P002/Segmentation.seg.nrrd"),
            "P003": ("P003/P003.mha", "P003/P003_LA-label.mha"),
            "P004": ("P004/dicom", "P004/GT.nii"),
            "P005": ("P005", "P005/groundtruth.nrrd"),
            "P006": ("site 2/P006/scan.nii", "site 2/P006/labels.nii"),
        },
    ),
    "BIDS": (
        "BIDS",
        "foreground",
        {
            "sub-01_ses-1": (
                "sub-01/ses-1/anat/sub-01_ses-1_LGE.nii.gz",
                "sub-01/ses-1/anat/sub-01_ses-1_LGE_mask.nii.gz",
            ),
            "sub-01_ses-2": (
                "sub-01/ses-2/anat/sub-01_ses-2_LGE.nii.gz",
                "derivatives/atria/sub-01/ses-2/anat/sub-01_ses-2_space-orig_label-LA_mask.nii.gz",
            ),
            "sub-02": ("sub-02/anat/sub-02_T1w.nii.gz", "derivatives/atria/sub-02/anat/sub-02_dseg.nii.gz"),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_and_masks_are_paired_in_every_layout(tmp_path, name):
    layout, label, expected = LAYOUTS[name]
    folders = {path for pair in expected.values() for path in pair if not Path(path).suffix}
    write(tmp_path, *(path + "/" * (path in folders) for pair in expected.values() for path in pair))
    if layout == "dataset.json":
        write(tmp_path, "dataset.json")
    dataset = find_cases(tmp_path)
    assert relative_paths(tmp_path, dataset.cases) == expected
    assert [case.id for case in dataset.cases] == list(expected)
    assert (dataset.layout, dataset.labels.names) == (layout, (label,))
    assert survey_cases(tmp_path).unused == ()
    images = find_images(tmp_path)
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in images.items()} == {
        name: image for name, (image, _) in expected.items()
    }


def test_masks_of_the_2018_challenge_may_have_any_non_zero_value(tmp_path):
    """The released masks contain 0 and 255."""
    write(tmp_path, "a/lgemri.nrrd", "a/laendo.nrrd")
    assert find_cases(tmp_path).labels == Labels(("LA",))


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["image.nii.gz", "mask.nii.gz"], ["P1"]),  # the folder of one patient
        (["1.dcm"], ["P1"]),
        (["P2/scan.nii.gz", "P3/scan.nii.gz"], ["P2", "P3"]),  # without masks
        (["sub-1/ses-1/sub-1_ses-1_LGE.nii.gz"], ["sub-1_ses-1"]),
    ],
)
def test_images_are_found_for_prediction_without_a_data_set(tmp_path, monkeypatch, paths, ids):
    root = write(tmp_path / "P1", *paths)
    assert list(find_images(root)) == ids
    monkeypatch.chdir(root)
    assert list(find_images(".")) == ids


@pytest.mark.parametrize(
    ("paths", "fault", "message"),
    [
        (["P1/a.nii", "P1/b.nii", "P1/mask.nii"], "P1/b.nii", "belongs to the same case as a.nii"),
        (["P1/a.nii", "P1/mask.nii", "P1/wall_mask.nii"], "P1/wall_mask.nii", "belongs to the same case as mask.nii"),
        (["P1/a.nii", "P1/mask.nii", "x/P1/a.nii", "x/P1/mask.nii"], ".", "two case folders have the same name"),
        (["train_1/enhanced.nii", "train_1/enhanced.nii.gz"], "train_1/enhanced.nii.gz", "belongs to the same case as"),
        (["sub-1/sub-1_T1w.nii", "sub-1/sub-1_LGE.nii", "sub-1/sub-1_mask.nii"], "sub-1/sub-1_T1w.nii", "belongs to"),
    ],
)
def test_two_files_for_one_case_are_refused(tmp_path, paths, fault, message):
    write(tmp_path, *paths, "P0/image.nii", "P0/mask.nii")
    with pytest.raises(InputError, match=f"^{tmp_path / fault}: {message}"):
        find_cases(tmp_path)


def test_names_with_accents_match_however_a_system_stores_them(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    write(tmp_path, f"images/{composed}.nii.gz", f"labels/{decomposed}.nii.gz")
    assert [case.id for case in find_cases(tmp_path).cases] == [composed]


# --- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "image", "mask", "ids"),
    [
        (["P1/lge.nrrd", "P1/la.nrrd", "P2/lge.nrrd", "P2/la.nrrd"], "*/lge.nrrd", "*/la.nrrd", ["P1", "P2"]),
        (["P1/lge.nii.gz", "P1/atrium.nii"], "*/lge.*", "*/atrium.*", ["P1"]),
        (["P1/lge/", "P1/out/atrium.NRRD"], "*/lge", "*/out/atrium.nrrd", ["P1"]),
        (["a.nii", "a_la.nii"], "*.nii", "*_la.nii", ["a"]),  # a mask is not an image
        (["x/P1/lge.nii", "y/P1/lge.nii", "x/P1/m.nii", "y/P1/m.nii"], "*/*/lge", "*/*/m", ["x_P1", "y_P1"]),
        (["b/sub-1_LGE.nii", "m/a/sub-1_LA.nii"], "**/*_LGE", "m/**/*_LA", ["sub-1"]),
        (["x1/P[1].nii", "y/P[1].nii"], "x?/*.nii", "y/*.nii", ["P[1]"]),
    ],
)  # fmt: skip
def test_patterns_name_images_and_masks_of_any_layout(tmp_path, paths, image, mask, ids):
    write(tmp_path, *paths)
    assert [case.id for case in find_cases(tmp_path, image=image, mask=mask).cases] == ids


def test_a_pattern_names_the_images_to_predict(tmp_path):
    write(tmp_path, "P1/lge.nii", "P1/cine.nii", "P2/lge/")
    assert find_images(tmp_path, image="*/lge") == {"P1": tmp_path / "P1/lge.nii", "P2": tmp_path / "P2/lge"}


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        ("*/lge.nii", "", r"data.image='\*/lge.nii': the pattern of images or masks is missing"),
        ("", "*/m.nii", r"data.mask='\*/m.nii': the pattern of images or masks is missing"),
        ("P1/lge.nii", "P1/m.nii", r"data.image='P1/lge.nii' and data.mask='P1/m.nii': needs at least one \*"),
        ("*/lge.nii", "*/*/m.nii", r".*: needs at least one \*, and the same number for images and"),
        ("*/x.nii", "*/y.nii", "{root}: no scan matches data.image or data.mask; the folder holds 2 .nii files in 1 f"),
        ("*/lge.nii", "*/y.nii", "{root}/P1/lge.nii: has no mask"),
    ],
)
def test_patterns_that_fit_no_data_are_refused(tmp_path, image, mask, message):
    write(tmp_path, "P1/lge.nii", "P1/m.nii")
    with pytest.raises(InputError, match="^" + message.format(root=tmp_path)):
        find_cases(tmp_path, image=image, mask=mask)


def test_an_unrecognised_folder_is_described_with_the_patterns_that_read_it(tmp_path):
    for n in range(6):
        (write(tmp_path, f"site/P{n}/lge.nrrd", f"site/P{n}/atrium.nrrd") / f"site/P{n}/lge.nrrd").write_bytes(b"large")
    with pytest.raises(InputError) as refused:
        find_cases(tmp_path)
    assert refused.value.problem.startswith("no case found; the folder holds 12 .nrrd files in 6 folders; recognised")
    example = "data.image='site/*/lge.nrrd' data.mask='site/*/atrium.nrrd'"
    assert example in refused.value.fix
    assert len(find_cases(tmp_path, image="site/*/lge.nrrd", mask="site/*/atrium.nrrd").cases) == 6


def test_a_folder_of_a_format_that_is_not_read_is_described(tmp_path):
    write(tmp_path, "a/scan.mgz", "b/scan.mgz")
    found = "the folder holds 2 .mgz files in 2 folders"
    for find in (find_cases, find_images):
        with pytest.raises(InputError, match=rf"{found}.*Formats: \.nii\.gz, "):
            find(tmp_path)


# --- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "masks", "ids"),
    [
        (["a_0000", "b_0000"], ["a", "b"], ["a", "b"]),
        (["amos_0001", "amos_0002"], ["amos_0001", "amos_0002"], ["amos_0001", "amos_0002"]),
        (["p_0000", "p_0001"], ["p_0000", "p_0001"], ["p_0000", "p_0001"]),
        (["p_0000_0000", "p_0001_0000"], ["p_0000", "p_0001"], ["p_0000", "p_0001"]),
    ],
)
@pytest.mark.parametrize("layout", ["dataset.json", "folders", "one folder"])
def test_a_number_is_a_channel_only_if_the_mask_lacks_it(tmp_path, images, masks, ids, layout):
    image, mask = {
        "dataset.json": ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz"),
        "folders": ("images/{}.nii.gz", "labels/{}.nii.gz"),
        "one folder": ("{}.nii.gz", "{}_mask.nii.gz"),
    }[layout]
    write(tmp_path, *map(image.format, images), *map(mask.format, masks))
    if layout == "dataset.json":
        write(tmp_path, "dataset.json")
    assert [case.id for case in find_cases(tmp_path).cases] == ids
    assert list(find_images(tmp_path)) == ids


@pytest.mark.parametrize(
    ("images", "ids"),
    [
        (["a_0000", "b_0000"], ["a", "b"]),
        (["amos_0001", "amos_0002"], ["amos_0001", "amos_0002"]),  # no first channel
        (["p_0000", "p_0007"], ["p_0000", "p_0007"]),  # with a gap
        ([f"p_{n:04}" for n in range(5)], [f"p_{n:04}" for n in range(5)]),  # too many for channels
    ],
)
def test_without_masks_a_number_is_a_channel_if_its_siblings_are_numbered_like_channels(tmp_path, images, ids):
    write(tmp_path, *(f"{name}.nii.gz" for name in images))
    assert list(find_images(tmp_path)) == ids


def test_a_second_channel_is_never_read_as_another_patient(tmp_path):
    write(tmp_path, "X_0000.nii.gz", "X_0001.nii.gz", "Y_0000.nii.gz", "Y_0001.nii.gz")
    second = f"^{tmp_path / 'X_0001.nii.gz'}: a second image channel of case X"
    with pytest.raises(InputError, match=second):
        find_images(tmp_path)
    write(tmp_path, "X_mask.nii.gz", "Y_mask.nii.gz")
    with pytest.raises(InputError, match=second):
        find_cases(tmp_path)


# --- scans that are not used -----------------------------------------------------------------------------------------


def test_scans_that_are_not_used_are_named_in_one_warning(tmp_path, caplog):
    write(tmp_path, "a/lgemri.nrrd", "a/laendo.nrrd", "a/lawall.nrrd", "extra/b.mgz", "notes.txt", ".cache/c.nii")
    (tmp_path / "link").symlink_to("nowhere")
    write(tmp_path, "test/1.nii.gz")
    with caplog.at_level(logging.WARNING, "jaxla"):
        find_cases(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: scans that belong to no case are not used (4): a/lawall.nrrd, extra/b.mgz, link, … 1 more"
    ]


@pytest.mark.parametrize("name", ["enhanced.nii.gz", "atriumSegImgMO.nii.gz"])
def test_a_link_to_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path, *(f"train_{n}/{f}.nii.gz" for n in (1, 2) for f in ("enhanced", "atriumSegImgMO")))
    link = folder / "train_2" / name
    link.unlink()
    link.symlink_to("/archive/2.nii.gz")
    with pytest.raises(InputError, match=f"^{link}: a link to /archive/2.nii.gz, which does not exist"):
        find_cases(tmp_path)


def test_a_case_whose_files_are_both_broken_links_is_not_lost(tmp_path):
    folder = write(tmp_path, *(f"train_{n}/{f}.nii.gz" for n in (1, 2) for f in ("enhanced", "atriumSegImgMO")))
    for path in (folder / "train_2").iterdir():
        path.unlink()
        path.symlink_to("/archive/2.nii.gz")
    survey = survey_cases(tmp_path)
    assert [case.id for case in survey.cases] == ["train_1", "train_2"]
    assert [(finding.kind, finding.case) for finding in survey.findings] == [("broken link", "train_2")] * 2


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path / "archive", "P1/image.nii", "P1/mask.nii")
    root = tmp_path / "data"
    root.mkdir()
    (root / "patient").symlink_to(tmp_path / "archive" / "P1")
    (tmp_path / "archive" / "P1" / "back").symlink_to(root)
    assert [case.id for case in find_cases(root).cases] == ["patient"]


def test_a_link_to_a_folder_does_not_hide_the_folder(tmp_path):
    write(tmp_path, "dataset.json", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    (tmp_path / "all").symlink_to("imagesTr")
    assert [case.id for case in find_cases(tmp_path).cases] == ["a"]


def test_links_to_one_folder_elsewhere_are_all_read(tmp_path):
    write(tmp_path / "archive", "image.nii", "mask.nii")
    write(tmp_path / "data", "P1/image.nii", "P1/mask.nii")
    for name in ("P2", "P3"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "archive")
    assert [case.id for case in find_cases(tmp_path / "data").cases] == ["P1", "P2", "P3"]


def test_circular_links_are_not_followed_forever(tmp_path):
    root = write(tmp_path / "data", "P1/image.nii", "P1/mask.nii")
    write(tmp_path / "a", "image.nii", "mask.nii")
    for link, target in (("data/P2", "a"), ("a/b", "b"), ("b", "c"), ("c/a", "a"), ("c/up", ".")):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target)
    assert [case.id for case in find_cases(root).cases] == ["P1", "P2"]


def test_loose_dicom_slices_are_named(tmp_path, caplog):
    write(tmp_path, "./", "P1/image.nii", "P1/mask.nii", "P2/image.nii", "P2/mask.nii")
    with caplog.at_level(logging.WARNING, "jaxla"):
        find_cases(tmp_path)
    assert "scans that belong to no case are not used (1): 1.dcm" in caplog.text


def test_prediction_names_the_scans_inside_a_dicom_series(tmp_path, caplog):
    write(tmp_path, "./", "P1/image.nii")
    with caplog.at_level(logging.WARNING, "jaxla"):
        assert list(find_images(tmp_path).values()) == [tmp_path]
    assert "read as one DICOM series; other scans are not read (1): P1/image.nii" in caplog.text


def test_prediction_logs_which_folder_is_read_and_how_to_read_the_other(tmp_path, caplog):
    write(tmp_path, "dataset.json", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz", "imagesTs/c.nii.gz")
    with caplog.at_level(logging.INFO, "jaxla"):
        assert list(find_images(tmp_path)) == ["a"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: masks are skipped (1): labelsTr/a.nii.gz",
        f"{tmp_path}: 1 image read from imagesTr (dataset.json); other scans are not read (2): imagesTs/b.nii.gz, "
        f"imagesTs/c.nii.gz. To read a folder of them, use input={tmp_path}/imagesTs.",
    ]
    assert list(find_images(tmp_path / "imagesTs")) == ["b", "c"]


def test_a_named_pipe_is_not_read_as_a_scan(tmp_path):
    """Reading it could wait forever."""
    write(tmp_path, "a_mask.nii")
    os.mkfifo(tmp_path / "a.nii")
    survey = survey_cases(tmp_path)
    assert [finding.problem for finding in survey.findings] == ["has no image"]
    assert survey.unused == (tmp_path / "a.nii",)
