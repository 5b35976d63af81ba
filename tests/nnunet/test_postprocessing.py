"""Which largest parts are kept: what the validation cases say, as nnU-Net's `determine_postprocessing` has it."""

import numpy as np
import pytest

from jaxla.inference.postprocessing import keep_largest
from jaxla.nnunet.postprocessing import choose_groups, tries_of

TWO = {"none": [0.6, 0.8], "all": [0.7, 0.8], "each": [0.7, 0.7], "all, each": [0.7, 0.9]}


@pytest.mark.parametrize(
    ("tries", "count", "groups"),
    [
        ({"none": [0.6], "all": [0.7], "each": [0.7], "all, each": [0.7]}, 1, [[1]]),
        ({"none": [0.7], "all": [0.7], "each": [0.7], "all, each": [0.7]}, 1, []),  # no better
        ({"none": [0.7], "all": [0.6], "each": [0.6], "all, each": [0.6]}, 1, []),
        (TWO, 2, [[1, 2], [2]]),
        (TWO | {"all": [0.8, 0.7]}, 2, [[1]]),  # better in the mean, but one is worse
        (TWO | {"all, each": [0.6, 0.7]}, 2, [[1, 2]]),
    ],
)
def test_parts_are_taken_away_only_where_validation_says_that_it_helps(tries, count, groups):
    worse = {way: [value - 0.1 for value in values] for way, values in tries.items()}
    better = {way: [value + 0.1 for value in values] for way, values in tries.items()}
    assert choose_groups({"a": worse, "b": better}, count) == groups


def test_cases_without_a_structure_say_nothing_of_it():
    """nnU-Net's means leave them out; a structure that no case has is neither better nor worse."""
    with_second, without = {"none": [0.6, 0.8], "all": [0.7, 0.9], "each": [0, 0], "all, each": [0.7, 0.9]}, {}
    for way, (first, _) in with_second.items():
        without[way] = [first, None]
    assert choose_groups({"a": with_second, "b": without}, 2) == [[1, 2]]
    assert choose_groups({"a": without}, 2) == []  # nnU-Net compares the mean of all, which is none
    without["each"] = [0.9, None]
    assert choose_groups({"a": without}, 2) == [[1]]


def test_what_is_tried_is_what_is_kept():
    draw = np.random.default_rng(0)
    reference = draw.integers(0, 3, (5, 9, 8)).astype(np.uint8)
    predicted = np.where(draw.random(reference.shape) < 0.3, reference, 0).astype(np.uint8)
    found = tries_of(predicted, reference, 2)
    ways = {"none": [], "all": [(1, 2)], "each": [(1,), (2,)], "all, each": [(1, 2), (1,), (2,)]}
    for way, groups in ways.items():
        kept = keep_largest(predicted, groups)
        for k in (1, 2):
            both = np.count_nonzero((kept == k) & (reference == k))
            dice = 2 * both / (np.count_nonzero(kept == k) + np.count_nonzero(reference == k))
            assert found[way][k - 1] == pytest.approx(dice)
    assert tries_of(np.zeros_like(predicted), np.zeros_like(reference), 2)["none"] == [None, None]  # left out of means
