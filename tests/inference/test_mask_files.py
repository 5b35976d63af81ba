"""Predictions of scans in every format, and the format and content of the masks."""

import shutil
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest

from jaxla.config import InputError
from jaxla.data.cases import Case, Dataset
from jaxla.data.dicom_seg import read_segmentation, write_segmentation
from jaxla.data.labels import Labels
from jaxla.data.prepared import prepare_cases
from jaxla.data.volumes import read_image, read_mask
from jaxla.inference.mask_files import (
    mask_classes,
    mask_extension,
    probabilities_extension,
    require_mask_file,
    write_mask,
)
from tests.commands import refuse, succeed
from tests.data.formats import OBLIQUE, edit_dicom, save_any, save_dicom, save_itk
from tests.data.nifti import image_array, mask_array, save

SCANS = ("a.nii.gz", "b.nrrd", "c.mha", "d.mhd", "e.nhdr", "f")
MASKS = ("a.nii.gz", "b.nrrd", "c.mha", "d.mha", "e.nrrd", "f.dcm")


@pytest.fixture(scope="module")
def scan(phantoms):
    """The image and the mask of a phantom, as arrays."""
    folder = phantoms / "task2" / "train_data" / "train_2"
    image, mask = (np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj) for name in ("enhanced", "atriumSegImgMO"))
    return image.astype(np.int16), (mask > 0).astype(np.uint8)


def test_the_same_scan_gets_the_same_mask_in_every_format(small_run, scan, tmp_path):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    for name in SCANS:
        save_any(scans / name, scan[0], OBLIQUE)
    printed = succeed(tmp_path, "jaxla.predict", f"--run={small_run}", f"--input={scans}", f"--output={masks}")
    first = read_mask(masks / "a.nii.gz")
    assert first.array.any()
    for name in MASKS:
        mask = read_mask(masks / name)
        np.testing.assert_array_equal(mask.array, first.array)
        np.testing.assert_array_equal(mask.affine, first.affine)
    volumes = {line.rpartition(": ")[2] for line in printed.splitlines() if " ml" in line}
    millilitres = first.array.sum() * abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    assert volumes == {f"LA {millilitres:.1f} ml"}

    references = tmp_path / "references"
    for name in ("a.mha", "b", "c.nii.gz", "d.nrrd", "e.mhd", "f.nrrd"):
        save_any(references / name, scan[1], OBLIQUE)
    options = (f"--predictions={masks}", f"--references={references}", "--output=scores")
    succeed(tmp_path, "jaxla.evaluate", *options)
    lines = (tmp_path / "scores" / "cases.csv").read_text().splitlines()
    assert len({line.partition(",")[2] for line in lines[1:]}) == 1
    assert len(lines) == 1 + len(MASKS)


@pytest.mark.parametrize("name", SCANS)
def test_training_prepares_the_same_slices_from_every_format(scan, tmp_path, name):
    def prepare(name):
        folder = tmp_path / name
        case = Case(
            "case",
            *(save_any(folder / k / name, array, OBLIQUE) for k, array in zip(("image", "mask"), scan, strict=True)),
        )
        (volume,) = prepare_cases(Dataset(folder, "flat", (case,), Labels(("LA",))), tmp_path / "cache")
        return volume

    expected, volume = prepare("x.nii.gz"), prepare(name)
    assert (volume.slices_sha256, volume.spacing) == (expected.slices_sha256, expected.spacing)
    np.testing.assert_array_equal(volume.mask, expected.mask)


def test_verify_prints_the_same_report_for_dicom(tmp_path):
    printed = []
    for extension in (".nii.gz", ""):
        for case in range(3):
            save_any(tmp_path / "data" / "images" / f"case{case}{extension}", image_array(case))
            save_any(tmp_path / "data" / "labels" / f"case{case}{extension}", mask_array())
        printed.append(succeed(tmp_path, "jaxla.verify", "--data.root=data"))
        shutil.rmtree(tmp_path / "data")
    assert printed[0] == printed[1]
    assert "Training can start" in printed[0]


# --- DICOM segmentations ---------------------------------------------------------------------------------------------


@pytest.fixture
def segmentation(tmp_path):
    """A series, a mask of it with two classes and an empty slice, and the file of its DICOM segmentation."""
    series = save_dicom(tmp_path / "series", image_array(), OBLIQUE, g0010_0020="patient 1")
    classes = mask_array()
    classes[0, 0, 0] = classes[3, 1, 2] = 2
    write_segmentation(tmp_path / "seg.dcm", classes, ("LA", "wall"), series)
    return series, classes, tmp_path / "seg.dcm"


def test_frames_of_a_dicom_segmentation_match_the_slices_that_they_refer_to(segmentation):
    """The file is read element by element, without the package that wrote it; dcmqi gives the same geometry."""
    series, classes, path = segmentation
    dataset, slices = pydicom.dcmread(path), [pydicom.dcmread(file) for file in series.iterdir()]
    slice_by_uid = {item.SOPInstanceUID: item for item in slices}
    assert (dataset.Modality, dataset.PatientID) == ("SEG", "patient 1")
    assert dataset.StudyInstanceUID == slices[0].StudyInstanceUID
    assert dataset.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert dataset.SeriesInstanceUID != slices[0].SeriesInstanceUID
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == ["LA", "wall"]
    assert dataset.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Left atrium"

    shared = dataset.SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].PixelSpacing == slices[0].PixelSpacing
    assert float(shared.PixelMeasuresSequence[0].SpacingBetweenSlices) == pytest.approx(2.6, abs=1e-6)
    frame_shape, count = (dataset.Rows, dataset.Columns), int(dataset.NumberOfFrames)
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    frames = bits[: count * np.prod(frame_shape)].reshape(count, *frame_shape)
    normal = np.cross(*np.reshape(slices[0].ImageOrientationPatient, (2, 3)).astype(float))
    positions = sorted(float(normal @ np.array(item.ImagePositionPatient, float)) for item in slices)
    found = np.zeros_like(classes)
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        assert position == slice_by_uid[source].ImagePositionPatient
        z = int(np.argmin(np.abs(np.array(positions) - normal @ np.array(position, float))))
        found[..., z][frame.T == 1] = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    np.testing.assert_array_equal(found, classes)


