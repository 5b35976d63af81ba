"""Opening and closing, on slices drawn by hand and against SciPy; keeping the largest connected component."""

import numpy as np
import pytest
from scipy import ndimage

from jaxla.config import Postprocessing
from jaxla.inference.postprocessing import postprocess
from jaxla.nnunet.postprocessing import keep_largest

pytestmark = pytest.mark.quick

BOTH = Postprocessing(opening=3, closing=3)


def draw(*rows):
    return np.array([[int(letter) for letter in row.replace(".", "0")] for row in rows], np.uint8)[None]


BLOCK = draw(
    "..........",
    ".11111...1",
    ".11111....",
    ".11111....",
    ".11111.1..",
    ".11111....",
    "..........",
)


def test_opening_removes_specks():
    expected = BLOCK.copy()
    expected[0, 1, 9] = expected[0, 4, 7] = 0
    np.testing.assert_array_equal(postprocess(BLOCK, Postprocessing(opening=3)), expected)


def test_closing_fills_holes_and_gaps():
    hollow = BLOCK.copy()
    hollow[0, 3, 3] = 0
    expected = BLOCK.copy()
    expected[0, 4, 6] = 1  # between the block and the speck
    np.testing.assert_array_equal(postprocess(hollow, Postprocessing(closing=3)), expected)


def test_opening_comes_first():
    hollow = BLOCK.copy()
    hollow[0, 3, 3] = 0  # no 3 × 3 square fits next to the hole
    assert not postprocess(hollow, BOTH).any()


def test_a_structure_at_the_border_is_kept():
    before = draw("111...", "111...", "111...", "......")
    np.testing.assert_array_equal(postprocess(before, BOTH), before)
    thin = draw("11....", "11....", "11....", "11....")  # it may continue outside the slice
    np.testing.assert_array_equal(postprocess(thin, BOTH), thin)


def test_classes_do_not_grow_into_each_other():
    rng = np.random.default_rng(0)
    noise = np.stack([ndimage.gaussian_filter(rng.standard_normal((40, 50)), 2) for _ in range(3)])
    before = noise.argmax(0).astype(np.uint8)[None]
    after = postprocess(before, BOTH)
    for k in (1, 2):
        opened = ndimage.binary_opening(np.pad(before == k, ((0, 0), (2, 2), (2, 2)), mode="edge"), np.ones((1, 3, 3)))
        inner = opened[:, 4:-4, 4:-4]
        assert inner.sum() > 50
        assert (after[:, 2:-2, 2:-2][inner] == k).all()


@pytest.mark.parametrize(("opening", "closing"), [(3, 0), (0, 3), (3, 3), (5, 3)])
def test_results_away_from_the_border_equal_scipy(opening, closing):
    rng = np.random.default_rng(1)
    mask = np.zeros((2, 60, 60), bool)
    mask[:, 10:50, 10:50] = ndimage.gaussian_filter(rng.standard_normal((2, 40, 40)), (0, 1.2, 1.2)) > -0.1
    expected = mask
    if opening:
        expected = ndimage.binary_opening(expected, np.ones((1, opening, opening)))
    if closing:
        expected = ndimage.binary_closing(expected, np.ones((1, closing, closing)))
    after = postprocess(mask.astype(np.uint8), Postprocessing(opening, closing))
    np.testing.assert_array_equal(after, expected)
    assert 0 < expected.sum() < expected.size
    assert (expected != mask).any()


def test_slices_are_independent_and_zero_changes_nothing():
    mask = np.zeros((3, 8, 8), np.uint8)
    mask[1, 2:6, 2:6] = 2
    np.testing.assert_array_equal(postprocess(mask, BOTH), mask)
    speck = mask.copy()
    speck[0, 4, 4] = 1
    np.testing.assert_array_equal(postprocess(speck, Postprocessing()), speck)
    np.testing.assert_array_equal(postprocess(speck, BOTH), mask)


def test_only_the_largest_component_of_a_group_is_kept():
    """Voxels are connected by their corners. The classes of a group count as one structure and keep their values."""
    classes = np.zeros((4, 8, 8), np.uint8)
    classes[0, :2, :2] = 1
    classes[1, 2, 2] = 2  # shares a corner with a voxel of class 1
    classes[3, 6, 6], classes[3, 6, 7] = 2, 1  # a separate component
    grouped = keep_largest(classes, [(1, 2)])
    expected = classes.copy()
    expected[3] = 0
    np.testing.assert_array_equal(grouped, expected)
    separate = keep_largest(classes, [(1,), (2,)])
    assert separate[3, 6, 7] == 0
    assert np.count_nonzero(separate == 1) == 4
    assert np.count_nonzero(separate == 2) == 2  # two components of the same size
    np.testing.assert_array_equal(keep_largest(classes, []), classes)
    np.testing.assert_array_equal(keep_largest(np.zeros_like(classes), [(1, 2)]), 0)
    assert classes[3, 6, 6] == 2  # the argument is not changed
