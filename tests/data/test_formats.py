"""Scans in formats other than NIfTI: all give the same voxels and geometry, and damaged files are refused."""

import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.eulerangles import euler2mat

from jaxla.config import InputError
from jaxla.data.formats import is_scan, scan_files, scan_sha256, strip_extension
from jaxla.data.volumes import read_grid, read_image, read_mask, write_volume
from tests.data.formats import ITK_NAMES, OBLIQUE, refusal, save_any, save_dicom, save_itk
from tests.data.nifti import AFFINE, SHAPE, image_array, mask_array, save


def read_or_refuse(path):
    """Return the volume and an empty text, or None and the text of the error."""
    try:
        return read_image(path), ""
    except InputError as error:
        return None, str(error)


# --- the same scan in every format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("name", [*ITK_NAMES, "series"])
def test_every_format_gives_the_voxels_and_the_affine_of_nifti(tmp_path, name, affine):
    expected = read_image(save(tmp_path / "a.nii.gz", image_array(), affine))
    volume = read_image(save_any(tmp_path / name, image_array(), affine))
    np.testing.assert_array_equal(volume.array, image_array())
    assert volume.array.dtype == expected.array.dtype
    np.testing.assert_array_equal(volume.affine, expected.affine)
    np.testing.assert_array_equal(read_grid(tmp_path / name).affine, expected.affine)
    mask = read_mask(save_any(tmp_path / f"mask-{name}", mask_array(value=3), affine))
    np.testing.assert_array_equal(mask.array, mask_array(value=3))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("flips", [(-1, 1, 1), (1, -1, 1), (-1, -1, -1)])
def test_mirrored_axes_are_read(tmp_path, name, flips):
    """A DICOM series cannot be mirrored: its slices are sorted along their normal."""
    affine = OBLIQUE @ np.diag([*flips, 1])
    np.testing.assert_array_equal(
        read_image(save_itk(tmp_path / name, image_array(), affine)).affine, np.float32(affine)
    )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ITK_NAMES)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "float32", "float64"])
def test_every_voxel_type_is_read(tmp_path, name, dtype, compressed):
    values = (image_array() - 500).astype(dtype)
    volume = read_image(save_itk(tmp_path / name, values, compressed=compressed))
    np.testing.assert_array_equal(volume.array, values)
    assert volume.array.dtype == ("float32" if values.dtype.kind == "f" else dtype)


NRRD_HEADER = """NRRD0004
# written by hand
type: {type}
dimension: 3
space: {space}
sizes: 3 2 2
space directions: (0,-2,0) (0.5,0,0) (0,0,3)
space origin: (10,20,30)
endian: big
encoding: raw
name:=a patient: 1
"""


