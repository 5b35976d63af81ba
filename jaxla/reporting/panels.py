"""The test cases that a run's report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxla.data.prepared import PreparedVolume
from jaxla.data.volumes import read_mask, slice_geometry, to_slices
from jaxla.evaluation.summary import case_means, worst_median_best
from jaxla.reporting.overlays import Panel


def select_panels(
    volumes: Mapping[str, PreparedVolume], rows: Sequence[Mapping[str, Any]], predictions: Path
) -> list[Panel]:
    """Return the test cases with the lowest, the median and the highest Dice, and their predictions.

    Args:
        rows: of `test/cases.csv`.
        predictions: folder of the predicted masks.
    """
    dice, panels = case_means(rows, "dice"), []
    for case_id, rank in worst_median_best(dice).items():
        volume = volumes[case_id]
        mask = read_mask(predictions / f"{case_id}.nii.gz")
        prediction = to_slices(mask.array, slice_geometry(mask.affine))
        title = f"{rank} of {len(dice)}: {case_id}, Dice {dice[case_id]:.3f}"
        panels.append(Panel(title, volume.image, prediction, volume.mask, volume.spacing))
    return panels
