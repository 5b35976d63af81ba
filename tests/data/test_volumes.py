"""Volumes: what is read and refused, and the geometry of written files."""

import hashlib
import os

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.volumes import (
    Volume,
    hash_voxels,
    image_from_array,
    read_image,
    read_mask,
    require_same_grid,
    same_grid,
    write_volume,
)
from tests.data.nifti import (
    AFFINE,
    SHAPE,
    edit_header,
    image_array,
    image_with_voxel,
    mask_array,
    oblique_affine,
    save,
    save_image,
    save_raw_spacing,
    save_sheared,
    save_singular,
    truncate,
)

# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float32", ">f4", "float64"])
def test_the_values_of_every_usual_type_are_read_unchanged(tmp_path, name, dtype):
    values = (image_array() % 250).astype(dtype)
    volume = read_image(save(tmp_path / name, values))
    np.testing.assert_array_equal(volume.array, values)
    assert volume.array.dtype == (np.float32 if values.dtype.kind == "f" else values.dtype)
    assert volume.array.dtype.isnative or values.dtype.kind != "f"
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.spacing == (0.75, 0.75, 2.5)
    assert volume.path == tmp_path / name


@pytest.mark.parametrize("side", [1e-3, 0.02, 50])
def test_voxels_of_any_size_are_read(tmp_path, side):
    """Such voxels come, for example, from a microscope, or from a file with spacings in metres."""
    path = save(tmp_path / "a.nii", image_array(), np.diag([side, side, 2 * side, 1]))
    assert read_image(path).spacing == pytest.approx((side, side, 2 * side), rel=1e-6)


def test_the_axes_of_the_file_are_kept(tmp_path):
    values = np.zeros(SHAPE, np.int16)
    values[1, 2, 3] = 7
    assert np.argwhere(read_image(save(tmp_path / "a.nii", values)).array).tolist() == [[1, 2, 3]]


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(image_array(), AFFINE)
    path = save_image(tmp_path / "a.nii", image)
    volume = read_image(edit_header(path, scl_slope=0.5, scl_inter=-10))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, image_array() * 0.5 - 10)  # exact: halves of small whole numbers


def test_nifti_2_is_read(tmp_path):
    volume = read_image(save(tmp_path / "a.nii.gz", image_array(), image_class=nib.Nifti2Image))
    np.testing.assert_array_equal(volume.array, image_array())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", ">i2"])
def test_masks_are_read_as_int32_whatever_their_type(tmp_path, dtype):
    path = save(tmp_path / "m.nii.gz", mask_array(value=3).astype(dtype))
    mask = read_mask(path)
    assert mask.array.dtype == np.int32
    np.testing.assert_array_equal(mask.array, mask_array(value=3))
    assert (mask.path, mask.spacing) == (path, (0.75, 0.75, 2.5))
    assert mask.header.get_data_dtype() == dtype


def test_label_values_up_to_65535_are_read(tmp_path):
    assert read_mask(save(tmp_path / "m.nii", mask_array().astype(np.int32) * 65535)).array.max() == 65535
    with pytest.raises(InputError, match="whole numbers from 0 to 65535"):
        read_mask(save(tmp_path / "m.nii", mask_array().astype(np.int32) * 65536))


def test_an_empty_mask_is_a_mask(tmp_path):
    assert not read_mask(save(tmp_path / "m.nii.gz", np.zeros(SHAPE, np.uint8))).array.any()


def write_text(path):
    path.write_bytes(b"not a scan at all" * 40)
    return path


def save_rgb(path):
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    return save_image(path, nib.Nifti1Image(colours, AFFINE))


