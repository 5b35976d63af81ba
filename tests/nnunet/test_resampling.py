"""Resampling against nnU-Net's own, to the bit; and the places between samples by hand."""

from pathlib import Path

import numpy as np
import pytest

from jaxla.nnunet.resampling import linear_places, nearest_places, resample_image, resample_mask, separate_axis

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "nnunet_resampling.npz")


@pytest.mark.parametrize("number", range(6))
def test_images_and_masks_are_nnunets_to_the_bit(number):
    """Isotropic scans, and some that are coarse along one axis, before or after or both."""
    image, mask, before, after, expected, expected_mask = (
        GOLDEN[f"{name}{number}"] for name in ("image", "mask", "from", "to", "out_image", "out_mask")
    )
    separate = separate_axis(before, after)
    resampled = resample_image(image, expected.shape, separate)
    assert resampled.dtype == np.float32
    np.testing.assert_array_equal(resampled, expected)
    np.testing.assert_array_equal(resample_mask(mask, expected.shape, separate), expected_mask)


def test_the_cases_have_an_axis_of_its_own_or_none():
    """So that the test above sees both ways."""
    assert [separate_axis(GOLDEN[f"from{n}"], GOLDEN[f"to{n}"]) for n in range(6)] == [None, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("spacing", "other", "axis"),
    [
        ((3, 1, 1), (1, 1, 1), None),  # three times is not more than three times
        ((3.1, 1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 4), 2),
        ((4, 4, 1), (1, 1, 1), None),  # two long axes: neither by itself
        ((4, 1, 1), (1, 1, 5), 0),  # the scan's own comes first
    ],
)
def test_one_axis_alone_is_resampled_by_itself(spacing, other, axis):
    assert separate_axis(spacing, other) == axis


def test_places_between_samples():
    np.testing.assert_array_equal(nearest_places(4, 2), [1, 3])  # 0.5 and 2.5 lie between two: the later one
    np.testing.assert_array_equal(nearest_places(2, 5), [0, 0, 1, 1, 1])
    first, second, share = linear_places(2, 4)
    np.testing.assert_array_equal([first, second], [[0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(share, [0, 0.25, 0.75, 1])
    assert [x.tolist() for x in linear_places(1, 2)] == [[0, 0], [0, 0], [0, 0]]
