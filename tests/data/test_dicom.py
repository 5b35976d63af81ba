"""Series of DICOM slices: what is read from their tags, and what is refused."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from jaxla.data.volumes import read_image
from tests.data.formats import edit_dicom, preserve_locale, refusal, save_dicom
from tests.data.nifti import image_array


def set_tags(**values):
    def change(dataset):
        for name, value in values.items():
            setattr(dataset, name, value)

    return change


def shift(axis, mm):
    """Return a change that moves slice n by n * mm along an axis of the patient."""

    def change(dataset):
        position = [float(value) for value in dataset.ImagePositionPatient]
        position[axis] += mm * dataset.InstanceNumber
        dataset.ImagePositionPatient = position

    return change


def delete(name):
    return lambda dataset: delattr(dataset, name)


def test_slope_and_intercept_of_each_dicom_slice_are_applied(tmp_path):
    def rescale(dataset):
        dataset.RescaleSlope, dataset.RescaleIntercept = ("0.5", "-10") if dataset.InstanceNumber > 1 else ("2", "0")

    volume = read_image(edit_dicom(save_dicom(tmp_path / "series", image_array()), rescale))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[..., 1:], image_array()[..., 1:] * 0.5 - 10)
    np.testing.assert_array_equal(volume.array[..., 0], image_array()[..., 0] * 2)


@pytest.mark.parametrize(
    ("compressor", "syntax"), [("JPEG", "1.2.840.10008.1.2.4.70"), ("JPEG2000", "1.2.840.10008.1.2.4.90")]
)
def test_compressed_dicom_slices_are_read(tmp_path, compressor, syntax):
    folder = save_dicom(tmp_path / "series", image_array())
    for path in folder.iterdir():
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(path))
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        with preserve_locale():
            writer.Execute(sitk.ReadImage(str(path)))
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_image(folder).array, image_array())


def test_bits_beyond_bits_stored_are_not_part_of_a_dicom_voxel(tmp_path):
    def store_12_bits(dataset):
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<i2") & 0x0FFF | 0x5000).astype("<i2").tobytes()

    folder = edit_dicom(save_dicom(tmp_path / "series", image_array() - 500), store_12_bits)
    np.testing.assert_array_equal(read_image(folder).array, image_array() - 500)


def test_other_files_in_a_dicom_folder_are_named(tmp_path):
    folder = save_dicom(tmp_path / "series", image_array())
    (folder / "notes.txt").write_text("a note")
    assert read_image(folder).warnings == ("files that are not DICOM slices are not used (1): notes.txt",)


def test_the_spacing_of_a_single_dicom_slice_is_read_from_its_tags(tmp_path):
    folder = save_dicom(tmp_path / "series", image_array(shape=(5, 6, 1)))
    assert read_image(edit_dicom(folder, set_tags(SpacingBetweenSlices=4))).spacing == (0.75, 0.75, 4)
    assert read_image(edit_dicom(folder, set_tags(SpacingBetweenSlices=None, SliceThickness=3))).spacing[2] == 3
    assert "a single slice without SliceThickness" in refusal(edit_dicom(folder, set_tags(SliceThickness=None)))


# --- refused ---------------------------------------------------------------------------------------------------------


DICOM_FAULTS = {  # name -> change, positions of the changed files, part of the message
    "uneven": (shift(2, 0.4), (1,), "unevenly spaced: gaps from 1.7 to 3.3 mm"),
    "duplicate": (set_tags(ImagePositionPatient=[-6, -5, -4]), (0, 1), "2 slices have the same position"),
    "tilted": (shift(1, 0.5), (), "gantry tilt"),
    "localizer": (
        set_tags(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
        (2,),
        "a different orientation from s1_000.dcm",
    ),
    "not orthogonal": (set_tags(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), (), "not two perpendicular unit vectors"),
    "multi-frame": (set_tags(NumberOfFrames=2), (0,), "a multi-frame DICOM file (2 frames)"),
    "colour": (set_tags(SamplesPerPixel=3, PhotometricInterpretation="RGB"), (), "voxels are RGB with 3 values each"),
    "inverted": (set_tags(PhotometricInterpretation="MONOCHROME1"), (), "voxels are MONOCHROME1"),
    "no position": (delete("ImagePositionPatient"), (1,), "no ImagePositionPatient in this DICOM file (MR)"),
    "other spacing": (set_tags(PixelSpacing=[0.8, 0.75]), (3,), "PixelSpacing is [0.8, 0.75], unlike [.75, .75]"),
    "other size": (set_tags(Rows=7, PixelData=b"\0" * 224), (3,), "Rows is 7, unlike 14 in s1_000.dcm"),
    "no spacing": (set_tags(PixelSpacing=[0, 0]), (), "pixel spacing is damaged"),
    "short": (set_tags(PixelData=b"\0" * 100), (1,), "cannot be read as DICOM"),
}


@pytest.mark.parametrize(("change", "positions", "message"), DICOM_FAULTS.values(), ids=DICOM_FAULTS)
def test_dicom_slices_that_are_not_a_regular_grey_volume_are_refused(tmp_path, change, positions, message):
    folder = edit_dicom(save_dicom(tmp_path / "series", image_array()), change, *positions)
    assert message in refusal(folder)


def test_a_missing_dicom_slice_is_refused(tmp_path):
    folder = save_dicom(tmp_path / "series", image_array())
    (folder / "s1_007.dcm").unlink()
    message = "a slice is missing: a gap of 5 mm where others are"
    assert message in refusal(folder)


def test_several_dicom_series_are_named(tmp_path):
    folder = save_dicom(tmp_path / "series", image_array())
    save_dicom(folder, image_array(1), series="2")
    expected = "holds 2 DICOM series: series 1 (4 files, such as s1_000.dcm); series 2 (4 files, such as s2_000.dcm)."
    assert expected in refusal(folder)


def test_a_damaged_file_among_dicom_slices_is_refused(tmp_path):
    folder = save_dicom(tmp_path / "series", image_array())
    path = folder / "s1_014.dcm"
    path.write_bytes(b"\0" * 500)
    assert refusal(folder).startswith(f"{path}: not a DICOM file in a folder of slices.")
    path.write_bytes((folder / "s1_007.dcm").read_bytes()[:700])
    assert refusal(folder).startswith(f"{path}: ")


def test_a_folder_without_dicom_slices_is_refused(tmp_path):
    assert "no DICOM slice in this folder" in refusal(tmp_path)
