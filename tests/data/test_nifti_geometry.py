"""Geometry of NIfTI headers: which of sform and qform is used, in which unit, and what causes a warning or error."""

import contextlib
import gzip
import os
import re

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.data.volumes import read_grid, read_image, read_mask, write_volume
from tests.commands import run_in_this_process, succeed
from tests.data.nifti import AFFINE, edit_header, image_array, mask_array, save, save_image, write_flat_pairs

IDENTITY = (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
NAN = float("nan")
ACDC = {"srow": IDENTITY, "quatern": (0, 0, 0), "pixdim": (1, 1.32, 1.32, 10, 1, 1, 1, 1)}  # as in the public data set


def sform(*factors):
    """Return the sform of `AFFINE` with its axes multiplied by `factors`."""
    return tuple((AFFINE @ np.diag([*factors, 1]))[:3].ravel())


def rotated_sform(degrees):
    """Return the sform of `AFFINE` rotated about the head-foot axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return tuple((np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE)[:3].ravel())


def write_scan(path, **fields):
    """Write a scan whose sform and qform agree (codes 1), then overwrite fields of its header; return the path."""
    image = nib.Nifti1Image(image_array(), AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(AFFINE, 1)
    return edit_header(save_image(path, image), **fields)


# name -> changed fields of the header, expected spacing in mm, expected directions, expected warning
USED = {
    "both forms agree": ({}, (0.75, 0.75, 2.5), "LPS", None),
    "both forms agree within 1 percent": ({"srow": sform(1.009, 1, 1)}, (0.75675, 0.75, 2.5), "LPS", None),
    "sform of 1 mm, qform with pixdim": (ACDC, (1.32, 1.32, 10), "RAS", r"1×1×1 and 1.32×1.32×10\); using qform"),
    "forms differ by 1.1 percent": ({"srow": sform(1, 1, 1.011)}, (0.75, 0.75, 2.5), "LPS", "using qform"),
    "forms rotated by 0.9°": ({"srow": rotated_sform(0.9)}, (0.75, 0.75, 2.5), "LPS", None),
    "forms rotated by 7°": ({"srow": rotated_sform(7)}, (0.75, 0.75, 2.5), "LPS", r"rotated by 7\.0°.*using sform"),
    "only sform": ({"qform_code": 0, "quatern": (NAN, 9, 9)}, (0.75, 0.75, 2.5), "LPS", None),
    "only qform": ({"sform_code": 0, "srow": (NAN,) * 12}, (0.75, 0.75, 2.5), "LPS", None),
    "no form": ({"sform_code": 0, "qform_code": 0}, (0.75, 0.75, 2.5), "LAS", "no orientation is recorded"),
    "broken sform": ({"srow": (NAN,) * 12}, (0.75, 0.75, 2.5), "LPS", "sform holds values .* not finite; using qform"),
    "broken qform": ({"quatern": (0, 0, 1.5)}, (0.75, 0.75, 2.5), "LPS", "quaternion .* length 1.5 .*; using sform"),
    "sheared sform": ({"srow": (*sform(1, 1, 1)[:1], 0.1, *sform(1, 1, 1)[2:])}, (0.75, 0.75, 2.5), "LPS", "sheared"),
    "quaternion too long by rounding": ({"quatern": (0, 0, 1.00001), "sform_code": 0}, (0.75, 0.75, 2.5), "LPS", None),
    "qfac of 0 counts as 1": (
        {"pixdim": (0, 0.75, 0.75, 2.5, 1, 1, 1, 1), "sform_code": 0}, (0.75, 0.75, 2.5), "LPS", None,
    ),
    "negative pixdim": (
        {"pixdim": (1, -0.75, 0.75, 2.5, 1, 1, 1, 1)}, (0.75, 0.75, 2.5), "LPS", "negative voxel sizes",
    ),
    "micrometres": (
        {"xyzt_units": 3, "srow": sform(1e3, 1e3, 1e3), "pixdim": (1, 750, 750, 2500, 1, 1, 1, 1)},
        (0.75, 0.75, 2.5), "LPS", None,
    ),
    "metres and seconds": (
        {"xyzt_units": 1 + 8, "sform_code": 0, "pixdim": (1, 0.00075, 0.00075, 0.0025, 1, 1, 1, 1)},
        (0.75, 0.75, 2.5), "LPS", None,
    ),
    "undefined unit": ({"xyzt_units": 5}, (0.75, 0.75, 2.5), "LPS", "unit is not defined; reading lengths as mm"),
    "wrong bitpix": ({"bitpix": 32}, (0.75, 0.75, 2.5), "LPS", "bitpix 32, but voxels of type int16 have 16 bits"),
    "tiny voxels": ({"sform_code": 0, "pixdim": (1, *[0.005] * 3, 1, 1, 1, 1)}, (0.005,) * 3, "LPS", "unusual size"),
    "huge voxels": ({"sform_code": 0, "pixdim": (1, *[30] * 3, 1, 1, 1, 1)}, (30,) * 3, "LPS", "unusual size"),
    "vox_offset of 0": ({"vox_offset": 0}, (0.75, 0.75, 2.5), "LPS", None),
}  # fmt: skip


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_the_geometry_of_a_usable_header_is_read(tmp_path, name, extension):
    fields, spacing, directions, warning = USED[name]
    volume = read_image(write_scan(tmp_path / f"a{extension}", **fields))
    np.testing.assert_array_equal(volume.array, image_array())
    assert volume.spacing == pytest.approx(spacing, rel=1e-5)
    assert "".join(nib.aff2axcodes(volume.affine)) == directions
    assert len(volume.warnings) == (warning is not None)
    if warning:
        assert re.search(warning, volume.warnings[0])
    grid = read_grid(volume.path)
    np.testing.assert_array_equal(grid.affine, volume.affine)
    assert grid.warnings == volume.warnings


REFUSED = {  # name -> changed fields of the header, expected error
    "forms mirrored": ({"srow": sform(-1, 1, 1)}, r"directions \(RPS and LPS\); pixdim fits both\. Set the"),
    "sform alone against pixdim": ({**ACDC, "qform_code": 0}, "sform has voxels of 1×1×1, but pixdim of 1.32×1.32×10"),
    "both forms broken": ({"srow": (NAN,) * 12, "quatern": (0, 0, 2)}, "sform holds .* and the quaternion of qform"),
    "qfac": ({"pixdim": (0.3, 0.75, 0.75, 2.5, 1, 1, 1, 1)}, r"qfac \(pixdim\[0\]\) is 0\.3, but"),
    "sform_code": ({"sform_code": 77}, "sform_code is 77, but codes are 0 to 5"),
    "qform_code": ({"qform_code": -1}, "qform_code is -1, but codes are 0 to 5"),
    "unit of metres for spacing in mm": (
        {"xyzt_units": 1}, r"impossible size: voxels of 750×750×2500 mm, .* \(lengths in metres\). Correct the spacing",
    ),
    "unit of micrometres for spacing in mm": ({"xyzt_units": 3}, "impossible size: .* in micrometres"),
    "voxel of 1e38 mm": ({"sform_code": 0, "pixdim": (1, 1e38, 1, 1, 1, 1, 1, 1)}, "impossible size: voxels of 1e"),
    "negative dim": ({"dim": (3, -16, 14, 4, 1, 1, 1, 1)}, r"truncated or damaged \(its header has dim \[3, -16, "),
    "number of dims": ({"dim": (9, 16, 14, 4, 1, 1, 1, 1)}, r"truncated or damaged \(its header has dim \[9, "),
    "one slice fewer": ({"dim": (3, 16, 14, 3, 1, 1, 1, 1)}, r"more voxels than .* 1696 bytes, for voxels 16×14×3 of"),
    "one slice more": ({"dim": (3, 16, 14, 5, 1, 1, 1, 1)}, "truncated or damaged .* declares 2592 bytes.* holds 2144"),
    "too large to allocate": ({"dim": (3, *[32767] * 3, 1, 1, 1, 1)}, "declares 70362301923678 bytes.* holds 2144"),
    "datatype": ({"datatype": 2}, "more voxels than expected .* of type uint8"),
    "unknown datatype": ({"datatype": 99}, r"truncated or damaged \(data code 99 not recognized"),
    "vox_offset of -inf": ({"vox_offset": -np.inf}, r"truncated or damaged \(its header has vox_offset -inf\)"),
    "vox_offset of nan": ({"vox_offset": NAN}, "vox_offset nan"),
    "fractional vox_offset": ({"vox_offset": 352.5}, "vox_offset 352.5"),
    "small vox_offset": ({"vox_offset": 100}, "vox offset 100 too low"),
    "infinite slope": ({"scl_slope": np.inf}, "scl_slope inf"),
    "slope that is not a normal number": ({"scl_slope": 4.6e-41}, "scl_slope 4.6"),
    "infinite intercept": ({"scl_slope": 1, "scl_inter": np.inf}, "invalid intercept inf"),
    "separate voxels": ({"magic": b"ni1"}, "voxels are in a separate .img file. Convert the pair to one .nii.gz"),
    "no magic": ({"magic": b"abc"}, "not a NIfTI file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
@pytest.mark.filterwarnings("error")  # a warning would be a second line on the terminal
def test_an_unusable_header_is_refused(tmp_path, name, extension):
    fields, message = REFUSED[name]
    path = write_scan(tmp_path / f"a{extension}", **fields)
    with pytest.raises(InputError, match=f"^{path}: .*{message}"):
        read_image(path)


@pytest.mark.parametrize("name", USED)
def test_a_mask_keeps_every_field_of_the_scans_geometry(tmp_path, name):
    """This includes the unused one of sform and qform, so that any viewer shows scan and mask at the same position."""
    volume = read_image(write_scan(tmp_path / "a.nii", **USED[name][0]))
    write_volume(tmp_path / "m.nii", mask_array(), volume)
    before, after = ((tmp_path / name).read_bytes() for name in ("a.nii", "m.nii"))
    spacing, expected = (np.frombuffer(content[80:92], "<f4") for content in (after, before))
    np.testing.assert_array_equal(spacing, np.abs(expected))
    assert after[123] == before[123]  # units
    assert after[252:256] == before[252:256]  # codes
    assert after[268:328] == before[268:328]  # offsets of qform, and sform
    if "too long" not in name:
        assert after[256:268] == before[256:268]  # quaternion
    np.testing.assert_array_equal(read_mask(tmp_path / "m.nii").affine, volume.affine)


def test_a_4d_file_with_a_single_volume_is_read_as_3d_and_gets_a_3d_mask(tmp_path):
    path = save(tmp_path / "a.nii.gz", image_array()[..., None])
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, image_array())
    np.testing.assert_array_equal(volume.affine, AFFINE)
    np.testing.assert_array_equal(
        read_mask(save(tmp_path / "m.nii", mask_array()[..., None, None])).array, mask_array()
    )
    write_volume(tmp_path / "p.nii.gz", mask_array(), volume)
    assert nib.load(tmp_path / "p.nii.gz").shape == mask_array().shape


@pytest.mark.parametrize("stored", ["a.nii", "a.nii.gz"])
def test_a_file_with_the_wrong_extension_is_refused_with_the_right_name(tmp_path, stored):
    content = write_scan(tmp_path / "scan.nii").read_bytes()
    is_compressed = stored == "a.nii"
    path = tmp_path / stored
    path.write_bytes(gzip.compress(content) if is_compressed else content)
    correct_name = "a.nii.gz" if is_compressed else "a.nii"
    with pytest.raises(InputError, match=f"^{path}: .*compressed.*, but its name .*Rename it to {correct_name}\\."):
        read_image(path)


def test_file_names_in_upper_case_are_read(tmp_path):
    compressed = save(tmp_path / "a.nii.gz", image_array()).rename(tmp_path / "A.NII.GZ")
    np.testing.assert_array_equal(read_image(compressed).array, image_array())


def test_a_link_to_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz: a link to a missing file"):
        read_image(tmp_path / "a.nii.gz")


@contextlib.contextmanager
def without_privileges():
    """Run the context without the privileges of root, who may read every file."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_without_permission_is_not_called_damaged(tmp_path, kind):
    path = save(tmp_path / "data" / "a.nii.gz", image_array())
    (path if kind == "file" else path.parent).chmod(0)
    with without_privileges(), pytest.raises(InputError, match=f"^{path}: cannot be read \\(Permission denied\\)\\."):
        read_image(path)
    path.parent.chmod(0o700)


def test_labels_that_a_scale_factor_changed_slightly_are_rounded_to_integers(tmp_path):
    path = save(tmp_path / "m.nii", mask_array(value=3).astype(np.int16))
    edit_header(path, scl_slope=1.0000153, scl_inter=1e-4)
    np.testing.assert_array_equal(read_mask(path).array, mask_array(value=3))
    edit_header(path, scl_slope=1.001, scl_inter=0)
    with pytest.raises(InputError, match=r"m.nii: holds the value 3\.003, which is not a label"):
        read_mask(path)


def test_warnings_of_headers_appear_once_per_file_in_every_command(tmp_path, caplog):
    root = write_flat_pairs(tmp_path / "data", 3)
    for path in (root / "case_1.nii.gz", root / "case_1_mask.nii.gz"):
        edit_header(path, sform_code=0, qform_code=0)
    warning = (
        "no orientation is recorded (the codes of sform and qform are 0); assuming the axes left, anterior, superior"
    )
    expected = [f"{root / name}: {warning}" for name in ("case_1.nii.gz", "case_1_mask.nii.gz")]
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        prepare_cases(find_cases(root), tmp_path / "cache")
        assert [message for message in caplog.messages if "no orientation" in message] == expected

    report = succeed(tmp_path, "jaxla.verify", f"--data.root={root}")
    assert report.count("case_1.nii.gz: no orientation is recorded") == 1
    assert report.count("case_1_mask.nii.gz: no orientation is recorded") == 1

    (tmp_path / "masks").mkdir()
    predictions = [(root / f"case_{n}_mask.nii.gz").rename(tmp_path / "masks" / f"case_{n}.nii.gz") for n in range(3)]
    options = (f"--predictions={tmp_path / 'masks'}", f"--references={tmp_path / 'references'}", "--output=scores")
    (tmp_path / "references").mkdir()
    for path in predictions:
        (tmp_path / "references" / path.name).write_bytes(path.read_bytes())
    printed = succeed(tmp_path, "jaxla.evaluate", *options)
    assert printed.count("no orientation is recorded") == 2


def test_one_bad_file_does_not_end_the_report(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 5)
    edit_header(root / "case_1.nii.gz", dim=(3, 4000, 1400, 1400, 1, 1, 1, 1))
    edit_header(root / "case_2.nii.gz", vox_offset=-np.inf)
    edit_header(root / "case_3_mask.nii.gz", dim=(3, -16, 14, 4, 1, 1, 1, 1))
    done = run_in_this_process(tmp_path, "jaxla.verify", "--data.root=data")
    assert done.returncode == 2
    for name in ("case_1.nii.gz", "case_2.nii.gz", "case_3_mask.nii.gz"):
        assert f"  {name}: truncated or damaged (its header " in done.stdout
    assert "3 errors in the scans, so training cannot start. First error: " in done.stderr
