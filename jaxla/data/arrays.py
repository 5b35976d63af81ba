"""Arrays in the cache folder, `.npy`, opened from disk piece by piece and by many threads at once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

_HEADER = re.compile(rb"'descr': '([^']+)', 'fortran_order': False, 'shape': \(([\d, ]*)\)")


def open_array(path: Path) -> np.ndarray:
    """An array that `np.save` wrote, in C order, memory-mapped and read-only.

    NumPy's own reader hands a file's header to Python's parser, which ended a run on Python 3.11 in a SystemError: of
    several threads that parse at once one rarely loses count of its depth (python/cpython issue 106905).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such array.
    """
    with path.open("rb") as file:
        start = file.read(10)
        length = int.from_bytes(start[8:10], "little")  # of version 1.0, which np.save takes for headers that fit it
        header = _HEADER.search(file.read(length))
    if start[:8] != b"\x93NUMPY\x01\x00" or not header:
        raise ValueError(f"{path}: not an array as it was written here")
    shape = tuple(int(side) for side in header[2].split(b",") if side.strip())
    return np.memmap(path, np.dtype(header[1].decode()), "r", len(start) + length, shape)
