"""Is one method better than another, or was it luck: paired tests, intervals and effect sizes over test cases.

A value is that of one method on one test case, averaged over seeds before, so that a case counts once however many
seeds were run. All methods are compared on the same cases.
"""

from __future__ import annotations

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
    "p": "two-sided Wilcoxon signed-rank test of the paired differences of cases; cases without one are left out; "
    "exact for up to 50 cases; where some differences are alike or nothing, by permutations for up to 13 cases and by "
    "the normal approximation for more (SciPy's choice)",
    "p (Holm)": "p after Holm's correction for all pairs of methods of one protocol, metric and class (or their mean)",
    "interval": f"95 % bootstrap interval of the mean over cases ({RESAMPLES} resamples, percentiles)",
    "effect": "matched-pairs rank-biserial correlation, from −1 (the first is always lower) to 1 (always higher)",
}


@dataclass(frozen=True)
class Comparison:
    """Of two methods on the same cases.

    Attributes:
        first, second: the methods.
        n: number of cases.
        difference: mean over cases of first − second.
        interval: of that mean; None for a single case.
        p: of the signed-rank test; 1 where the methods never differ.
        p_holm: the same, corrected for all comparisons made with it.
        least_p: that so few cases could give at best: where it exceeds 0.05, no difference could show.
        effect: rank-biserial correlation.
    """

    first: str
    second: str
    n: int
    difference: float
    interval: tuple[float, float] | None
    p: float
    p_holm: float
    least_p: float
    effect: float


def compare(methods: Mapping[str, Values]) -> list[Comparison]:
    """Every pair of methods, p corrected for their number.

    Args:
        methods: for each the value of every test case.

    Raises:
        InputError: the methods were not tested on the same cases.
    """
    require_same_cases(methods)
    found = [_compare(first, second, methods) for first, second in combinations(methods, 2)]
    corrected = holm([comparison.p for comparison in found])
    return [replace(comparison, p_holm=p) for comparison, p in zip(found, corrected, strict=True)]


def require_same_cases(methods: Mapping[str, Values]) -> None:
    """Raise an InputError, which names a case, unless all methods have values of the same cases."""
    (first, values), *others = methods.items()
    for name, of_other in others:
        if lone := sorted(set(values) ^ set(of_other)):
            having, lacking = (first, name) if lone[0] in values else (name, first)
            raise InputError(
                f"{first} and {name} were not tested on the same cases ({having} has {lone[0]}, {lacking} has not); "
                "compare runs of one data set and one split"
            )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): each p times the number of hypotheses not yet rejected, never decreasing."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled)) if len(p) else []
    return corrected.tolist()


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bootstrap interval of the mean; the same values give the same interval. None for a single one."""
    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (np.asarray(values, float),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(0), batch=1000,
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def rank_biserial(differences: np.ndarray) -> float:
    """(W₊ − W₋) / (W₊ + W₋) over the ranks of the differences that are not zero (Kerby 2014); 0 where all are."""
    differences = differences[differences != 0]
    if not len(differences):
        return 0.0
    ranks = stats.rankdata(np.abs(differences))
    return float(np.sum(np.sign(differences) * ranks) / ranks.sum())


def least_p(cases: int) -> float:
    """The smallest p that the signed-rank test of so many cases can give."""
    return min(1.0, 2.0 ** (1 - cases))


def _compare(first: str, second: str, methods: Mapping[str, Values]) -> Comparison:
    cases = sorted(methods[first])
    # rounded, so that equal differences get equal ranks whatever the last bit says
    differences = np.round([methods[first][case] - methods[second][case] for case in cases], 12)
    p = stats.wilcoxon(differences).pvalue if differences.any() else 1.0
    return Comparison(
        first=first,
        second=second,
        n=len(cases),
        difference=float(differences.mean()),
        interval=mean_interval(differences),
        p=float(p),
        p_holm=float(p),
        least_p=least_p(len(cases)),
        effect=rank_biserial(differences),
    )
