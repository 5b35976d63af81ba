"""Statistics, compared with published examples, hand-computed values and brute force."""

from itertools import product

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.evaluation.statistics import compare, correct_holm, mean_interval, rank_biserial

# Wilcoxon 1945, heights of cross- and self-fertilised corn in eighths of an inch: T = 24, exact p = 0.0413
CORN = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]


def values(numbers):
    return {f"case_{i}": float(number) for i, number in enumerate(numbers)}


def brute_force_p(differences):
    """Return the fraction of sign patterns whose smaller rank sum is at most the observed one; no ties, no zeros."""
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    total = ranks.sum()

    def smaller_rank_sum(signs):
        above = ranks[np.array(signs) > 0].sum()
        return min(above, total - above)

    observed = smaller_rank_sum(np.sign(differences))
    return np.mean([smaller_rank_sum(signs) <= observed for signs in product((-1, 1), repeat=len(ranks))])


def test_the_example_of_wilcoxon_1945():
    (found,) = compare({"cross": values(CORN), "self": values(np.zeros(15))})
    assert found.p == pytest.approx(0.041259765625, rel=1e-12)
    assert found.p_holm == found.p
    assert (found.first, found.second, found.n) == ("cross", "self", 15)
    assert found.difference == pytest.approx(np.mean(CORN))
    assert found.effect == pytest.approx((96 - 24) / 120)  # the rank sums of positive and negative differences
    assert found.interval[0] < found.difference < found.interval[1]


def test_p_value_of_few_cases_equals_brute_force():
    rng = np.random.default_rng(0)
    for n in (3, 6, 9):
        differences = rng.normal(0.5, 1, n)
        (found,) = compare({"a": values(differences), "b": values(np.zeros(n))})
        assert found.p == pytest.approx(brute_force_p(differences), rel=1e-9)
        assert found.least_p == pytest.approx(brute_force_p(np.arange(1, n + 1)), rel=1e-12)


def test_the_order_of_cases_and_methods_does_not_matter():
    a, b = values([0.8, 0.7, 0.9, 0.6]), values([0.7, 0.75, 0.6, 0.5])
    (forth,), (back,) = compare({"a": a, "b": b}), compare({"b": dict(reversed(b.items())), "a": a})
    assert forth.p == back.p
    assert forth.difference == -back.difference
    assert forth.effect == -back.effect
    assert forth.interval == pytest.approx(tuple(-end for end in reversed(back.interval)), abs=0.02)


def test_differences_that_vary_only_by_rounding_share_a_rank():
    # 0.3 − 0.2 and 0.2 − 0.1 differ in the last bit
    (found,) = compare({"a": values([0.3, 0.2, 0.1]), "b": values([0.2, 0.1, 0.3])})
    assert found.effect == pytest.approx((1.5 + 1.5 - 3) / 6)


def test_methods_that_never_differ_have_p_1():
    (found,) = compare({"a": values([0.8, 0.9]), "b": values([0.8, 0.9])})
    assert (found.p, found.p_holm, found.difference, found.effect, found.interval) == (1, 1, 0, 0, (0, 0))


def test_a_single_case_has_no_interval_and_p_1():
    (found,) = compare({"a": values([0.9]), "b": values([0.5])})
    assert (found.interval, found.p, found.least_p) == (None, 1, 1)


def test_every_pair_is_compared_and_p_is_corrected():
    rng = np.random.default_rng(1)
    methods = {name: values(rng.normal(mean, 1, 20)) for name, mean in {"a": 0, "b": 0.5, "c": 2}.items()}
    found = compare(methods)
    assert [(pair.first, pair.second) for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.p_holm for pair in found] == pytest.approx(correct_holm([pair.p for pair in found]))


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        # the procedure of Holm 1979: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 1 · 0.04, which must not be below 2 · 0.03
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.6], [1, 1]),
        ([0.02], [0.02]),
        ([0.04, 0.04], [0.08, 0.08]),
        ([], []),
    ],
)
def test_holm_correction_matches_hand_computed_values(p, corrected):
    assert correct_holm(p) == pytest.approx(corrected)


def test_the_interval_covers_the_mean_in_about_95_percent_of_samples():
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(200):
        low, high = mean_interval(rng.normal(0.8, 0.1, 25))
        covered.append(low <= 0.8 <= high)
    assert 0.88 <= np.mean(covered) <= 0.985  # nominally 0.95, less for few cases; 200 samples vary by 0.02


def test_the_same_values_give_the_same_interval():
    numbers = np.random.default_rng(3).random(12)
    assert mean_interval(numbers) == mean_interval(numbers)


@pytest.mark.parametrize(("differences", "effect"), [([1, 2, 3], 1), ([-1, -2], -1), ([1, -1], 0), ([0, 0, 2], 1)])
def test_effect_sizes_match_hand_computed_values(differences, effect):
    assert rank_biserial(np.array(differences, float)) == effect


@pytest.mark.parametrize("swapped", [False, True])
def test_methods_with_different_cases_are_not_compared(swapped):
    methods = {"unet": values([0.8, 0.9]), "segnet": values([0.8])}
    methods = dict(reversed(methods.items())) if swapped else methods
    with pytest.raises(InputError, match=r"\(case_1 is a test case of unet, but not of segnet\)"):
        compare(methods)