BAD_FILES = {
    "4d.nii.gz": (lambda p: save(p, np.ones((4, 4, 4, 2), np.int16)), r"4D with shape \(4, 4, 4, 2\).*one 3D volume"),
    "2d.nii.gz": (lambda p: save(p, np.ones((4, 5), np.int16)), r"2D with shape \(4, 5\)"),
    "no_voxels.nii": (lambda p: save(p, np.ones((4, 0, 4), np.int16)), "no voxels"),
    "nan.nii.gz": (lambda p: save(p, image_with_voxel(np.nan)), "1 of 896 voxels are NaN or infinite"),
    "inf.nii.gz": (lambda p: save(p, image_with_voxel(-np.inf)), "1 of 896 voxels are NaN or infinite"),
    "too_large_for_float32.nii": (lambda p: save(p, image_with_voxel(1).astype("f8") * 1e300), "NaN or infinite"),
    "cut.nii.gz": (lambda p: truncate(save(p, image_array())), "truncated or damaged"),
    "cut_in_header.nii.gz": (lambda p: truncate(save(p, image_array()), 0.02), "truncated or damaged|not a NIfTI"),
    "cut.nii": (
        lambda p: truncate(save(p, image_array())),
        r"truncated or damaged \(its header declares 2144 bytes, .*, but the file holds 1072\)",
    ),
    "cut_in_header.nii": (lambda p: truncate(save(p, image_array()), 0.1), "truncated or damaged|not a NIfTI"),
    "empty.nii": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text.nii": (write_text, "not a NIfTI"),
    "text.nii.gz": (write_text, "not a NIfTI"),
    "other_format.mgz": (lambda p: save_image(p, nib.MGHImage(image_array(), AFFINE)), "not a NIfTI file"),
    "other_format.nii": (
        lambda p: save_image(p.with_suffix(".mgh"), nib.MGHImage(image_array(), AFFINE)).rename(p),
        "not a NIfTI",
    ),
    "zero_spacing.nii": (lambda p: save_raw_spacing(p, (0.75, 0, 2.5)), r"voxel spacing \[0.75, 0.0, 2.5\]"),
    "nan_spacing.nii": (lambda p: save_raw_spacing(p, (0.75, np.nan, 2.5)), "voxel spacing"),
    "singular.nii.gz": (save_singular, "sform is singular"),
    "sheared.nii.gz": (save_sheared, r"sform is sheared: two axes are 2\.9° off a right angle"),
    "complex.nii": (lambda p: save(p, image_array().astype(np.complex64)), "complex64 are not grey values"),
    "colours.nii": (save_rgb, "not grey values"),
    "missing.nii.gz": (lambda p: None, "no such file"),
    "folder.nii.gz": (lambda p: p.mkdir(), "no DICOM slice in this folder"),
    "pipe.nii.gz": (os.mkfifo, "neither a file nor a folder"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.filterwarnings("error")  # a warning would be a second line on the terminal
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, name, read):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"^{tmp_path / name}: .*{message}") as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_damaged_compressed_data_is_refused(tmp_path):
    """If the data still decompress, only the checksum of gzip reveals a flipped byte."""
    path = save(tmp_path / "a.nii.gz", image_array(shape=(24, 24, 8)))
    intact = path.read_bytes()
    for i in range(800, len(intact) - 100, 97):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 1]) + intact[i + 1 :])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_image(path)


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_is_refused_and_a_constant_mask_is_not(tmp_path, value):
    path = save(tmp_path / "a.nii.gz", np.full(SHAPE, value, np.int16))
    with pytest.raises(InputError, match=f"^{path}: every voxel is {value}\\."):
        read_image(path)
    assert (read_mask(path).array == value).all()


def test_a_mask_with_fractional_values_is_refused(tmp_path):
    path = save(tmp_path / "m.nii.gz", mask_array().astype(np.float32) / 2)
    with pytest.raises(InputError, match=f"^{path}: holds the value 0.5, which is not a label"):
        read_mask(path)


@pytest.mark.parametrize(("value", "dtype"), [(1e12, "f4"), (-1e12, "f4"), (4e9, "u4"), (2**40, "i8")])
@pytest.mark.filterwarnings("error")
def test_a_mask_value_that_overflows_is_refused(tmp_path, value, dtype):
    path = save(tmp_path / "m.nii", mask_array().astype(dtype) * np.dtype(dtype).type(value))
    with pytest.raises(InputError, match=rf"^{path}: holds the value -?[14].*, which is not a label"):
        read_mask(path)


