"""The file of converted weights: safetensors, whose metadata say what architecture it holds and where it came from."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxla.config import InputError

# No JAX here: `python -m jaxla.info` reads a file's header in less time than JAX takes to import.

FORMAT = "jaxla-1"


def save_weights(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write parameters with what they are; beside the file first, then under its name.

    Args:
        metadata: `arch`, `source`, `source_sha256` and `licence`, at least.
    """
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(arrays), beside, metadata={"format": FORMAT, **metadata})
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # safetensors writes for its owner alone
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({reason}); mend that, or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """What a weights file says of itself.

    Raises:
        InputError: no such file, or not one that convert_weights wrote.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the .safetensors file in it")
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; {how_to_convert('ARCH', path)}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error}); convert it again") from error
    if metadata.get("format") != FORMAT or "arch" not in metadata:
        raise InputError(f"{path}: not written by convert_weights; {how_to_convert('ARCH', path)}")
    return metadata


def parameter_count(path: Path) -> tuple[int, int]:
    """How many arrays a weights file holds, and how many numbers in all; reads its header alone."""
    with safe_open(path, framework="numpy") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118  (not a dict)
    return len(sizes), sum(sizes)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def how_to_convert(arch: str, path: Path) -> str:
    """The command that makes a weights file."""
    return f"make it with: python -m convert_weights --arch={arch} --source=<downloaded>.pth --output={path}"
