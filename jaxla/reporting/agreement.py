"""Do predicted volumes agree with the reference's: points against the identity, bias and limits of agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

FEWEST_FOR_LIMITS = 10  # below, the limits are less certain than they are wide


class Agreement(NamedTuple):
    """Of one class: prediction minus reference in ml, over n cases; `limits` are bias ± 1.96 sd, None for few cases.

    `reference` and `predicted` are the volumes, [n].
    """

    name: str
    reference: np.ndarray
    predicted: np.ndarray
    n: int
    bias: float
    limits: tuple[float, float] | None


def volume_agreement(rows: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """Bland and Altman's bias and 95 % limits of agreement of each class.

    Args:
        rows: one per case and class, with `class`, `volume_ml` and `reference_volume_ml`.
    """
    found = []
    for name, (reference, predicted) in _volumes(rows).items():
        difference = predicted - reference
        bias, n = float(difference.mean()), len(difference)
        limits = None
        if n >= FEWEST_FOR_LIMITS:
            half = 1.96 * float(difference.std(ddof=1))
            limits = (bias - half, bias + half)
        found.append(Agreement(name, reference, predicted, n, bias, limits))
    return found


def draw_volumes(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A point per case and class, predicted over reference volume in ml, and the line on which they would agree."""
    volumes = _volumes(rows)
    values = np.concatenate([both for pair in volumes.values() for both in pair])
    low, high = values.min(), values.max()
    margin = 0.08 * (high - low) or 0.1 * high or 1.0
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color="grey", lw=0.8, ls=":", label="identity")
    for name, (reference, predicted) in volumes.items():
        axes.plot(reference, predicted, "o", ms=5, alpha=0.8, label=name)
    axes.set(xlabel="reference volume, ml", ylabel="predicted volume, ml", xlim=ends, ylim=ends, aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _volumes(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Class -> [2, cases]: reference and predicted volumes in ml."""
    return {
        name: np.array([(r["reference_volume_ml"], r["volume_ml"]) for r in rows if r["class"] == name], float).T
        for name in dict.fromkeys(row["class"] for row in rows)
    }
