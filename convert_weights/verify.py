"""Check that a converted file is undamaged and that its network runs."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxla.config import InputError
from jaxla.models.weights import load_backbone
from jaxla.models.weights_format import has_header_checksum, read_metadata, require_undamaged
from jaxla.nnunet.converted import NNUNET, load_converted, parse_metadata

IMAGE_SIDE = 112  # pixels; a multiple of every backbone's patch size


def verify(path: Path) -> str:
    """Compare a converted file with its checksum and run its network on one random image; return a report line.

    Raises:
        InputError: the file is damaged or incomplete, or the outputs are not finite.
    """
    checksum = require_undamaged(path)
    metadata = read_metadata(path)
    if metadata["arch"] == NNUNET:
        plan, configuration, _ = parse_metadata(metadata, path)
        network = load_converted(path)
        size = plan.configuration(configuration).patch_size
        channels = 1
        kind = "logits"
    else:
        network = load_backbone(path)
        size = (IMAGE_SIDE, IMAGE_SIDE)
        channels = 3
        kind = "features"
    image = np.random.default_rng(0).standard_normal((1, *size, channels), dtype=np.float32)
    graph, state = nnx.split(network)
    # jitted, because one compilation is faster than one per operation
    run = jax.jit(lambda state, image: nnx.merge(graph, state)(image))
    outputs = [np.asarray(array, np.float32) for array in jax.tree.leaves(run(state, image))]
    if not all(np.isfinite(array).all() for array in outputs):
        raise InputError(path, f"the {kind} of a test image are not finite", "Convert the checkpoint again.")
    caveat = (
        "; the sha256 does not cover tensor names and metadata, because an earlier version wrote the file "
        "(convert the checkpoint again to include them)"
    )
    return (
        f"{path}: verified: the data match their sha256 {checksum}{'' if has_header_checksum(path) else caveat}; "
        f"the {sum(array.size for array in outputs)} {kind} of one {'×'.join(map(str, size))} image are finite"
    )
