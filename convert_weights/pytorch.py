"""Convert a converted file back into its authors' state dict, bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors import safe_open

from convert_weights.architectures import converted_architecture
from convert_weights.checkpoint import require_not_source
from convert_weights.layout import to_theirs
from convert_weights.torch_file import require_torch
from jaxla.config import InputError
from jaxla.models.weights import require_parameters
from jaxla.models.weights_format import open_atomically, read_metadata, require_free_space, require_undamaged


def to_pytorch(source: Path, output: Path) -> int:
    """Write a converted file's parameters to a `.pth` and return the number of tensors; all are held in memory.

    Raises:
        InputError: torch is not installed; the source is damaged or incomplete; the output is the source or cannot be
            written.
    """
    torch = require_torch("--to-torch")
    metadata = read_metadata(source)
    arch = metadata["arch"]
    architecture = converted_architecture(source, metadata)
    if architecture is None:
        raise InputError(source, f"contains {arch}, which was never released in a PyTorch format")
    require_parameters(source, arch, architecture.shapes)
    require_not_source(output, [source])
    require_free_space(output, source.stat().st_size)
    require_undamaged(source)
    with safe_open(source, framework="numpy") as file:
        names = set(file.keys())

    def read(name: str, block: int | None) -> np.ndarray:
        # Opened for each tensor: the pages of an open file stay in memory once they are read.
        with safe_open(source, framework="numpy") as file:
            return file.get_tensor(name) if block is None else file.get_slice(name)[block]

    bfloat16_names = metadata.get("bfloat16", "").split()
    state = OrderedDict()
    for name, array in to_theirs(architecture.rows, names, read):
        tensor = torch.from_numpy(array)
        state[name] = tensor.bfloat16() if name in bfloat16_names else tensor
    with open_atomically(output) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # after a disk error torch raises this when it closes its archive
            raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904
    return len(state)
