"""Does a converted file hold what was written, and does it run?"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from jaxla.config import InputError
from jaxla.models.weights import load_backbone
from jaxla.models.weights_format import read_metadata, require_undamaged
from jaxla.nnunet.converted import NNUNET, load_converted, parse_metadata

SIDE = 112  # pixels; a multiple of every architecture's patch


def verify(path: Path) -> str:
    """Read a converted file again, compare it with its checksum and run it on one image; -> what was checked.

    Raises:
        InputError: it is damaged, is not whole, or what it makes of the image is not finite.
    """
    checksum = require_undamaged(path)
    metadata, size, channels = read_metadata(path), (SIDE, SIDE), 3
    if metadata["arch"] == NNUNET:
        plan, configuration, _ = parse_metadata(metadata, path)
        network, size, channels = load_converted(path), plan.configuration(configuration).patch_size, 1
    else:
        network = load_backbone(path)
    image = np.random.default_rng(0).standard_normal((1, *size, channels), dtype=np.float32)
    made = [np.asarray(array, np.float32) for array in jax.tree.leaves(network(image))]
    what, count = "logits" if channels == 1 else "features", sum(array.size for array in made)
    if not all(np.isfinite(array).all() for array in made):
        raise InputError(f"{path}: the {what} of an image are not finite; convert the checkpoint again")
    return (
        f"{path}: verified: its data have the sha256 that was noted, {checksum}; the {count} {what} of one "
        f"{'×'.join(map(str, size))} image are finite"
    )
