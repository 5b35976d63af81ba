"""The file of converted weights: safetensors, whose metadata say what architecture it holds and where it came from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxla.cli.files import atomic_file, free_bytes, report_os_errors
from jaxla.config import InputError

# No JAX here: `python -m jaxla.info` reads a file's header in less time than JAX takes to import.

FORMAT = "jaxla-1"

# What stands under this prefix came with the released checkpoint and no forward pass here uses it: it is kept so that
# the way back to PyTorch gives the released checkpoint again.
UNUSED = "unused."

CHECKSUM = "data_sha256"  # metadata: sha256 of all that follows the header

_DTYPES = {"float32": "F32", "int64": "I64"}  # as safetensors spells those that are written here


class Streamed(NamedTuple):
    """An array that is never whole in memory: `chunks()` gives it piece by piece, in the order of its elements."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]


def save_weights(path: Path, arrays: Mapping[str, np.ndarray | Streamed], metadata: Mapping[str, str]) -> str:
    """Write parameters with what they are; beside the file first, then under its name. The same input, the same bytes.

    Args:
        arrays: float32 or int64, each written as soon as it is read.
        metadata: `arch`, `source`, `source_sha256` and `licence`, at least.

    Returns:
        sha256 of the file's data (all that follows its header); it stands in the metadata too, for `require_undamaged`.

    Raises:
        InputError: the file cannot be written; nothing is left of it.
    """
    arrays = {
        name: array if isinstance(array, Streamed) else Streamed(array.shape, array.dtype, lambda a=array: [a])
        for name, array in arrays.items()
    }
    # the widest dtypes first, so that each array is aligned to its own
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    described, end = {}, 0
    for name in order:
        shape, dtype, _ = arrays[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}

    def header(checksum: str) -> bytes:
        said = dict(sorted({"format": FORMAT, CHECKSUM: checksum, **metadata}.items()))
        text = json.dumps({"__metadata__": said, **described}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with writing(path) as file:
        file.write(header("0" * 64))  # its length is that of the header to come
        digest = hashlib.sha256()
        for name in order:
            for chunk in arrays[name].chunks():
                data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
                digest.update(data)
                file.write(data)
        file.seek(0)
        file.write(header(digest.hexdigest()))
    return digest.hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that stands under its name once it is whole; left in any other way, nothing of it remains.

    Raises:
        InputError: it cannot be written.
    """
    with report_os_errors("written", path, "mend that, or choose another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as beside, beside.open("wb") as file:
            yield file


def require_room(path: Path, size: int) -> None:
    """Raise an InputError unless a file of `size` bytes has room where `path` is to be."""
    if (free := free_bytes(path)) < size:
        raise InputError(
            f"{path}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} are free; make room, or choose another place"
        )


def read_metadata(path: Path) -> dict[str, str]:
    """What a weights file says of itself; its checksum, which is of this one file, apart.

    Raises:
        InputError: no such file, it cannot be read, or is not one that convert_weights wrote.
    """
    metadata = _read_metadata(path)
    return {key: value for key, value in metadata.items() if key != CHECKSUM}


def _read_metadata(path: Path) -> dict[str, str]:
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long or a folder may not be read
        raise InputError(f"{path}: is a folder; give the .safetensors file in it")
    if not os.path.isfile(path):
        named = re.match(r"dinov\d_vit\w+?1\d(_reg)?|resnet\d+|vgg16_bn", path.name)
        how = how_to_convert(named[0] if named else "ARCH", path)
        then = "" if path.suffix == ".safetensors" else ", and give the .safetensors file that it writes"
        raise InputError(f"{path}: no such weights file; {how}{then}")
    start, metadata = b"", {}
    try:
        with report_os_errors("read", path, "mend that, or convert it again"):
            with path.open("rb") as file:  # first: of a file that may not be read safetensors says that there is none
                start = file.read(9)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
    except SafetensorError as error:
        # what PyTorch's files begin with, unless it is the length of a header, which "{" follows
        if not start.startswith((b"PK\x03\x04", b"\x80")) or start.endswith(b"\0\0\0{"):
            raise InputError(f"{path}: truncated, or not a safetensors file; convert it again") from error
    if metadata.get("format") != FORMAT or "arch" not in metadata:
        raise InputError(
            f"{path}: not written by convert_weights; if it is a released checkpoint, convert it: "
            f"python -m convert_weights --arch=ARCH --source={shlex.quote(str(path))}"
        )
    return metadata


def require_undamaged(path: Path) -> str:
    """Read the whole file; -> the sha256 of its data, which is the one that was noted when it was written.

    Raises:
        InputError: as `read_metadata`; or the data are not those that were written, or nothing tells.
    """
    noted = _read_metadata(path).get(CHECKSUM)
    if noted is None:
        raise InputError(f"{path}: holds no checksum of its data; convert it again")
    with path.open("rb", buffering=0) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != noted:
        raise InputError(f"{path}: damaged: the sha256 of its data is {found}, noted was {noted}; convert it again")
    return found


def parameter_count(path: Path) -> tuple[int, int]:
    """How many arrays of parameters a weights file holds, and how many numbers in all; reads its header alone."""
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith(UNUSED)]  # noqa: SIM118  (not a dict)
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in names]
    return len(sizes), sum(sizes)


def how_to_convert(arch: str, output: Path) -> str:
    """The command that makes a weights file, which is not there yet: `output`, if that ends as one does."""
    # known by their names, for the tables of architectures import JAX
    source = "--download" if arch.startswith(("dinov2_", "resnet", "vgg")) else "--source=CHECKPOINT"
    command = f"python -m convert_weights --arch={arch} {source}"
    if output.suffix == ".safetensors":
        command += f" --output={shlex.quote(str(output))}"
    gate = " (CHECKPOINT: what you download once you have accepted the licence at https://ai.meta.com/dinov3/)"
    return f"make it, where torch is installed, with: {command}{gate if arch.startswith('dinov3_') else ''}"