# --- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.full((4, 4), np.nan), "image: its affine holds values that are not finite"),
        (np.zeros((4, 4)), "image: its affine is singular"),
        (np.diag([1e300, 1, 1, 1]), "image: its affine holds values that are not finite"),
        (np.eye(4) + np.eye(4, k=1), "image: its affine is sheared"),
        (np.diag([1.0, 200, 1, 1]), "image: impossible size: voxels of 1×200×1 mm"),
        (np.eye(3), r"affine: has shape \(3, 3\)"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_array_with_an_unusable_affine_is_refused(affine, message):
    with pytest.raises(InputError, match=f"^{message}"):
        image_from_array(image_array(), affine)


# --- grids -----------------------------------------------------------------------------------------------------------


def make_volume(affine, shape=(3, 5, 7), name="a.nii"):
    return Volume(name, np.zeros(shape, np.int16), affine, None)


@pytest.mark.parametrize(("shift", "same"), [(0.099, True), (0.101, False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grids_may_differ_by_10_percent_of_the_smallest_voxel_side(shift, same, axis):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    moved = affine.copy()
    moved[axis, 3] = shift
    assert same_grid(make_volume(affine), make_volume(moved)) is same
    assert same_grid(make_volume(moved), make_volume(affine)) is same


def test_grids_that_differ_only_in_the_last_corner_are_different():
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    stretched = np.diag([1.0, 1.0, 1.016, 1.0])  # the last of 7 voxels lies 0.096 off
    further = np.diag([1.0, 1.0, 1.017, 1.0])  # 0.102
    assert same_grid(make_volume(affine), make_volume(stretched))
    assert not same_grid(make_volume(affine), make_volume(further))


def test_grids_that_differ_only_in_the_first_corner_are_different():
    """They coincide in the last voxel of every axis, and are 0.12 voxels apart in the first."""
    affine, shape = np.diag([1.0, 1.0, 1.0, 1.0]), (3, 5, 7)
    stretched = np.diag([1.0, 1.0, 1.02, 1.0])
    stretched[2, 3] = -0.02 * 6
    assert not same_grid(make_volume(affine, shape), make_volume(stretched, shape))


@pytest.mark.parametrize(("side", "same"), [(0.5, False), (2.0, True)])
def test_the_tolerance_is_relative_to_the_voxel_size(side, same):
    affine = np.diag([side, side, side, 1.0])
    moved = affine.copy()
    moved[0, 3] = 0.08
    assert same_grid(make_volume(affine), make_volume(moved)) is same


def test_a_mask_on_another_grid_is_refused_with_the_difference():
    with pytest.raises(InputError, match=r"^m: not on the grid of i \(shape \(3, 5, 7\) instead of \(3, 5, 6\)\)"):
        require_same_grid(make_volume(AFFINE, name="m"), make_volume(AFFINE, (3, 5, 6), "i"))
    with pytest.raises(
        InputError,
        match=r"^m: not on the grid of i \(same shape, different affine: \[-0.75 0 0 6; 0 -0.* the header of the other",
    ):
        require_same_grid(make_volume(AFFINE, name="m"), make_volume(np.eye(4), name="i"))
    require_same_grid(make_volume(AFFINE), make_volume(AFFINE))


def test_the_hash_of_a_scan_depends_on_voxels_and_shape_but_not_on_memory_order():
    array = image_array()
    expected = hashlib.sha256(b"(16, 14, 4)" + array.tobytes()).hexdigest()
    assert hash_voxels(array) == hash_voxels(np.asfortranarray(array)) == expected
    assert hash_voxels(array.reshape(14, 16, 4)) != expected
    assert hash_voxels(array + 1) != expected


# --- writing ---------------------------------------------------------------------------------------------------------

GEOMETRY_FIELDS = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


def scan_with_codes(path, qform_code, sform_code, image_class=nib.Nifti1Image, endianness="<"):
    """Write an oblique scan with codes and units, whose qform and sform differ slightly; return the path."""
    header = image_class.header_class(endianness=endianness)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(endianness))
    image = image_class(image_array(), None, header)
    affine = oblique_affine()
    image.header.set_qform(affine, code=qform_code)
    affine[:3, 3] += 0.01
    image.header.set_sform(affine, code=sform_code)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"], image.header["descrip"] = 500, b"LGE"
    return save_image(path, image_class(image_array(), None, image.header))


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (0, 1), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", "<>")
@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_a_written_mask_has_exactly_the_geometry_of_its_scan(tmp_path, codes, image_class, endianness, name):
    scan = read_image(scan_with_codes(tmp_path / "scan.nii.gz", *codes, image_class, endianness))
    folder = tmp_path / "new" / "folder"
    write_volume(folder / name, mask_array(), scan)
    source, written = nib.load(tmp_path / "scan.nii.gz"), nib.load(folder / name)
    assert type(written) is type(source)
    np.testing.assert_array_equal(np.asarray(written.dataobj), mask_array())
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, source.affine)
    for key in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(written.header[key], source.header[key], err_msg=key)
    np.testing.assert_array_equal(written.header["pixdim"][:4], source.header["pixdim"][:4])
    assert written.header.get_zooms() == source.header.get_zooms()
    assert bytes(written.header["descrip"]) == bytes(source.header["descrip"])
    assert written.header["cal_max"] == 0  # the grey value range of a scan would hide the mask in a viewer
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("classes", [(), (3,)], ids=["3D", "4D"])
def test_probabilities_are_written_unchanged(tmp_path, classes):
    scan = read_image(scan_with_codes(tmp_path / "scan.nii.gz", 1, 1))
    values = np.random.default_rng(0).random((*SHAPE, *classes), np.float32)
    write_volume(tmp_path / "p.nii.gz", values, scan)
    written = nib.load(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), values)
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.affine, scan.affine)
    np.testing.assert_array_equal(written.header["pixdim"][:4], scan.header["pixdim"][:4])


def test_a_scaled_scan_does_not_scale_its_mask(tmp_path):
    path = edit_header(save(tmp_path / "scan.nii", image_array()), scl_slope=0.5, scl_inter=-10)
    write_volume(tmp_path / "m.nii.gz", mask_array(), read_image(path))
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj), mask_array())


def test_a_written_mask_replaces_an_older_mask(tmp_path):
    scan = read_image(save(tmp_path / "scan.nii", image_array()))
    for value in (1, 3):
        write_volume(tmp_path / "m.nii.gz", mask_array(value=value), scan)
    assert read_mask(tmp_path / "m.nii.gz").array.max() == 3


def test_a_folder_that_cannot_be_written_is_named_and_unchanged(tmp_path):
    scan = read_image(save(tmp_path / "scan.nii", image_array()))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "m.nii.gz").mkdir()
    for path in (tmp_path / "file" / "m.nii.gz", tmp_path / "file" / "deeper" / "m.nii.gz", tmp_path / "m.nii.gz"):
        with pytest.raises(InputError, match=f"^{path}: cannot be written"):
            write_volume(path, mask_array(), scan)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "m.nii.gz", "scan.nii"]
    assert (tmp_path / "file").read_text() == "in the way"
