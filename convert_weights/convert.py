"""Convert a released checkpoint into this package's format, with one block of one parameter in memory at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert_weights.accounting import HUGGING_FACE, identify_tensors
from convert_weights.architectures import Architecture
from convert_weights.checkpoint import (
    HUGGING_FACE_FILES,
    Checkpoint,
    checkpoint_sha256,
    progress_bar,
    require_not_source,
)
from convert_weights.layout import to_ours
from convert_weights.tensors import Tensor, join_first
from jaxla.models.weights_format import UNUSED_PREFIX, StreamedArray, require_free_space, save_weights

log = logging.getLogger("jaxla.convert_weights")


def convert(architecture: Architecture, checkpoint: Checkpoint, output: Path) -> str:
    """Write a checkpoint as `output` and return a report line.

    Raises:
        InputError: the checkpoint is damaged or does not contain the architecture; the output cannot be written or
            would replace the source.
    """
    require_not_source(output, (checkpoint.path, *checkpoint.files))
    path, arch = checkpoint.path, architecture.name
    tensors, layout = identify_tensors(checkpoint, architecture)
    arrays = to_ours(architecture.rows, tensors, architecture.shapes)
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    require_free_space(output, size)
    log.info("%s: %s in %s, %.2f GB", path, arch, layout, size / 1e9)
    _log_peculiarities(architecture, path, layout, tensors)
    metadata = {
        "arch": arch,
        "source": _source_name(path),
        "source_sha256": checkpoint_sha256(checkpoint),
        **architecture.metadata,
    }
    if bfloat16_names := [name for name, tensor in tensors.items() if tensor.dtype == "bfloat16"]:
        metadata["bfloat16"] = " ".join(bfloat16_names)  # saved as float32, which represents them exactly
    with progress_bar(f"writing {output.name}", size) as bar:
        checksum = save_weights(output, {name: _with_progress(array, bar) for name, array in arrays.items()}, metadata)
    return f"{output}: {arch} from {path}, sha256 of its data {checksum}"


def _log_peculiarities(architecture: Architecture, path: Path, layout: str, tensors: Mapping[str, Tensor]) -> None:
    rows = architecture.rows
    if unused := [row.theirs for row in rows if row.theirs in tensors and row.ours.startswith(UNUSED_PREFIX)]:
        count = f" ({len(unused)} in all)" if len(unused) > 3 else ""
        log.info("%s: tensors that no forward pass uses are kept: %s%s", path, join_first(unused), count)
    classifier = [row.theirs for row in rows if row.theirs.startswith(("fc.", "classifier."))]
    if classifier and not set(classifier) & set(tensors):
        log.info("%s: contains no classifier (%s); --to-torch will not write one", path, join_first(classifier))
    if layout == HUGGING_FACE and "rope_embed.periods" in tensors:
        log.info(
            "%s: contains no rotary periods; they are computed by Hugging Face's formula. The authors' .pth contains "
            "them rounded to bfloat16; convert that file to get the authors' values",
            path,
        )


def _source_name(path: Path) -> str:
    """Return the file's name; with its folder's name in front if all Hugging Face repositories use this file name."""
    if path.name.removesuffix(".index.json") in HUGGING_FACE_FILES:
        return f"{Path(os.path.abspath(path)).parent.name}/{path.name}"
    return path.name


def _with_progress(array: StreamedArray, bar: tqdm) -> StreamedArray:
    def chunks() -> Iterator[np.ndarray]:
        for chunk in array.chunks():
            yield chunk
            bar.update(chunk.nbytes)

    return array._replace(chunks=chunks)