@pytest.mark.parametrize(("space", "signs"), [("RAS", (1, 1)), ("left-anterior-superior", (-1, 1)), ("LPS", (-1, -1))])
def test_a_handwritten_nrrd_file_is_read_in_the_space_that_it_names(tmp_path, space, signs):
    path = tmp_path / "a.nrrd"
    values = np.arange(12).reshape(3, 2, 2, order="F")
    header = NRRD_HEADER.format(type="signed short", space=space)
    path.write_bytes(f"{header}\n".encode() + values.astype(">i2").tobytes(order="F"))
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, values)
    in_file_space = np.array([[0, 0.5, 0, 10], [-2, 0, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])
    np.testing.assert_array_equal(volume.affine, np.diag([*signs, 1, 1]) @ in_file_space)
    assert volume.spacing == (2, 0.5, 3)


META_HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = True
TransformMatrix = 0 -1 0 1 0 0 0 0 1
Offset = 10 20 30
ElementSpacing = 2 0.5 3
DimSize = 3 2 2
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""


def test_a_handwritten_mha_file_is_read(tmp_path):
    path = tmp_path / "a.mha"
    values = np.arange(12).reshape(3, 2, 2, order="F")
    path.write_bytes(META_HEADER.encode() + values.astype(">i2").tobytes(order="F"))
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, values)
    np.testing.assert_array_equal(volume.affine, [[0, -0.5, 0, -10], [2, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


# --- names and files -------------------------------------------------------------------------------------------------


def test_scans_are_recognised_by_name_and_dicom_by_content(tmp_path):
    names = ("a.NII.GZ", "b.nii", "c.Nrrd", "d.nhdr", "e.mha", "f.MHD")
    for name in (*names, "a.txt", "a.raw", "nii", ".hidden.nrrd", "notes.dcm", "c.json"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    save_dicom(tmp_path / "1.2.840", image_array())
    assert sorted(path.name for path in tmp_path.iterdir() if is_scan(path)) == sorted((*names, "1.2.840"))
    assert not any(map(is_scan, (tmp_path / "1.2.840").iterdir()))
    assert [strip_extension(name) for name in (*names, "1.2.840")] == [*"abcdef", "1.2.840"]


@pytest.mark.parametrize(("name", "count"), [("a.nrrd", 1), ("a.nhdr", 2), ("a.mhd", 2), ("series", 4)])
def test_the_hash_of_a_scan_covers_all_its_files(tmp_path, name, count):
    path = save_any(tmp_path / name, image_array())
    files, before = scan_files(path), scan_sha256(path)
    assert len(files) == count
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    assert scan_sha256(path) != before


@pytest.mark.parametrize(("name", "renamed"), [("a.nhdr", "b.nrrd"), ("a.mhd", "b.mha")])
def test_the_hash_of_a_scan_covers_voxels_that_its_header_names(tmp_path, name, renamed):
    path = save_any(tmp_path / name, image_array()).rename(tmp_path / renamed)
    assert len(scan_files(path)) == 2
    assert read_image(path).array.shape == image_array().shape


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "series"])
def test_an_unusual_size_is_found_without_reading_the_voxels(tmp_path, name):
    path = save_any(tmp_path / name, image_array(shape=(140, 5, 4)), np.diag([19.0, 1, 1, 1]))
    assert "unusual size: voxels of 19×1×1 mm, 2660×5×4 mm in all" in read_grid(path).warnings[0]
    assert read_grid(path).warnings == read_image(path).warnings


@pytest.mark.parametrize(("name", "package"), [("a.nrrd", "SimpleITK"), ("series", "pydicom")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    path = save_any(tmp_path / name, image_array())
    monkeypatch.setitem(sys.modules, package, None)
    assert f"the package {package}. Run: pip install {package}" in refusal(path)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE, OBLIQUE @ np.diag([-1, 1, 1, 1])])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_mask_is_written_at_the_position_of_its_scan(tmp_path, name, affine):
    scan = read_image(save(tmp_path / "scan.nii.gz", image_array(), affine))
    write_volume(tmp_path / "out" / name, mask_array(value=420), scan)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    written = sitk.ReadImage(str(tmp_path / "out" / name))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written).T, mask_array(value=420))
    assert sitk.GetArrayFromImage(written).dtype == np.int16
    for index in ((0, 0, 0), (15, 2, 3)):
        point = written.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(point, np.diag([-1, -1, 1]) @ (affine @ [*index, 1])[:3], atol=1e-5)
    np.testing.assert_array_equal(read_mask(tmp_path / "out" / name).affine, scan.affine)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_probabilities_of_several_classes_are_written_as_vectors(tmp_path, name):
    scan = read_image(save(tmp_path / "scan.nii.gz", image_array()))
    probabilities = np.random.default_rng(0).random((*SHAPE, 3), np.float32)
    write_volume(tmp_path / name, probabilities, scan)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))  # [Z, Y, X, K]
    np.testing.assert_array_equal(written.transpose(2, 1, 0, 3), probabilities)


def random_affine(rng):
    """Return an affine with any rotation, axes in any order and direction, and spacings from 0.3 to 5 mm."""
    affine = np.eye(4)
    rotation = euler2mat(*rng.uniform(-np.pi, np.pi, 3)) if rng.random() < 0.7 else np.eye(3)
    affine[:3, :3] = rotation[:, rng.permutation(3)] * rng.choice([-1, 1], 3) * np.exp(rng.uniform(-1.2, 1.6, 3))
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


