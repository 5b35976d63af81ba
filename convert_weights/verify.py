"""Does a converted file hold what was written, and does it run?"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxla.config import InputError
from jaxla.models.weights import load_backbone
from jaxla.models.weights_format import require_undamaged

SIDE = 112  # pixels; a multiple of every architecture's patch


def verify(path: Path) -> str:
    """Read a converted file again, compare it with its checksum and run it on one image; -> what was checked.

    Raises:
        InputError: it is damaged, is not whole, or its features are not finite.
    """
    checksum = require_undamaged(path)
    backbone = load_backbone(path)
    image = np.random.default_rng(0).standard_normal((1, SIDE, SIDE, 3), dtype=np.float32)
    features = [np.asarray(array, np.float32) for array in jax.tree.leaves(backbone(image))]
    if not all(np.isfinite(array).all() for array in features):
        raise InputError(f"{path}: the features of an image are not finite; convert the released checkpoint again")
    count = sum(array.size for array in features)
    return (
        f"{path}: verified: its data have the sha256 that was noted, {checksum}; the {count} features of one "
        f"{SIDE}×{SIDE} image are finite"
    )
