"""A run's charts: losses, validation Dice and IoU over epochs, and the weights of a fusion network's blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxla.cli.files import atomic_file

MAX_BLOCKS_WITH_NUMBERS = 16

History = Sequence[Mapping[str, float]]  # the lines of metrics.jsonl


def draw_curves(history: History, title: str, path: Path, averaging: str = "per volume", kept: str = "best") -> None:
    """Draw all epochs so far. The file is replaced atomically, because it is redrawn while people view it."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, *overlaps = figure.subplots(1, 2 if has_validation(history) else 1, squeeze=False)[0]
    draw_losses(losses, history)
    for axes in overlaps:
        draw_validation(axes, history, None, averaging, kept)
    figure.suptitle(title)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def has_validation(history: History) -> bool:
    """Return whether the run had validation cases."""
    return any("val_dice" in line for line in history)


def draw_losses(axes: Axes, history: History) -> None:
    """Draw training loss over epochs, and validation loss if there is one."""
    labels = {"train_loss": "training"} | ({"val_loss": "validation"} if has_validation(history) else {})
    _draw_lines(axes, history, labels)
    is_positive = all(line[key] > 0 for line in history for key in labels)
    axes.set(ylabel="loss", yscale="log" if is_positive else "linear")  # a loss with Dice in it may be negative


def draw_validation(axes: Axes, history: History, best: Mapping[str, float] | None, averaging: str, kept: str) -> None:
    """Draw validation Dice and IoU over epochs, and mark the epoch that is kept.

    Args:
        best: the line of the kept epoch; None takes the highest Dice, or the last epoch.
        averaging: what Dice is averaged over, such as `per volume`.
        kept: which epoch is kept, `best` or `last`.
    """
    best = best or (history[-1] if kept == "last" else max(history, key=lambda line: line["val_dice"]))
    _draw_lines(axes, history, {"val_dice": "Dice", "val_iou": "IoU"})
    axes.axvline(best["epoch"], color="grey", lw=0.8, ls=":")
    axes.annotate(f"{kept} {best['val_dice']:.3f}", (best["epoch"], 0.02), fontsize="small", ha="right")
    axes.set(ylabel=f"validation, {averaging}", ylim=(0, 1))


def draw_block_weights(axes: Axes, weights: Mapping[str, Any]) -> None:
    """Draw the `block_weights` of a run's summary: blocks from left to right, decoder levels from the coarsest down."""
    blocks, levels = weights["blocks"], np.asarray(weights["levels"])
    has_numbers = len(blocks) <= MAX_BLOCKS_WITH_NUMBERS
    drawn = axes.pcolormesh(levels, cmap="Blues", vmin=0, vmax=max(levels.max(), 2 / len(blocks)), edgecolors="w")
    axes.set_xticks(np.arange(len(blocks)) + 0.5, blocks, fontsize="small" if has_numbers else 6)
    axes.set_yticks(np.arange(len(levels)) + 0.5, ["tokens", *(f"×{2**level}" for level in range(1, len(levels)))])
    axes.invert_yaxis()
    axes.set(xlabel="block of the backbone (the first is 0)", ylabel="resolution of the decoder's map")
    bar = axes.figure.colorbar(drawn, ax=axes, label="weight")
    bar.solids.set(rasterized=False, edgecolor="face")  # pages turn raster images grey, as if they were scans
    if has_numbers:
        for level, block in np.ndindex(levels.shape):
            weight = levels[level, block]
            colour = "white" if weight > 0.6 * drawn.norm.vmax else "black"
            axes.text(
                block + 0.5, level + 0.5, f"{weight:.3f}"[1 if weight < 1 else 0 :], color=colour, ha="center",
                va="center", fontsize=7,
            )  # fmt: skip


def _draw_lines(axes: Axes, history: History, labels: Mapping[str, str]) -> None:
    epochs = [line["epoch"] for line in history]
    for key, label in labels.items():
        axes.plot(epochs, [line[key] for line in history], "o-", ms=3, label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
