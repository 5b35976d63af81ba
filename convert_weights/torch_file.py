"""Read PyTorch files: zip archives and the older pickle format. Code in a file is never executed."""

from __future__ import annotations

import codecs
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from convert_weights.tensors import Tensor, join_first, require_finite
from jaxla.config import InputError

if TYPE_CHECKING:
    import torch

# Checkpoints may contain NumPy numbers, such as losses. Besides tensors, only these types are allowed.
_NUMPY_NUMBERS = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in ("f8", "f4", "f2", "i8", "i4", "?")),
    codecs.encode,
]

MIN_TORCH = (2, 10)  # in older versions a file can corrupt memory despite weights_only=True (CVE-2026-24747)
INSTALL_TORCH = "Run `pip install 'torch>=2.10'`."
USE_RELEASED_FILE = "Pass the released weights."


def require_torch(where: object) -> ModuleType:
    """Return the module torch, which nothing else in this package imports, or raise an InputError about `where`."""
    try:
        import torch
    except Exception as error:  # its shared libraries fail in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise InputError(where, "needs torch, which is not installed", INSTALL_TORCH) from error
        problem = f"needs torch, which is installed but cannot be imported ({error})"
        raise InputError(where, problem, "Run `pip install 'torch>=2.10' --force-reinstall`.") from error
    version = torch.__version__  # such as 2.13.0+cpu
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise InputError(where, f"needs torch, but {version} is too old to read files safely", INSTALL_TORCH)
    return torch


def open_torch_file(path: Path, is_archive: bool, state_dict_key: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict, by name; a PyTorch archive is memory-mapped.

    Raises:
        InputError: torch cannot be used, or the file is damaged, contains code, or is not a state dict.
    """
    torch = require_torch(path)
    numpy_numbers = torch.serialization.safe_globals(_NUMPY_NUMBERS if state_dict_key else [])
    try:
        # torch warns about old pickles before it rejects them
        with warnings.catch_warnings(action="ignore"), numpy_numbers:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        problem = "not a checkpoint, or loading it would run code from it; nothing was run"
        advice = "If the file is your own, save only its state dict: `torch.save(model.state_dict(), 'new.pth')`."
        raise InputError(path, problem, f"Download the released weights again. {advice}") from error
    except Exception as error:  # torch's unpickler raises many types for bytes that are not a checkpoint
        problem = f"cannot be loaded ({str(error) or type(error).__name__}); it may be truncated or damaged"
        raise InputError(path, problem, "Download the file again.") from error
    if state_dict_key and isinstance(state, Mapping) and isinstance(state.get(state_dict_key), Mapping):
        state = state[state_dict_key]
    _require_state_dict(path, state, torch.Tensor)
    return {
        name: Tensor(tuple(value.shape), _dtype_name(value), partial(_read, path, name, value))
        for name, value in state.items()
    }


def _require_state_dict(path: Path, state: object, tensor_type: type) -> None:
    if not isinstance(state, Mapping):
        problem = f"not a state dict (names mapped to tensors) but a {type(state).__name__}"
        raise InputError(path, problem, USE_RELEASED_FILE)
    unexpected = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, tensor_type))]
    for key in unexpected:
        value = state[key]
        if isinstance(value, Mapping) and any(isinstance(part, tensor_type) for part in value.values()):
            code = f"torch.save(torch.load({str(path)!r}, weights_only=True)[{key!r}], 'new.pth')"
            raise InputError(path, f"not a state dict, but contains one under {key!r}", f"Save only this: `{code}`.")
    if unexpected:
        problem = f"not a state dict (names mapped to tensors): contains {join_first(map(repr, unexpected))}"
        raise InputError(path, problem, USE_RELEASED_FILE)


def _dtype_name(value: torch.Tensor) -> str:
    is_dense = str(value.layout) == "torch.strided" and value.device.type == "cpu"
    return str(value.dtype if is_dense else value.layout).removeprefix("torch.")


def _read(path: Path, name: str, value: torch.Tensor) -> np.ndarray:
    value = value.detach()
    return require_finite(path, name, (value.float() if _dtype_name(value) == "bfloat16" else value).numpy())


def require_archive_checksums(path: Path) -> None:
    """Compare each part of a PyTorch archive with its checksum, which torch writes but does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            has_checksums = any(part.CRC for part in archive.infolist())
            damaged = archive.testzip() if has_checksums else None
    except Exception as error:  # zipfile and the decompressors that it calls raise many types
        raise InputError(path, f"damaged ({error})", "Download the file again.") from error
    if damaged:
        raise InputError(path, f"damaged: {damaged} differs from its checksum", "Download the file again.")
