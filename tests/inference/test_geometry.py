"""Predictions have the position and volume of the structure in the patient, whatever the geometry of the file."""

import gzip
import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from jaxla.data.volumes import read_image, read_mask, require_same_grid, write_volume
from jaxla.inference.segment import segment_volume

CODES = ((1, 1), (1, 0), (0, 1), (1, 2), (0, 0))  # codes of qform and sform
MM_PER_UNIT = {"mm": 1, "unknown": 1, "meter": 1000, "micron": 0.001}
DTYPES = ("u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8")


def threshold(slices, geometry, with_probabilities):
    """Segment the voxels above 50, in place of a network."""
    return (slices > 50).astype(np.uint8), None


def random_affine(rng, shape, has_orientation):
    """Return an affine from voxel indices to mm, [4, 4]: axes in any order and direction, oblique half of the time."""
    spacing = np.exp(rng.uniform(np.log(0.2), np.log(12), 3))
    if not has_orientation:  # as nibabel reads such files: LAS, with the origin in the middle
        axes = np.diag([-spacing[0], *spacing[1:]])
        return nib.affines.from_matvec(axes, -axes @ ((shape - 1) / 2))
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    if rng.random() < 0.5:
        axes = Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix() @ axes
    return nib.affines.from_matvec(axes * spacing, rng.uniform(-200, 200, 3))


def random_content(rng, shape):
    """Return a random, asymmetric ellipsoid [X, Y, Z], and grey values that exceed 50 only inside it."""
    centre, radii = rng.uniform(0, shape), rng.uniform(1, 4, 3)
    inside = (((np.indices(shape).T - centre) / radii) ** 2).sum(-1).T < 1
    inside[0, 0, 0], inside[-1, -1, -1] = True, False
    return inside, np.where(inside, rng.integers(51, 100, shape), rng.integers(0, 50, shape))


def random_scan(seed, folder):
    """Write a scan with an ellipsoid in it; return its path, the affine in mm, and the ellipsoid's voxels."""
    rng = np.random.default_rng(seed)
    codes, unit, dtype = CODES[rng.integers(5)], list(MM_PER_UNIT)[rng.integers(4)], DTYPES[rng.integers(8)]
    shape = rng.integers(3, 9, 3)
    affine = random_affine(rng, shape, has_orientation=any(codes))
    inside, values = random_content(rng, shape)

    header_class, endianness = (nib.Nifti1Header, nib.Nifti2Header)[rng.integers(2)], "<>"[rng.integers(2)]
    header = header_class(endianness=endianness)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(endianness))
    header.set_data_shape(shape)
    stored = np.diag([*[1 / MM_PER_UNIT[unit]] * 3, 1]) @ affine
    header.set_qform(stored, codes[0])  # also sets pixdim
    header.set_sform(stored, codes[1])
    header.set_xyzt_units(unit, "sec")
    header["vox_offset"], header["scl_slope"] = header.single_vox_offset, 1
    content = header.binaryblock + bytes(4) + values.astype(header.get_data_dtype()).tobytes("F")
    is_compressed = rng.random() < 0.2
    path = folder / ("scan.nii.gz" if is_compressed else "scan.nii")
    path.write_bytes(gzip.compress(content, 1) if is_compressed else content)
    return path, affine, inside


@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_predictions_agree_with_their_scans_in_world_coordinates_and_volume(tmp_path, first):
    for seed in range(first, first + 250):
        path, affine, inside = random_scan(seed, tmp_path)
        volume = read_image(path)
        np.testing.assert_allclose(volume.affine, affine, rtol=0, atol=1e-4, err_msg=f"seed {seed}")
        classes, _ = segment_volume(threshold, volume)
        np.testing.assert_array_equal(classes, inside, err_msg=f"seed {seed}")

        write_volume(tmp_path / "mask.nii", classes, volume)
        mask = read_mask(tmp_path / "mask.nii")
        require_same_grid(mask, volume)
        np.testing.assert_array_equal(mask.affine, volume.affine)
        expected_ml = inside.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
        assert mask.array.sum() * math.prod(mask.spacing) / 1000 == pytest.approx(expected_ml, rel=1e-4)


def test_other_readers_give_the_prediction_the_position_of_the_scan(tmp_path):
    """SimpleITK also converts units to millimetres. It does not read NIfTI-2, and ignores positions without codes."""
    compared = 0
    for seed in range(60):
        path, affine, inside = random_scan(seed, tmp_path)
        volume, output = read_image(path), tmp_path / "mask.nii"
        write_volume(output, inside.astype(np.uint8), volume)
        scan, mask = nib.load(path), nib.load(output)
        np.testing.assert_array_equal(mask.affine, scan.affine)
        assert mask.header.get_xyzt_units() == scan.header.get_xyzt_units()
        if isinstance(scan, nib.Nifti2Image) or not (scan.header["qform_code"] or scan.header["sform_code"]):
            continue
        compared += 1
        last = [int(side) - 1 for side in inside.shape]
        for file in (path, output):
            position = np.array(sitk.ReadImage(str(file)).TransformIndexToPhysicalPoint(last)) * (-1, -1, 1)
            np.testing.assert_allclose(position, (affine @ [*last, 1])[:3], rtol=0, atol=1e-4)
    assert compared > 15
