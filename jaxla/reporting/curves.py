"""A run's curves: loss, and validation Dice and IoU, over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxla.shell.files import replacing

History = Sequence[Mapping[str, float]]  # the lines of metrics.jsonl


def draw_curves(history: History, title: str, path: Path) -> None:
    """Draw the epochs of `metrics.jsonl` so far; written beside, then renamed, for it is redrawn while people look."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, overlaps = figure.subplots(1, 2)
    draw_losses(losses, history)
    draw_validation(overlaps, history)
    figure.suptitle(title)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110)


def draw_losses(axes: Axes, history: History) -> None:
    """Training and validation loss over epochs."""
    _draw_lines(axes, history, {"train_loss": "training", "val_loss": "validation"})
    axes.set(ylabel="loss", yscale="log")


def draw_validation(axes: Axes, history: History, best: Mapping[str, float] | None = None) -> None:
    """Validation Dice and IoU over epochs; `best`, by default the epoch of the best Dice, is marked."""
    best = best or max(history, key=lambda m: m["val_dice"])
    _draw_lines(axes, history, {"val_dice": "Dice", "val_iou": "IoU"})
    axes.axvline(best["epoch"], color="grey", lw=0.8, ls=":")
    axes.annotate(f"best {best['val_dice']:.3f}", (best["epoch"], 0.02), fontsize="small", ha="right")
    axes.set(ylabel="validation, per volume", ylim=(0, 1))


def _draw_lines(axes: Axes, history: History, labels: Mapping[str, str]) -> None:
    epochs = [m["epoch"] for m in history]
    for key, label in labels.items():
        axes.plot(epochs, [m[key] for m in history], "o-", ms=3, label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
