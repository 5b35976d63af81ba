"""Comparison of methods over test cases: paired tests, confidence intervals and effect sizes.

A value belongs to one method and one test case. Average it over seeds first, so that each case counts once. All methods
must be tested on the same cases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import stats

from jaxla.config import InputError

Values = Mapping[str, float]  # by case id

RESAMPLES = 10_000
CONFIDENCE = 0.95
DEFINITIONS = {
    "p": "two-sided Wilcoxon signed-rank test of the paired differences of cases, without the differences of 0; exact "
    "for up to 50 cases; with ties or differences of 0, by permutations for up to 13 cases and by the normal "
    "approximation for more (SciPy's choice)",
    "p (Holm)": "p after Holm's correction for all pairs of methods of one protocol, metric and class (or their mean)",
    "interval": f"95 % bootstrap interval of the mean over cases ({RESAMPLES} resamples, percentiles)",
    "effect": "matched-pairs rank-biserial correlation, from −1 (the first is always lower) to 1 (always higher)",
}


@dataclass(frozen=True)
class Comparison:
    """Comparison of two methods on the same n cases."""

    first: str
    second: str
    n: int
    difference: float  # mean over cases of first − second
    interval: tuple[float, float] | None  # confidence interval of the difference; None for a single case
    p: float  # p of the signed-rank test; 1 if the methods never differ
    p_holm: float  # p, corrected for all comparisons made together
    least_p: float  # the smallest p possible with n cases; above 0.05, no difference can be significant
    effect: float  # rank-biserial correlation


def compare(methods: Mapping[str, Values]) -> list[Comparison]:
    """Compare every pair of methods, and correct p for the number of pairs.

    Args:
        methods: for each method, the value of every test case.

    Raises:
        InputError: the methods were not tested on the same cases.
    """
    require_same_cases(methods)
    pairs = [_compare(first, second, methods) for first, second in combinations(methods, 2)]
    corrected = correct_holm([pair.p for pair in pairs])
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]


def require_same_cases(methods: Mapping[str, Values]) -> None:
    """Raise an InputError unless all methods have values for the same cases."""
    (first, first_values), *others = methods.items()
    for name, values in others:
        if unmatched := sorted(set(first_values) ^ set(values)):
            tested, untested = (first, name) if unmatched[0] in first_values else (name, first)
            example = f"{unmatched[0]} is a test case of {tested}, but not of {untested}"
            problem = f"not tested on the same cases ({example})"
            raise InputError(f"{first} and {name}", problem, "Compare runs with the same data set and split.")


def correct_holm(p: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction (1979): each p times the number of hypotheses left, never decreasing."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected.tolist()


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the bootstrap interval of the mean, drawn with a fixed seed; None for a single value."""
    if len(values) < 2:
        return None
    result = stats.bootstrap(
        (np.asarray(values, float),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(0), batch=1000,
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def rank_biserial(differences: np.ndarray) -> float:
    """Return (W₊ − W₋) / (W₊ + W₋) over the ranks of the non-zero differences (Kerby 2014); 0 if there are none."""
    differences = differences[differences != 0]
    if not len(differences):
        return 0.0
    ranks = stats.rankdata(np.abs(differences))
    return float(np.sum(np.sign(differences) * ranks) / ranks.sum())


def least_p(cases: int) -> float:
    """Return the smallest p possible in a signed-rank test of that many cases."""
    return min(1.0, 2.0 ** (1 - cases))


def _compare(first: str, second: str, methods: Mapping[str, Values]) -> Comparison:
    cases = sorted(methods[first])
    # rounded, so that differences that vary only in the last bit get equal ranks
    differences = np.round([methods[first][case] - methods[second][case] for case in cases], 12)
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    n = len(cases)
    mean = float(differences.mean())
    interval = mean_interval(differences)
    effect = rank_biserial(differences)
    return Comparison(first, second, n, mean, interval, p, p_holm=p, least_p=least_p(n), effect=effect)
