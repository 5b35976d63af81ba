"""Arrays in the cache folder: `.npy` files, memory-mapped by many threads at once."""

import re
from pathlib import Path

import numpy as np

_HEADER = re.compile(rb"'descr': '([^']+)', 'fortran_order': False, 'shape': \(([\d, ]*)\)")


def open_array(path: Path) -> np.ndarray:
    """Open an array that `np.save` wrote in C order, memory-mapped and read-only.

    NumPy's reader parses the header with `ast`. On Python 3.11 this occasionally fails with a SystemError when
    several threads parse at once (python/cpython issue 106905).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not in the format that `np.save` writes.
    """
    with path.open("rb") as file:
        start = file.read(10)
        length = int.from_bytes(start[8:10], "little")  # format version 1.0, which np.save uses for short headers
        header = _HEADER.search(file.read(length))
    if start[:8] != b"\x93NUMPY\x01\x00" or not header:
        raise ValueError(f"{path}: not a C-ordered array in .npy format 1.0")
    shape = tuple(int(side) for side in header[2].split(b",") if side.strip())
    return np.memmap(path, np.dtype(header[1].decode()), "r", len(start) + length, shape)
