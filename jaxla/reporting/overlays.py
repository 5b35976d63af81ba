"""Predictions over their scans: prediction green, reference red, at the scan's own resolution and aspect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PREDICTION, REFERENCE = "#2fd12f", "#ff4040"
SLICES_PER_CASE = 4  # of 640×640 pixels: about 0.5 MB each in a page


class Panel(NamedTuple):
    """One case to show; arrays are [S, H, W], spacing in mm along these axes."""

    title: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float, float]


def draw_overlays(panels: Sequence[Panel], path: Path) -> None:
    """One row a case: slices spread evenly over those that the reference covers."""
    height, width = panels[0].image.shape[1:]
    columns = SLICES_PER_CASE
    figure = Figure(figsize=(3 * columns, 3 * len(panels) * height / width + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for axes_of_row, panel in zip(grid, panels, strict=True):
        window = grey_window(panel)
        for axes, index in zip(axes_of_row, _slices_to_show(panel.reference, columns), strict=True):
            draw_slice(axes, panel, index, window)
            axes.text(
                0.02, 0.02, f"slice {index + 1}/{len(panel.image)}", transform=axes.transAxes, color="w",
                fontsize="small",
            )  # fmt: skip
        axes_of_row[0].set_title(panel.title, loc="left", fontsize="medium")
    handles = [Line2D([], [], color=PREDICTION, label="prediction"), Line2D([], [], color=REFERENCE, label="reference")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def slice_figures(panel: Panel, count: int) -> Iterator[tuple[int, Figure]]:
    """Each shown slice as a figure of its own: nothing but the slice and its outlines, in its aspect in mm.

    Saved as SVG, such a figure holds the slice's own H×W pixels, not resampled, and the outlines as lines.

    Args:
        panel: the case.
        count: at most so many slices, spread evenly over those that the reference covers; none comes twice.

    Yields:
        The slice's index, from 0, and its figure.
    """
    window = grey_window(panel)
    (height, width), (_, row_mm, column_mm) = panel.image.shape[1:], panel.spacing
    for index in dict.fromkeys(_slices_to_show(panel.reference, count)):
        inches = max(4, width / 96)  # as wide as 96 pixels to the inch make it; outlines of 1.2 pt are then 1.6 pixels
        figure = Figure(figsize=(inches, inches * height * row_mm / (width * column_mm)))
        draw_slice(figure.add_axes((0, 0, 1, 1)), panel, index, window, interpolation="none")
        yield index, figure


def grey_window(panel: Panel) -> tuple[float, float]:
    """The intensities shown as black and as white, the same for all slices of a case."""
    low, high = np.percentile(panel.image, (0.5, 99.5))
    return float(low), float(high)


def draw_slice(
    axes: Axes,
    panel: Panel,
    index: int,
    window: tuple[float, float],
    interpolation: str | None = None,
    reference_dashes: str = "-",
) -> None:
    """A slice in its aspect in mm, grey between the intensities of `window`, with the outlines of both masks."""
    _, row_mm, column_mm = panel.spacing
    low, high = window
    axes.imshow(
        panel.image[index], cmap="gray", vmin=low, vmax=high, aspect=row_mm / column_mm, interpolation=interpolation
    )
    outlines = ((panel.reference, REFERENCE, reference_dashes), (panel.prediction, PREDICTION, "-"))
    for masks, colour, dashes in outlines:
        classes = masks[index]
        for value in np.unique(classes[classes > 0]):
            axes.contour(classes == value, levels=[0.5], colors=colour, linewidths=1.2, linestyles=dashes)
    axes.set_axis_off()


def _slices_to_show(reference: np.ndarray, count: int) -> list[int]:
    present = np.flatnonzero(reference.any(axis=(1, 2)))
    if len(present) == 0:
        present = np.arange(len(reference))
    return [int(i) for i in np.quantile(present, (np.arange(count) + 1) / (count + 1), method="nearest")]
