"""Agreement of predicted and reference volumes: Bland and Altman's bias and limits, and a scatter plot."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

MIN_CASES_FOR_LIMITS = 10  # with fewer cases, the limits are too uncertain


class Agreement(NamedTuple):
    """Agreement of one class: prediction minus reference in ml, over n cases."""

    name: str
    predicted: np.ndarray  # volumes in ml [n]
    reference: np.ndarray
    n: int
    bias: float  # mean difference
    limits: tuple[float, float] | None  # bias ± 1.96 sd, the 95 % limits of agreement; None for few cases


def measure_agreement(name: str, predicted: np.ndarray, reference: np.ndarray) -> Agreement:
    """Return Bland and Altman's bias and limits of agreement for volumes in ml [n]."""
    difference = predicted - reference
    bias = float(difference.mean())
    limits = None
    if len(difference) >= MIN_CASES_FOR_LIMITS:
        half = 1.96 * float(difference.std(ddof=1))
        limits = (bias - half, bias + half)
    return Agreement(name, predicted, reference, len(difference), bias, limits)


def agreement_by_class(rows: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """Return the agreement of each class, from rows with `class`, `volume_ml` and `reference_volume_ml`."""
    agreements = []
    for name in dict.fromkeys(row["class"] for row in rows):
        volumes = [(row["volume_ml"], row["reference_volume_ml"]) for row in rows if row["class"] == name]
        agreements.append(measure_agreement(name, *np.array(volumes, float).T))
    return agreements


def draw_volumes(axes: Axes, agreements: Sequence[Agreement]) -> None:
    """Plot predicted over reference volume in ml: a point per case and class, and the line of identity."""
    values = np.concatenate([volumes for each in agreements for volumes in (each.predicted, each.reference)])
    low, high = values.min(), values.max()
    margin = 0.08 * (high - low) or 0.1 * high or 1.0
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color="grey", lw=0.8, ls=":", label="identity")
    for each in agreements:
        axes.plot(each.reference, each.predicted, "o", ms=5, alpha=0.8, label=each.name)
    axes.set(xlabel="reference volume, ml", ylabel="predicted volume, ml", xlim=ends, ylim=ends, aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
