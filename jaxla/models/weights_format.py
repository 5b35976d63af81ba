"""Read and write files of converted weights: safetensors whose metadata state the architecture and the source."""

from __future__ import annotations

import contextlib
import functools
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

# This module does not import JAX: `python -m jaxla.info` reads a header in less time than that import takes.

FORMAT = "jaxla-1"

# Prefix of the tensors that no forward pass uses. They are kept so that a conversion back to PyTorch restores the
# released checkpoint.
UNUSED_PREFIX = "unused."

CHECKSUM_KEY = "data_sha256"  # metadata: sha256 of everything that follows the header
HEADER_CHECKSUM_KEY = "header_sha256"  # metadata: sha256 of the header, in which this value is zeros
_NO_CHECKSUM = "0" * 64

CONVERT_AGAIN = "Convert the checkpoint again."

_SAFETENSORS_DTYPES = {"float32": "F32", "int64": "I64"}


class StreamedArray(NamedTuple):
    """An array that is never entirely in memory: `chunks()` yields its parts in the order of its elements."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]


def save_weights(path: Path, arrays: Mapping[str, np.ndarray | StreamedArray], metadata: Mapping[str, str]) -> str:
    """Write a weights file atomically and return the sha256 of its data, which is also written into the metadata.

    The same arguments give the same bytes.

    Args:
        arrays: float32 or int64; each chunk is written as soon as it is read.
        metadata: at least `arch`, `source`, `source_sha256` and `licence`.

    Raises:
        InputError: the file cannot be written; no part of it is left.
    """
    arrays = {
        name: array
        if isinstance(array, StreamedArray)
        else StreamedArray(array.shape, array.dtype, lambda a=array: [a])
        for name, array in arrays.items()
    }
    # The widest dtypes come first, so that each array is aligned to its own size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    entries, end = {}, 0
    for name in order:
        shape, dtype, _ = arrays[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _SAFETENSORS_DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}

    def header(data_checksum: str, header_checksum: str = _NO_CHECKSUM) -> bytes:
        checksums = {CHECKSUM_KEY: data_checksum, HEADER_CHECKSUM_KEY: header_checksum}
        sorted_metadata = dict(sorted({"format": FORMAT, **checksums, **metadata}.items()))
        text = json.dumps({"__metadata__": sorted_metadata, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with open_atomically(path) as file:
        file.write(header(_NO_CHECKSUM))  # has the length of the final header
        digest = hashlib.sha256()
        for name in order:
            for chunk in arrays[name].chunks():
                data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
                digest.update(data)
                file.write(data)
        file.seek(0)
        file.write(header(digest.hexdigest(), hashlib.sha256(header(digest.hexdigest())).hexdigest()))
    return digest.hexdigest()


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which gets its name when the block ends; after an error no part of it is left."""
    with report_os_errors("written", path, "Fix this, or choose another file."):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            yield file


def require_free_space(path: Path, size: int) -> None:
    """Raise an InputError unless the disk of `path` has `size` free bytes."""
    if (free := free_bytes(path)) < size:
        problem = f"needs {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
        raise InputError(path, problem, "Free some space, or choose another folder.")


def read_metadata(path: Path) -> dict[str, str]:
    """Return a weights file's metadata without the checksums.

    Raises:
        InputError: the file does not exist, cannot be read, or was not written by convert_weights.
    """
    if os.path.isdir(path):  # Path.is_dir raises if a name is too long or a folder cannot be read
        raise InputError(path, "is a folder", "Pass the .safetensors file in it.")
    if not os.path.isfile(path):
        arch = re.match(r"dinov\d_vit\w+?1\d(_reg)?|resnet\d+|vgg16_bn", path.name)
        then = "" if path.suffix == ".safetensors" else " Then pass the .safetensors file that it writes."
        raise InputError(path, "no such weights file", suggest_conversion(arch[0] if arch else "ARCH", path) + then)
    start, metadata = b"", {}
    try:
        with report_os_errors("read", path, "Fix this, or convert the checkpoint again."):
            with path.open("rb") as file:  # before safe_open, which reports an unreadable file as missing
                start = file.read(9)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
    except SafetensorError as error:
        # These bytes begin a PyTorch file, unless they are the length of a safetensors header and "{" follows.
        if not start.startswith((b"PK\x03\x04", b"\x80")) or start.endswith(b"\0\0\0{"):
            raise InputError(path, "truncated, or not a safetensors file", CONVERT_AGAIN) from error
    if metadata.get("format") != FORMAT or not {"arch", "source"} <= set(metadata):
        command = f"python -m convert_weights --arch=ARCH --source={shlex.quote(str(path))}"
        fix = f"If it is a released checkpoint, convert it: `{command}`."
        raise InputError(path, "not written by convert_weights", fix)
    return {key: value for key, value in metadata.items() if key not in (CHECKSUM_KEY, HEADER_CHECKSUM_KEY)}


def require_undamaged(path: Path) -> str:
    """Return the sha256 of a weights file's data; raise an InputError unless it matches the metadata.

    The header (names, shapes and positions of the arrays, and metadata) must match its own sha256, which files of
    earlier versions lack. A file is read once per process, and again only if its size or modification time
    changes.
    """
    read_metadata(path)  # checks the header's form
    with safe_open(path, framework="numpy") as file:
        expected = file.metadata().get(CHECKSUM_KEY)
    if expected is None:
        raise InputError(path, "contains no checksum of its data", CONVERT_AGAIN)
    if has_header_checksum(path) and not _is_header_intact(path):
        problem = (
            "damaged: the names or positions of the arrays, or the metadata, have changed since the file was written"
        )
        raise InputError(path, problem, CONVERT_AGAIN)
    status = path.stat()
    found = _data_sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    if found != expected:
        problem = f"damaged: the sha256 of its data is {found}, but its metadata state {expected}"
        raise InputError(path, problem, CONVERT_AGAIN)
    return found


def has_header_checksum(path: Path) -> bool:
    """Return whether a weights file states the sha256 of its header; files of earlier versions do not."""
    with safe_open(path, framework="numpy") as file:
        return HEADER_CHECKSUM_KEY in file.metadata()


def _is_header_intact(path: Path) -> bool:
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    pattern = rb'(?<="%s":")[0-9a-f]{64}(?=")' % HEADER_CHECKSUM_KEY.encode()
    stated = re.findall(pattern, header)
    zeroed = re.sub(pattern, _NO_CHECKSUM.encode(), header)
    return stated == [hashlib.sha256(length + zeroed).hexdigest().encode()]


@functools.cache
def _data_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256 of what follows the header; `size` and `mtime_ns` identify the version of the file."""
    with path.open("rb", buffering=0) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameter_count(path: Path) -> tuple[int, int]:
    """Return how many parameter arrays a weights file contains, and how many values in total; reads only its header."""
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith(UNUSED_PREFIX)]  # noqa: SIM118  (not a dict)
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in names]
    return len(sizes), sum(sizes)


def suggest_conversion(arch: str, output: Path) -> str:
    """Return a sentence with the command that creates a missing weights file, as `output` if that is a .safetensors."""
    # Decided by name, because the tables of architectures import JAX.
    source = "--download" if arch.startswith(("dinov2_", "resnet", "vgg")) else "--source=CHECKPOINT"
    command = f"python -m convert_weights --arch={arch} {source}"
    if output.suffix == ".safetensors":
        command += f" --output={shlex.quote(str(output))}"
    licence = " with the CHECKPOINT from https://ai.meta.com/dinov3/, where you accept the licence"
    return f"Where torch is installed, run `{command}`{licence if arch.startswith('dinov3_') else ''}."
