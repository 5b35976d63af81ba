"""The weights that a fusion network learned for each of the backbone's blocks at each level of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

MAX_BLOCKS_WITH_NUMBERS = 16


def draw_block_weights(axes: Axes, weights: Mapping[str, Any]) -> None:
    """Draw weights as a heat map: blocks from left to right, decoder levels from the coarsest down.

    Args:
        weights: `block_weights` of a run's summary: numbers of the blocks, and their weights at each level.
    """
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