@pytest.mark.parametrize("seed", range(40))
def test_scans_and_masks_of_random_geometries_agree_in_world_coordinates(tmp_path, seed):
    rng = np.random.default_rng(seed)
    affine, shape = random_affine(rng), tuple(rng.integers(2, 7, 3))
    name = ("a.nrrd", "a.nhdr", "a.mha", "a.mhd", "series")[seed % 5]
    if name == "series" and np.linalg.det(affine) < 0:
        affine[:, 2] *= -1
    array = rng.integers(0, 250, shape).astype(
        rng.choice(["uint8", "int16", "int32" if name != "series" else "uint16"])
    )
    scan = read_image(save_any(tmp_path / name, array, affine))
    np.testing.assert_array_equal(scan.array, array)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    np.testing.assert_allclose(scan.affine @ corners, affine @ corners, atol=1e-4)

    path = tmp_path / f"mask{('.nii.gz', '.nrrd', '.mha')[seed % 3]}"
    write_volume(path, (array > 125).astype(np.uint8), scan)
    mask = read_mask(path)
    np.testing.assert_array_equal(mask.array, array > 125)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert np.prod(mask.spacing) == pytest.approx(abs(np.linalg.det(affine[:3, :3])), rel=1e-4)


# --- refused ---------------------------------------------------------------------------------------------------------

NRRD_FAULTS = {  # name -> old text, new text, part of the message
    "not NRRD": ("NRRD0004", "NRRX0004", "not an NRRD file"),
    "4D": ("dimension: 3", "dimension: 4", "is 4D with shape 16 14 4"),
    "huge": ("sizes: 16 14 4", "sizes: 16 14 4000000000", "the header declares 1792000000000"),
    "wraps to 4": ("sizes: 16 14 4", "sizes: 16 14 4294967300", "bytes of voxels, but the header declares"),
    "surplus": ("sizes: 16 14 4", "sizes: 16 14 3", "1792 bytes of voxels, but the header declares 1344"),
    "negative": ("sizes: 16 14 4", "sizes: 16 -14 4", "instead of three positive integers"),
    "type": ("type: short", "type: shart", "unsupported voxel type 'shart'"),
    "no spacing": ("space directions", "#space directions", "no voxel spacing in the header"),
    "not finite": ("(0,0,2.5)", "(0,0,nan)", "'spacedirections' is"),
    "two axes": ("(0,0,2.5)", "", "instead of three vectors"),
    "parallel": ("(0,0,2.5)", "(0.75,0,0)", "parallel"),
    "sheared": ("(0,0,2.5)", "(0.2,0,2.5)", "sheared: two axes are 4.6° off a right angle"),
    "encoding": ("encoding: raw", "encoding: hex", "'encoding' is 'hex' in the header; it must be raw or gzip"),
    "no byte order": ("endian", "#endian", "the header has no field 'endian'"),
    "unit": ("encoding: raw", 'encoding: raw\nspace units: "mm" "mm" "um"', "lengths are in um"),
    "unknown field": ("kinds", "kimds", "failed to parse"),
    "several files": ("encoding: raw", "encoding: raw\ndata file: a%d.raw 1 4 1", "in several files"),
    "no such file": ("encoding: raw", "encoding: raw\ndata file: b.raw", "'b.raw', which does not exist"),
}
META_FAULTS = {  # name -> old text, new text, part of the message
    "not MetaImage": ("ObjectType = Image", "ObjectType = Scene", "'ObjectType' is 'Scene'"),
    "no end": ("ElementDataFile", "ElementDataPile", "its header is truncated"),
    "many dimensions": ("NDims = 3", "NDims = 99", "is 99D with shape 16 14 4"),  # makes ITK 5.4 end the process
    "huge": ("DimSize = 16 14 4", "DimSize = 4000 1400 1400", "the header declares 15680000000"),
    "few": ("DimSize = 16 14 4", "DimSize = 16 14", "instead of three positive integers"),
    "no spacing": ("ElementSpacing", "Spacing", "the header has no field 'ElementSpacing'"),
    "zero": ("ElementSpacing = 0.75", "ElementSpacing = 0", "voxel spacing 0 0.75 2.5 in the header"),
    "type": ("MET_SHORT", "MET_LONG", "unsupported voxel type 'met_long'"),
    "channels": ("NDims = 3", "NDims = 3\nElementNumberOfChannels = 3", "'ElementNumberOfChannels' is '3'"),
    "scaled": ("NDims = 3", "NDims = 3\nElementToIntensityFunctionSlope = 2", "most programs ignore"),
    "text": ("BinaryData = True", "BinaryData = False", "'BinaryData' is 'False'"),
    "twice": ("NDims = 3", "NDims = 3\nNDims = 3", "two fields 'NDims'"),
    "parallel": ("1 0 0 0 1 0 0 0 1", "1 0 0 1 0 0 0 0 1", "parallel"),
    "long axis": ("1 0 0 0 1 0 0 0 1", "1 0 0 0 1 0 0 0 1.2", "not of length 1"),
}
FAULTS = [("a.nrrd", *fault) for fault in NRRD_FAULTS.values()] + [("a.mha", *fault) for fault in META_FAULTS.values()]


