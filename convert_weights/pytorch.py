"""A converted file back into its authors' format: the state dict that their own code loads, to the bit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors import safe_open

from convert_weights.architectures import of_file
from convert_weights.checkpoint import require_other, require_torch
from convert_weights.layout import to_theirs
from jaxla.config import InputError
from jaxla.models.weights import require_parameters
from jaxla.models.weights_format import read_metadata, require_room, require_undamaged, writing


def to_pytorch(source: Path, output: Path) -> int:
    """Write a converted file's parameters as a `.pth`; holds all of them in memory. -> How many tensors there are.

    Raises:
        InputError: torch is not installed, the source is damaged or lacks parameters, or the output is the source or
            cannot be written.
    """
    torch = require_torch("option --to-torch")
    metadata = read_metadata(source)
    arch = metadata["arch"]
    architecture = of_file(source, metadata)
    if architecture is None:
        raise InputError(f"{source}: holds {arch}, of which no weights were released: its authors' format is unknown")
    require_parameters(source, arch, architecture.shapes)
    require_other(output, [source])
    require_room(output, source.stat().st_size)
    require_undamaged(source)
    with safe_open(source, framework="numpy") as file:
        held = set(file.keys())

    def read(name: str, block: int | None) -> np.ndarray:
        # opened anew each time: an open file's pages, once read, would stay in memory
        with safe_open(source, framework="numpy") as file:
            return file.get_tensor(name) if block is None else file.get_slice(name)[block]

    rounded = metadata.get("bfloat16", "").split()
    state = OrderedDict()
    for name, array in to_theirs(architecture.rows, held, read):
        tensor = torch.from_numpy(array)
        state[name] = tensor.bfloat16() if name in rounded else tensor
    with writing(output) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch, closing its archive after a fault of the disk, fails once more
            raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904
    return len(state)
