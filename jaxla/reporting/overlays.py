"""Outlines of prediction (yellow) and reference (blue, dashed) over the scan, at its own resolution and aspect ratio.

Yellow and blue are safe for colour-blind readers. In greyscale, one line is bright with a dark edge, and the other is
dark and dashed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from jaxla.data.inputs import intensity_range

PREDICTION, REFERENCE = "#FFC20A", "#0C6BFF"
REFERENCE_DASHES = (0, (2.5, 2))  # on and off, in line widths
SLICES_PER_CASE = 4  # a slice of 640×640 pixels adds about 0.5 MB to a page


class Panel(NamedTuple):
    """One case to show. Arrays are [S, H, W]; spacing is in mm along these axes."""

    title: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float, float]


def draw_overlays(panels: Sequence[Panel], path: Path) -> None:
    """Draw a row for each case, with slices spread evenly over those that the reference covers."""
    height, width = panels[0].image.shape[1:]
    columns = SLICES_PER_CASE
    figure = Figure(figsize=(3 * columns, 3 * len(panels) * height / width + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        limits = intensity_range(panel.image)
        for axes, index in zip(row, _choose_slices(panel.reference, columns), strict=True):
            draw_slice(axes, panel, index, limits)
            label = f"slice {index + 1}/{len(panel.image)}"
            axes.text(0.02, 0.02, label, transform=axes.transAxes, color="w", fontsize="small")
        row[0].set_title(panel.title, loc="left", fontsize="medium")
    outline_legend(figure)
    figure.savefig(path, dpi=110)


def slice_figures(panel: Panel, max_slices: int) -> Iterator[tuple[int, Figure]]:
    """Yield index and figure of different slices, spread evenly over those that the reference covers.

    A figure shows a slice and its outlines without text, in its aspect ratio in mm. Saved as SVG, it holds the slice's
    own H×W pixels, not resampled, and the outlines as lines.
    """
    limits = intensity_range(panel.image)
    (height, width), (_, row_mm, column_mm) = panel.image.shape[1:], panel.spacing
    for index in dict.fromkeys(_choose_slices(panel.reference, max_slices)):
        inches = max(4, width / 96)  # at 96 pixels per inch, so that outlines of 1.6 pt are 2.1 pixels wide
        figure = Figure(figsize=(inches, inches * height * row_mm / (width * column_mm)))
        draw_slice(figure.add_axes((0, 0, 1, 1)), panel, index, limits, interpolation="none")
        yield index, figure


def draw_slice(
    axes: Axes,
    panel: Panel,
    index: int,
    limits: tuple[float, float],
    interpolation: str | None = None,
) -> None:
    """Draw a slice and the outlines of both masks in its aspect ratio in mm; `limits` are drawn black and white."""
    _, row_mm, column_mm = panel.spacing
    low, high = limits
    axes.imshow(
        panel.image[index], cmap="gray", vmin=low, vmax=high, aspect=row_mm / column_mm, interpolation=interpolation
    )
    # The dashed line is drawn last, so that both are visible where they coincide.
    outlines = ((panel.prediction, PREDICTION, "-"), (panel.reference, REFERENCE, REFERENCE_DASHES))
    for masks, colour, dashes in outlines:
        classes = masks[index]
        for value in np.unique(classes[classes > 0]):
            lines = axes.contour(classes == value, levels=[0.5], colors=colour, linewidths=1.6, linestyles=[dashes])
            if colour == PREDICTION:
                lines.set_path_effects([withStroke(linewidth=2.4, foreground="black", alpha=0.7)])
    axes.set_axis_off()


def outline_legend(figure: Figure) -> None:
    """Add a legend of the outlines below a figure."""
    handles = [
        Line2D([], [], color=PREDICTION, label="prediction"),
        Line2D([], [], color=REFERENCE, ls=REFERENCE_DASHES, label="reference"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


def _choose_slices(reference: np.ndarray, count: int) -> list[int]:
    """Return slice indices spread evenly over the slices that the reference covers, or over all if it is empty."""
    present = np.flatnonzero(reference.any(axis=(1, 2)))
    if len(present) == 0:
        present = np.arange(len(reference))
    return [int(i) for i in np.quantile(present, (np.arange(count) + 1) / (count + 1), method="nearest")]
