"""Slices: the axis along which a scan is sliced, their orientation, and the conversion back."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from jaxla.data.slices import canonical_to_slices, from_slices, slice_geometry, slices_to_canonical, to_slices
from tests.data.nifti import oblique_affine

ORIENTATIONS = [
    [[axis, sign] for axis, sign in zip(order, signs, strict=True)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("affine", [np.diag([0.7, 0.8, 2.5, 1]), oblique_affine()], ids=["straight", "oblique"])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_slices_do_not_depend_on_the_stored_orientation(orientation, affine):
    scan = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    expected = to_slices(scan, slice_geometry(affine))
    stored = nib.Nifti1Image(scan.astype(np.int32), affine).as_reoriented(np.array(orientation))
    geometry = slice_geometry(stored.affine)
    array = np.asarray(stored.dataobj)
    slices = to_slices(array, geometry)
    np.testing.assert_array_equal(slices, expected)
    assert slices.shape == (5, 4, 3)
    assert geometry.spacing == pytest.approx((2.5, 0.8, 0.7), rel=1e-12)
    assert np.shares_memory(slices, array)

    back = from_slices(slices, geometry)
    np.testing.assert_array_equal(back, array)
    assert np.shares_memory(back, array)
    with_classes = np.stack([slices, slices + 100], axis=-1)
    np.testing.assert_array_equal(from_slices(with_classes, geometry), np.stack([array, array + 100], axis=-1))


def test_all_48_orientations_are_tested():
    assert len({str(orientation) for orientation in ORIENTATIONS}) == 48


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((2.5, 0.7, 0.7), "left-right"),
        ((0.7, 2.5, 0.7), "anterior-posterior"),
        ((0.7, 0.7, 2.5), "head-foot"),
        ((1, 1, 1), "head-foot"),
        ((1, 2.5, 2.5), "head-foot"),
        ((2.5, 1, 2.5), "head-foot"),
        ((1.0005, 1, 1), "head-foot"),  # differs only by rounding in the header
        ((1.002, 1, 1), "left-right"),
    ],
)
@pytest.mark.parametrize("is_oblique", [False, True], ids=["straight", "oblique"])
def test_scans_are_sliced_along_the_axis_with_the_coarsest_spacing_or_else_head_foot(spacing, axis, is_oblique):
    affine = oblique_affine(spacing) if is_oblique else np.diag([*spacing, 1.0])
    geometry = slice_geometry(affine)
    assert geometry.axis == axis
    along = {"left-right": 0, "anterior-posterior": 1, "head-foot": 2}[axis]
    assert geometry.spacing[0] == pytest.approx(spacing[along], rel=1e-12)


def test_an_oblique_axis_is_named_after_the_closest_direction():
    """Slices 30 degrees off the axial plane are head-foot slices; those 60 degrees off are anterior-posterior."""
    for degrees, axis in ((30, "head-foot"), (60, "anterior-posterior")):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        assert slice_geometry(nib.affines.from_matvec(tilt @ np.diag([1, 1, 3]), (0, 0, 0))).axis == axis


@pytest.mark.parametrize(
    ("spacing", "shape", "first", "last"),
    [  # slice, row, column of the right anterior superior corner, and of the left posterior inferior corner
        ((1, 1, 2), (3, 4, 5), (0, 0, 0), (4, 3, 2)),  # axial: rows to posterior, columns to the patient's left
        ((1, 2, 1), (3, 4, 5), (0, 0, 0), (3, 4, 2)),  # coronal: rows to the feet, columns to the patient's left
        ((2, 1, 1), (3, 4, 5), (0, 0, 0), (2, 4, 3)),  # sagittal: rows to the feet, columns to posterior
    ],
)
def test_slices_follow_the_radiological_convention(spacing, shape, first, last):
    affine = np.diag([*spacing, 1.0])  # RAS+: the last voxel of each axis lies right, anterior, superior
    scan = np.zeros(shape, int)
    scan[-1, -1, -1] = 1
    scan[0, 0, 0] = 2
    slices = to_slices(scan, slice_geometry(affine))
    assert tuple(np.argwhere(slices == 1)[0]) == first
    assert tuple(np.argwhere(slices == 2)[0]) == last


@pytest.mark.parametrize("spacing", [(3, 1, 1), (1, 3, 1), (1, 1, 3)])
def test_canonical_axes_do_not_depend_on_the_slice_axis(spacing):
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    # LPI, the order of slices, so that no axis is flipped
    geometry = slice_geometry(np.diag([-spacing[0], -spacing[1], -spacing[2], 1.0]))
    slices = to_slices(array, geometry)
    canonical = slices_to_canonical(slices, geometry.axis)
    np.testing.assert_array_equal(canonical, array)
    np.testing.assert_array_equal(canonical_to_slices(canonical, geometry.axis), slices)
