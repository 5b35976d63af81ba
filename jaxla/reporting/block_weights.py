"""What a fusion learned: the weight of each of the backbone's blocks at each level of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

MOST_WRITTEN = 16  # blocks, beyond which there is no room for numbers


def draw_block_weights(axes: Axes, weights: Mapping[str, Any]) -> None:
    """Blocks from left to right, levels from the coarsest down, the darker the heavier.

    Args:
        weights: `block_weights` of a run's summary: the numbers of the blocks, and their weights at each level.
    """
    blocks, levels = weights["blocks"], np.asarray(weights["levels"])
    drawn = axes.pcolormesh(levels, cmap="Blues", vmin=0, vmax=max(levels.max(), 2 / len(blocks)), edgecolors="w")
    axes.set_xticks(np.arange(len(blocks)) + 0.5, blocks, fontsize="small" if len(blocks) <= MOST_WRITTEN else 6)
    axes.set_yticks(np.arange(len(levels)) + 0.5, level_names(len(levels)))
    axes.invert_yaxis()
    axes.set(xlabel="block of the backbone, 0 the first", ylabel="map of the decoder")
    bar = axes.figure.colorbar(drawn, ax=axes, label="weight")
    bar.solids.set(rasterized=False, edgecolor="face")  # pages make pictures in a figure grey, as scans are
    if len(blocks) <= MOST_WRITTEN:
        for level, block in np.ndindex(levels.shape):
            weight = levels[level, block]
            colour = "white" if weight > 0.6 * drawn.norm.vmax else "black"
            axes.text(
                block + 0.5, level + 0.5, f"{weight:.3f}"[1 if weight < 1 else 0 :], color=colour, ha="center",
                va="center", fontsize=7,
            )  # fmt: skip


def level_names(count: int) -> list[str]:
    """Of the decoder's maps by their size: that of the tokens, then twice as large each."""
    return ["tokens", *(f"×{2**level}" for level in range(1, count))]
