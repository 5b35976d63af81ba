"""A released checkpoint -> this package's file, one block of one parameter in memory at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert_weights.accounting import HUGGING_FACE, account_for
from convert_weights.architectures import Architecture
from convert_weights.checkpoint import (
    HUGGING_FACE_FILES,
    Checkpoint,
    checkpoint_sha256,
    progress,
    require_other,
    some,
)
from convert_weights.layout import to_ours
from jaxla.models.weights_format import UNUSED, Streamed, require_room, save_weights

log = logging.getLogger("jaxla.convert_weights")


def convert(architecture: Architecture, checkpoint: Checkpoint, output: Path) -> str:
    """Write a checkpoint as `output`; -> a line that says what was done.

    Raises:
        InputError: the checkpoint is damaged or does not hold the architecture; or the output cannot be written, or
            would replace the source.
    """
    require_other(output, (checkpoint.path, *checkpoint.files))
    path, arch, rows = checkpoint.path, architecture.name, architecture.rows
    tensors, layout = account_for(checkpoint, architecture)
    arrays = to_ours(rows, tensors, architecture.shapes)
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    require_room(output, size)

    log.info("%s: %s in %s, %.2f GB", path, arch, layout, size / 1e9)
    if unused := [array.removeprefix(UNUSED) for array in arrays if array.startswith(UNUSED)]:
        count = f" ({len(unused)} in all)" if len(unused) > 3 else ""
        log.info("%s: will be kept, though no forward pass uses it: %s%s", path, some(unused), count)
    classifier = [row.theirs for row in rows if row.theirs.startswith(("fc.", "classifier."))]
    if classifier and not set(classifier) & set(tensors):
        log.info("%s: holds no classifier (%s), nor will what --to-torch makes of it", path, some(classifier))
    if layout == HUGGING_FACE and "rope_embed.periods" in tensors:
        log.info(
            "%s: holds no rotary periods; they are computed by Hugging Face's formula. The authors' own .pth holds "
            "them rounded to bfloat16: convert that file for the authors' own numbers",
            path,
        )
    metadata = {
        "arch": arch,
        "source": _name_of(path),
        "source_sha256": checkpoint_sha256(checkpoint),
        **architecture.metadata,
    }
    if rounded := [theirs for theirs, tensor in tensors.items() if tensor.dtype == "bfloat16"]:
        metadata["bfloat16"] = " ".join(rounded)  # the same numbers stand here as float32
    with progress(f"writing {output.name}", size) as bar:
        checksum = save_weights(output, {name: _tracked(array, bar) for name, array in arrays.items()}, metadata)
    return f"{output}: {arch} from {path}, sha256 of its data {checksum}"


def _name_of(path: Path) -> str:
    """The file's name; with that of its folder where all of Hugging Face's repositories have a file of that name."""
    if path.name.removesuffix(".index.json") in HUGGING_FACE_FILES:
        return f"{Path(os.path.abspath(path)).parent.name}/{path.name}"
    return path.name


def _tracked(array: Streamed, bar: tqdm) -> Streamed:
    def chunks() -> Iterator[np.ndarray]:
        for chunk in array.chunks():
            yield chunk
            bar.update(chunk.nbytes)

    return array._replace(chunks=chunks)