@pytest.mark.parametrize(("name", "old", "new", "message"), FAULTS, ids=[*NRRD_FAULTS, *META_FAULTS])
def test_damaged_headers_are_refused_with_the_reason(tmp_path, capfd, name, old, new, message):
    path = save_itk(tmp_path / name, image_array())
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))
    assert message in refusal(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ITK_NAMES)
def test_truncated_voxels_are_refused(tmp_path, capfd, name, compressed):
    path = save_itk(tmp_path / name, image_array(), compressed=compressed)
    data = scan_files(path)[-1]
    data.write_bytes(data.read_bytes()[:-5])
    assert "truncated or damaged" in refusal(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_flipped_bit_in_compressed_voxels_is_found(tmp_path, name):
    path = save_itk(tmp_path / name, image_array(), compressed=True)
    content = bytearray(path.read_bytes())
    content[-400] ^= 16
    path.write_bytes(content)
    assert "truncated or damaged" in refusal(path)


def test_a_compressed_mha_file_without_its_compressed_size_is_refused(tmp_path):
    """ITK 5.4 returns wrong voxels for such a file."""
    path = save_itk(tmp_path / "a.mha", image_array(), compressed=True)
    path.write_bytes(path.read_bytes().replace(b"CompressedDataSize", b"SizeOfCompression"))
    assert "the header has no field 'CompressedDataSize'" in refusal(path)


@pytest.mark.parametrize(("name", "field"), [("a.nrrd", "space origin: "), ("a.mha", "TransformMatrix = ")])
def test_a_header_without_orientation_is_read_with_a_warning(tmp_path, name, field):
    path = save_itk(tmp_path / name, image_array())
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if not line.startswith(field.encode())]
    path.write_bytes(b"".join(lines))
    volume = read_image(path)
    assert volume.spacing == (0.75, 0.75, 2.5)
    assert any("no orientation is recorded" in warning for warning in volume.warnings)


def test_mutations_of_headers_are_refused_in_one_line_or_keep_the_geometry_that_they_declare(tmp_path, capfd):
    """Each of sixty seeded mutations changes one to three bytes; SimpleITK reads every accepted file."""
    paths = {name: save_itk(tmp_path / name, image_array(), OBLIQUE, compressed=True) for name in ("a.nrrd", "a.mha")}
    original = {name: path.read_bytes() for name, path in paths.items()}
    accepted = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        name = ("a.nrrd", "a.mha")[seed % 2]
        content = bytearray(original[name])
        for position in rng.integers(0, 400 if seed % 3 else len(content), 1 + seed % 3):
            content[position] = rng.integers(256) if seed % 4 else rng.choice(list(b"0123456789 .-=:\n"))
        paths[name].write_bytes(content)
        volume, refused = read_or_refuse(paths[name])
        assert "\n" not in refused, seed
        assert "0x" not in refused, seed  # no memory address
        if volume is None:
            continue
        accepted += 1
        expected = sitk.ReadImage(str(paths[name]))
        np.testing.assert_array_equal(volume.array.T, sitk.GetArrayFromImage(expected), str(seed))
        np.testing.assert_allclose(volume.spacing, expected.GetSpacing(), rtol=1e-6, err_msg=str(seed))
    assert capfd.readouterr().err == ""
    assert 0 < accepted < 60


def test_a_folder_copied_without_its_voxels_is_refused(tmp_path):
    path = save_itk(tmp_path / "a.mhd", image_array())
    shutil.move(tmp_path / "a.raw", tmp_path / "b.raw")
    assert refusal(path) == f"{path}: its voxels are in 'a.raw', which does not exist. Copy both files."
