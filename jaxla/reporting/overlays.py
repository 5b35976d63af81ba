"""Predictions over their scans: prediction green, reference red, at the scan's own resolution and aspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PREDICTION, REFERENCE = "#2fd12f", "#ff4040"


class Panel(NamedTuple):
    """One case to show; arrays are [S, H, W], spacing in mm along these axes."""

    title: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float, float]


def draw_overlays(panels: Sequence[Panel], path: Path, columns: int = 3) -> None:
    """One row a case: the slice with the largest reference, and slices evenly before and after it."""
    height, width = panels[0].image.shape[1:]
    figure = Figure(figsize=(3 * columns, 3 * len(panels) * height / width + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for axes_of_row, panel in zip(grid, panels, strict=True):
        for axes, index in zip(axes_of_row, _slices_to_show(panel.reference, columns), strict=True):
            _draw_slice(axes, panel, index)
        axes_of_row[0].set_title(panel.title, loc="left", fontsize="medium")
    handles = [Line2D([], [], color=PREDICTION, label="prediction"), Line2D([], [], color=REFERENCE, label="reference")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def _draw_slice(axes: Axes, panel: Panel, index: int) -> None:
    low, high = np.percentile(panel.image, (0.5, 99.5))
    _, row_mm, column_mm = panel.spacing
    axes.imshow(panel.image[index], cmap="gray", vmin=low, vmax=high, aspect=row_mm / column_mm)
    for classes, colour in ((panel.reference[index], REFERENCE), (panel.prediction[index], PREDICTION)):
        for value in np.unique(classes[classes > 0]):
            axes.contour(classes == value, levels=[0.5], colors=colour, linewidths=1.2)
    axes.set_axis_off()
    axes.text(
        0.02, 0.02, f"slice {index + 1}/{len(panel.image)}", transform=axes.transAxes, color="w", fontsize="small"
    )


def _slices_to_show(reference: np.ndarray, count: int) -> list[int]:
    present = np.flatnonzero(reference.any(axis=(1, 2)))
    if len(present) == 0:
        present = np.arange(len(reference))
    return [int(i) for i in np.quantile(present, (np.arange(count) + 1) / (count + 1), method="nearest")]
