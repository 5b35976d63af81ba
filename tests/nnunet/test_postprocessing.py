"""Small components are removed only if that improves validation, as in nnU-Net's `determine_postprocessing`."""

import json

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.nnunet.postprocessing import choose_groups, choose_largest, keep_largest, read_groups, read_trials, try_rules

TWO_CLASSES = {"none": [0.6, 0.8], "all": [0.7, 0.8], "each": [0.7, 0.7], "all, each": [0.7, 0.9]}


@pytest.mark.parametrize(
    ("trials", "count", "groups"),
    [
        ({"none": [0.6], "all": [0.7], "each": [0.7], "all, each": [0.7]}, 1, [[1]]),
        ({"none": [0.7], "all": [0.7], "each": [0.7], "all, each": [0.7]}, 1, []),  # not better
        ({"none": [0.7], "all": [0.6], "each": [0.6], "all, each": [0.6]}, 1, []),
        (TWO_CLASSES, 2, [[1, 2], [2]]),
        (TWO_CLASSES | {"all": [0.8, 0.7]}, 2, [[1]]),  # a better mean, but one structure is worse
        (TWO_CLASSES | {"all, each": [0.6, 0.7]}, 2, [[1, 2]]),
    ],
)
def test_components_are_removed_only_if_that_improves_the_validation_dice(trials, count, groups):
    worse = {rule: [value - 0.1 for value in values] for rule, values in trials.items()}
    better = {rule: [value + 0.1 for value in values] for rule, values in trials.items()}
    assert choose_groups({"a": worse, "b": better}, count) == groups


def test_cases_without_a_structure_are_excluded_from_its_mean():
    """A structure that no case has is neither better nor worse."""
    with_second, without = {"none": [0.6, 0.8], "all": [0.7, 0.9], "each": [0, 0], "all, each": [0.7, 0.9]}, {}
    for rule, (first, _) in with_second.items():
        without[rule] = [first, None]
    assert choose_groups({"a": with_second, "b": without}, 2) == [[1, 2]]
    assert choose_groups({"a": without}, 2) == []  # nnU-Net compares the mean of all structures, which is NaN
    without["each"] = [0.9, None]
    assert choose_groups({"a": without}, 2) == [[1]]


def test_dice_of_each_rule_is_computed_from_the_components_that_it_keeps():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 3, (5, 9, 8)).astype(np.uint8)
    predicted = np.where(rng.random(reference.shape) < 0.3, reference, 0).astype(np.uint8)
    found = try_rules(predicted, reference, 2)
    rules = {"none": [], "all": [(1, 2)], "each": [(1,), (2,)], "all, each": [(1, 2), (1,), (2,)]}
    for rule, groups in rules.items():
        kept = keep_largest(predicted, groups)
        for k in (1, 2):
            both = np.count_nonzero((kept == k) & (reference == k))
            dice = 2 * both / (np.count_nonzero(kept == k) + np.count_nonzero(reference == k))
            assert found[rule][k - 1] == pytest.approx(dice)
    assert try_rules(np.zeros_like(predicted), np.zeros_like(reference), 2)["none"] == [None, None]


def test_choice_is_written_once_and_read_afterwards(tmp_path):
    reference = np.zeros((2, 8, 8), np.uint8)
    reference[:, :4, :4] = 1
    predicted = reference.copy()
    predicted[0, 7, 7] = 1  # a speck, without which Dice is 1
    path = tmp_path / "validation" / "largest.json"
    assert choose_largest([("a", predicted, reference)], ["LA"], path) == ((1,),)
    content = json.loads(path.read_text())
    assert (content["groups"], content["n"], content["dice"]["a"]["all"]) == ([[1]], 1, [1.0])
    assert read_trials(path) == content["dice"]

    def raise_if_read():
        raise AssertionError("the cases were segmented again")
        yield

    assert choose_largest(raise_if_read(), ["LA"], path) == ((1,),)
    path.write_text("{")
    with pytest.raises(InputError, match=r"largest\.json: damaged: .* Restore it from a backup\."):
        read_groups(path)
    assert read_groups(tmp_path / "missing.json") == ()
