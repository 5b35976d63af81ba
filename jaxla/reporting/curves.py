"""A run's curves: loss, and validation Dice and IoU, over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_curves(history: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Draw the epochs of `metrics.jsonl` so far; written beside, then renamed, for it is redrawn while people look."""
    epochs = [m["epoch"] for m in history]
    best = max(history, key=lambda m: m["val_dice"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, overlaps = figure.subplots(1, 2)
    losses.plot(epochs, [m["train_loss"] for m in history], "o-", ms=3, label="training")
    losses.plot(epochs, [m["val_loss"] for m in history], "o-", ms=3, label="validation")
    losses.set(xlabel="epoch", ylabel="loss", yscale="log")
    overlaps.plot(epochs, [m["val_dice"] for m in history], "o-", ms=3, label="Dice")
    overlaps.plot(epochs, [m["val_iou"] for m in history], "o-", ms=3, label="IoU")
    overlaps.axvline(best["epoch"], color="grey", lw=0.8, ls=":")
    overlaps.annotate(f"best {best['val_dice']:.3f}", (best["epoch"], 0.02), fontsize="small", color="grey", ha="right")
    overlaps.set(xlabel="epoch", ylabel="validation, per volume", ylim=(0, 1))
    for axes in (losses, overlaps):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=110, format="png")
    beside.replace(path)
