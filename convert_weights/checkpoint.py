"""A PyTorch checkpoint, read without executing what it may contain, and with every parameter accounted for."""

from __future__ import annotations

import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxla.config import InputError

log = logging.getLogger("jaxla.convert_weights")


def read_checkpoint(
    path: Path, shapes: Mapping[str, tuple[int, ...]], ignored: Sequence[str], arch: str
) -> dict[str, np.ndarray]:
    """The float32 parameters of a `.pth` state dict.

    Args:
        shapes: every parameter that must be there, with its shape.
        ignored: parameters that may be there and are left out (the log says so).
        arch: for messages.

    Raises:
        InputError: no such file, torch is not installed, a file that is damaged or would need arbitrary unpickling, or
            parameters missing, extra or mis-shaped.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError("conversion reads PyTorch files and needs torch: pip install 'jaxla[convert]'") from error
    if not path.is_file():
        raise InputError(f"--source={path}: no such file")
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
        raise InputError(
            f"{path}: a web page or a pointer saved in place of the checkpoint; download the file itself again"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of old pickles before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: not a plain file of weights: it is no checkpoint, or loading it would run code from it; "
            "nothing was run. Download the released weights again"
        ) from error
    except Exception as error:  # torch's unpickler lets many kinds escape on bytes that are no checkpoint
        raise InputError(f"{path}: truncated, damaged or no checkpoint; download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: not a state dict (a mapping of names to tensors)")

    if missing := sorted(set(shapes) - set(state)):
        raise InputError(f"{path}: not {arch}: lacks {len(missing)} of its parameters, such as {missing[0]}")
    if extra := sorted(set(state) - set(shapes) - set(ignored)):
        raise InputError(f"{path}: not {arch}: has {len(extra)} parameters that it lacks, such as {extra[0]}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise InputError(
                f"{path}: not {arch}: {name} has shape {tuple(state[name].shape)}, expected {tuple(shape)}"
            )
    for name in set(ignored) & set(state):
        log.info("%s: %s is left out; no forward pass without masking uses it", path.name, name)
    return {name: state[name].to(torch.float32).numpy() for name in shapes}
