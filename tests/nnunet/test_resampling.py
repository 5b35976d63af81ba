"""Resampling is bit-identical to nnU-Net's; sample positions equal those computed by hand."""

from pathlib import Path

import numpy as np
import pytest

from jaxla.nnunet.resampling import find_coarse_axis, linear_indices, nearest_indices, resample_image, resample_mask

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nnunet_resampling.npz")


@pytest.mark.parametrize("number", range(6))
def test_images_and_masks_equal_nnunet_bit_for_bit(number):
    """Isotropic scans, and scans with a coarse axis before resampling, after it, or both."""
    image, mask, before, after, expected, expected_mask = (
        GOLDEN[f"{name}{number}"] for name in ("image", "mask", "from", "to", "out_image", "out_mask")
    )
    coarse_axis = find_coarse_axis(before, after)
    resampled = resample_image(image, expected.shape, coarse_axis)
    assert resampled.dtype == np.float32
    np.testing.assert_array_equal(resampled, expected)
    np.testing.assert_array_equal(resample_mask(mask, expected.shape, coarse_axis), expected_mask)


def test_golden_cases_cover_scans_with_and_without_a_coarse_axis():
    assert [find_coarse_axis(GOLDEN[f"from{n}"], GOLDEN[f"to{n}"]) for n in range(6)] == [None, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("spacing", "new_spacing", "axis"),
    [
        ((3, 1, 1), (1, 1, 1), None),  # exactly the threshold
        ((3.1, 1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 4), 2),
        ((4, 4, 1), (1, 1, 1), None),  # two coarse axes count as none
        ((4, 1, 1), (1, 1, 5), 0),  # the axis before resampling comes first
    ],
)
def test_coarse_axis_is_found(spacing, new_spacing, axis):
    assert find_coarse_axis(spacing, new_spacing) == axis


def test_nearest_and_linear_indices_match_hand_computed_values():
    np.testing.assert_array_equal(nearest_indices(4, 2), [1, 3])  # 0.5 and 2.5 are rounded up
    np.testing.assert_array_equal(nearest_indices(2, 5), [0, 0, 1, 1, 1])
    first, second, weight = linear_indices(2, 4)
    np.testing.assert_array_equal([first, second], [[0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(weight, [0, 0.25, 0.75, 1])
    assert [x.tolist() for x in linear_indices(1, 2)] == [[0, 0], [0, 0], [0, 0]]