def test_a_dicom_segmentation_is_read_as_a_mask_on_the_grid_of_its_series(segmentation):
    series, classes, path = segmentation
    mask = read_mask(path)
    np.testing.assert_array_equal(mask.array, classes)
    np.testing.assert_array_equal(mask.affine, read_image(series).affine)


def test_an_empty_mask_is_a_dicom_segmentation_of_the_whole_grid(tmp_path):
    series = save_dicom(tmp_path / "series", image_array())
    write_segmentation(tmp_path / "seg.dcm", mask_array() * 0, ("LA",), series)
    assert read_segmentation(tmp_path / "seg.dcm")[0].shape == image_array().shape


def test_an_anonymised_series_gets_a_segmentation(tmp_path):
    def anonymise(dataset):
        for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
            delattr(dataset, name)

    series = edit_dicom(save_dicom(tmp_path / "series", image_array()), anonymise)
    write_segmentation(tmp_path / "seg.dcm", mask_array(), ("LA",), series)
    np.testing.assert_array_equal(read_mask(tmp_path / "seg.dcm").array, mask_array())


def test_a_series_without_frame_of_reference_gets_no_segmentation(tmp_path):
    series = edit_dicom(save_dicom(tmp_path / "series", image_array()), lambda d: delattr(d, "FrameOfReferenceUID"))
    with pytest.raises(InputError, match=r"\(Source images have no Frame Of Reference UID.* Choose another format"):
        write_segmentation(tmp_path / "seg.dcm", mask_array(), ("LA",), series)
    assert not (tmp_path / "seg.dcm").exists()


@pytest.mark.parametrize("name", ["mask.nrrd", "mask.dcm"])
def test_a_written_mask_is_read_back_as_the_same_classes(tmp_path, name):
    """A DICOM segmentation stores class indices; other formats store the label values of the data set."""
    series, labels = save_dicom(tmp_path / "series", image_array()), Labels(("LA", "wall"), values=((420,), (7, 8)))
    classes = mask_array()
    classes[0, 0, 0] = 2
    write_mask(tmp_path / name, classes, labels, read_image(series))
    mask = read_mask(tmp_path / name)
    assert np.unique(mask.array).tolist() == ([0, 1, 2] if name == "mask.dcm" else [0, 7, 420])
    np.testing.assert_array_equal(mask_classes(mask, labels), classes)


# --- choice of the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--output=masks", "--format=dicom-seg"),
            "--format=dicom-seg: a DICOM segmentation needs a DICOM series as input, which scan.nii.gz is not.",
        ),
        (("--output=mask.nrrd", "--format=mha"), "--output=mask.nrrd: the extension does not match --format=mha."),
        (("--output=mask.mhd",), "--output=mask.mhd: a mask cannot be written as .mhd."),
        (
            ("--output=mask.dcm",),
            "--output=mask.dcm: a DICOM segmentation needs a DICOM series as input, which scan.nii.gz is not.",
        ),
    ],
)
def test_a_format_that_does_not_match_the_scan_or_the_output_is_refused(small_run, tmp_path, options, message):
    save(tmp_path / "scan.nii.gz", image_array())
    assert message in refuse(tmp_path, "jaxla.predict", f"--run={small_run}", "--input=scan.nii.gz", *options)


def test_a_second_mask_of_a_case_in_another_format_is_refused(small_run, tmp_path):
    save(tmp_path / "scan.nii.gz", image_array())
    save_itk(tmp_path / "masks" / "scan.nrrd", mask_array())
    options = (f"--run={small_run}", "--input=scan.nii.gz", "--output=masks")
    line = refuse(tmp_path, "jaxla.predict", *options)
    assert (
        "masks/scan.nrrd: case scan already has a mask in a different format from scan.nii.gz. Use the same --format"
        in line
    )


@pytest.mark.parametrize("output", ["series", "series/masks", "series/mask.dcm", "series/mask.nii.gz"])
def test_no_mask_is_written_into_a_dicom_series(small_run, tmp_path, output):
    save_dicom(tmp_path / "series", image_array())
    line = refuse(tmp_path, "jaxla.predict", f"--run={small_run}", "--input=series", f"--output={output}")
    assert f"--output={output}: masks would be among the scans of --input=series." in line


@pytest.mark.parametrize(
    ("file_format", "extension"), [("scan", ".dcm"), ("nii.gz", ".nii.gz"), ("nrrd", ".nrrd"), ("dicom-seg", ".dcm")]
)
def test_the_format_determines_the_extension(tmp_path, file_format, extension):
    assert mask_extension(tmp_path, file_format) == extension
    require_mask_file(tmp_path / f"MASK{extension.upper()}", tmp_path, file_format)
    assert probabilities_extension(extension) == (".nii.gz" if extension == ".dcm" else extension)


@pytest.mark.parametrize(("file_format", "package"), [("scan", "highdicom"), ("nrrd", "SimpleITK")])
def test_a_package_that_is_missing_for_the_format_is_named(tmp_path, monkeypatch, file_format, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"need the package {package}. Run: pip install {package}"):
        mask_extension(tmp_path, file_format)
