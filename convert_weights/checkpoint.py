"""What a checkpoint holds, in whatever files it comes: its tensors' names, shapes and dtypes; the numbers on demand.

PyTorch's `.pth` and `.bin`, a `.safetensors` file, several of either named by an index, or a folder with one of these.
Nothing that a file may contain is ever executed.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jaxla.config import InputError
from jaxla.models.weights_format import FORMAT

if TYPE_CHECKING:
    import torch

log = logging.getLogger("jaxla.convert_weights")

# One of several files, as Hugging Face names them; the one of one is whole.
SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.")


# What every repository of Hugging Face calls its weights; in shards, what comes before .index.json.
HUGGING_FACE_FILES = ["model.safetensors", "pytorch_model.bin"]


class Tensor(NamedTuple):
    """One tensor of a checkpoint; `read()` gives its numbers, bfloat16 as the float32 that are equal to them."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
    """A checkpoint that was opened but not read."""

    path: Path  # the file, or the index of the files
    files: tuple[Path, ...]  # that hold tensors
    tensors: dict[str, Tensor]


def open_checkpoint(path: Path, under: str = "") -> Checkpoint:
    """Recognise a file by its content, not its name, and list what it holds.

    Args:
        under: name under which the state dict stands in a file of PyTorch's that holds more; a state dict alone is read
            too.

    Raises:
        InputError: no such file; damaged, incomplete or no checkpoint; a pickle that would need code to be run; or
            torch is not installed and the file needs it.
    """
    path = find_checkpoint(path)
    if _kind(path) == "index":
        return _open_shards(path)
    return Checkpoint(path, (path,), _open_file(path, under))


def find_checkpoint(given: str | Path) -> Path:
    """The file, or the index of the files, that --source means.

    Raises:
        InputError: there is none, or the folder does not hold just one.
    """
    if os.path.isdir(given):  # Path.is_dir raises where a name is too long or a folder may not be read
        return _checkpoint_in(Path(given))
    if not os.path.isfile(given):
        raise InputError(  # as it was given: a Path would take a slash from a URL
            f"--source={given}: no such file; give a file or folder on this machine, such as the checkpoint that you "
            "downloaded"
        )
    return Path(given)


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Read all its files once, in constant memory, check them where they can be, and hash them.

    Returns:
        sha256 of the file; of several, what `sha256sum model-0* | sha256sum` prints: that of their own, in the order of
        their names.

    Raises:
        InputError: a file cannot be read, or a PyTorch file differs from the checksums within it.
    """
    hashes = {file.name: _sha256(file) for file in checkpoint.files}
    for file in checkpoint.files:
        _require_own_checksums(file)
    if len(checkpoint.files) == 1:
        return hashes[checkpoint.files[0].name]
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def require_other(output: Path, sources: Iterable[Path]) -> None:
    """Raise an InputError if writing `output` would replace one of the files that it is made from."""
    if os.path.exists(output) and any(os.path.samefile(output, source) for source in sources):
        raise InputError(f"--output={output}: is the source itself; choose another --output")


# --- files -----------------------------------------------------------------------------------------------------------


def _checkpoint_in(folder: Path) -> Path:
    """The one checkpoint in a folder, such as that of a downloaded Hugging Face repository."""
    indices = sorted(folder.glob("*.index.json"))
    shards = {name for index in indices for name in _shard_of(index).values()}
    files = sorted(path for ending in ("safetensors", "pth", "bin") for path in folder.glob(f"[!.]*.{ending}"))
    found = indices + [path for path in files if path.name not in shards]
    if not found:
        raise InputError(
            f"--source={folder}: holds no checkpoint (*.safetensors, *.pth, *.bin or their *.index.json); give one"
        )
    if shards := [path.name for path in found if SHARD.search(path.name)]:
        raise InputError(
            f"--source={folder}: holds shards ({some(shards)}) without their *.index.json; download that too, or give "
            "one whole file"
        )
    if sorted(path.name.removesuffix(".index.json") for path in found) == HUGGING_FACE_FILES:
        taken, left = sorted(found)  # two forms of the same weights, as Hugging Face's repositories may have them
        log.info("%s: took %s; %s beside it was left", folder, taken.name, left.name)
        return taken
    if len(found) > 1:
        raise InputError(
            f"--source={folder}: holds {len(found)} checkpoints ({some([path.name for path in found])}); give one"
        )
    return found[0]


def _kind(path: Path) -> Literal["index", "safetensors", "torch archive", "old torch"]:
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise _unreadable(path, error) from error
    # a length below 2^40, then JSON; before all else, for a length may begin with the bytes of anything
    if start[5:9] == b"\0\0\0{":
        return "safetensors"
    text = start.lstrip().lower()
    if text.startswith((b"<", b"version https://git-lfs")):
        raise InputError(
            f"{path}: a web page or a pointer saved in place of the checkpoint; download the file itself again"
        )
    if text.startswith(b"{"):
        return "index"
    if start.startswith(b"PK\x03\x04"):
        return "torch archive"
    if start.startswith(b"\x80"):
        return "old torch"
    raise InputError(f"{path}: neither a PyTorch nor a safetensors checkpoint, or damaged; download it again")


def _open_shards(index: Path) -> Checkpoint:
    shard_of = _shard_of(index)
    files = [index.parent / name for name in sorted(set(shard_of.values()))]
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        raise InputError(
            f"{index}: missing: {len(missing)} of its {len(files)} shards ({some(missing)}); download into "
            f"{index.parent} what is missing"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        held = _open_file(file)
        named = {name for name, shard in shard_of.items() if shard == file.name}
        if lost := sorted(named - set(held)):
            raise InputError(
                f"{file}: lacks {len(lost)} of what {index.name} places in it ({some(lost)}); download both again"
            )
        if unnamed := sorted(set(held) - named):
            raise InputError(
                f"{file}: has {len(unnamed)} that {index.name} does not name ({some(unnamed)}); download both again"
            )
        tensors |= held
    return Checkpoint(index, tuple(files), tensors)


def _shard_of(index: Path) -> dict[str, str]:
    """Tensor -> the file, beside the index, that holds it."""
    try:
        shard_of = json.loads(index.read_bytes())["weight_map"]
        if all(Path(shard).name == shard and shard not in ("", "..") for shard in shard_of.values()):
            return dict(shard_of)
    except OSError as error:
        raise _unreadable(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"{index}: damaged, or not the index of a checkpoint's shards; download it again")


def _open_file(path: Path, under: str = "") -> dict[str, Tensor]:
    kind = _kind(path)
    if kind == "index":
        raise InputError(f"{path}: an index in place of a checkpoint; download the file itself again")
    if kind == "safetensors":
        return _open_safetensors(path)
    return _open_torch(path, archive=kind == "torch archive", under=under)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror or error}); mend that, or download it again")


def _cause(error: Exception) -> str:
    """The first sentence of what an exception says; what it is, where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.split(". ")[0]


# --- safetensors -----------------------------------------------------------------------------------------------------

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            tensors = {
                name: Tensor(
                    tuple(header.get_shape()),
                    _SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype()),
                    partial(_read_safetensors, path, name),
                )
                for name, header in headers.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); download it again") from error
    if metadata.get("format") == FORMAT:
        raise InputError(
            f"{path}: converted already; load_backbone reads it, --to-torch converts it back, and --verify checks it "
            "as --output"
        )
    return tensors


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    try:
        # opened anew each time: an open file's pages, once read, would stay in memory
        with safe_open(path, framework="numpy") as file:
            array = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {name} cannot be read ({error}); download it again") from error
    return _finite(path, name, array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array)


def _finite(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name} holds numbers that are not finite (NaN or infinite); download it again")
    return array


# --- PyTorch ---------------------------------------------------------------------------------------------------------

# What stands beside the weights may be numbers of NumPy's, such as losses; by these names and no others they are read.
_NUMPY_NUMBERS = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "?")),
    codecs.encode,
]

RELEASED_ONE = "give the file of weights that was released"

OLDEST_TORCH = (2, 10)  # before it a file can corrupt memory in spite of weights_only=True (CVE-2026-24747)
INSTALL_TORCH = "pip install 'torch>=2.10'"


def require_torch(what: str) -> ModuleType:
    """The module; nothing else here needs it.

    Args:
        what: needs it, for the message.

    Raises:
        InputError: it is not installed, too old, or cannot be imported.
    """
    try:
        import torch
    except Exception as error:  # its own libraries fail in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise InputError(f"{what} needs torch, which is not installed: {INSTALL_TORCH}") from error
        raise InputError(
            f"{what} needs torch, which is installed but cannot be imported ({_cause(error)}): "
            f"{INSTALL_TORCH} --force-reinstall"
        ) from error
    version = torch.__version__  # such as 2.13.0+cpu
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise InputError(f"{what} needs torch, but {version} is too old to read files safely: {INSTALL_TORCH}")
    return torch


def _open_torch(path: Path, archive: bool, under: str) -> dict[str, Tensor]:
    torch = require_torch(f"{path}: a PyTorch file, and reading it")
    plain_numbers = torch.serialization.safe_globals(_NUMPY_NUMBERS if under else [])
    try:
        with warnings.catch_warnings(action="ignore"), plain_numbers:  # torch warns of old pickles, then refuses them
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: not a plain file of weights: it is no checkpoint, or loading it would run code from it; "
            "nothing was run. Download the released weights again; or, if the file is your own, save its state dict "
            "alone: torch.save(model.state_dict(), 'new.pth')"
        ) from error
    except Exception as error:  # torch's unpickler lets many kinds escape on bytes that are no checkpoint
        cause = _cause(error)
        quoted = "" if cause.startswith("PytorchStreamReader") else f" ({cause})"  # that is of torch's own parts
        raise InputError(
            f"{path}: truncated, damaged or no checkpoint, unless memory or the disk failed{quoted}; download it again"
        ) from error
    if under and isinstance(state, Mapping) and isinstance(state.get(under), Mapping):
        state = state[under]
    _require_state_dict(path, state, torch.Tensor)
    return {
        name: Tensor(tuple(value.shape), _torch_dtype(value), partial(_read_torch, path, name, value))
        for name, value in state.items()
    }


def _require_state_dict(path: Path, state: object, tensor: type) -> None:
    if not isinstance(state, Mapping):
        raise InputError(
            f"{path}: not a state dict (a mapping of names to tensors) but a {type(state).__name__}; {RELEASED_ONE}"
        )
    others = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, tensor))]
    for name in others:
        value = state[name]
        if isinstance(value, Mapping) and any(isinstance(part, tensor) for part in value.values()):
            raise InputError(
                f"{path}: not a state dict, but something around one, which stands under {name!r}; save that alone: "
                f"torch.save(torch.load({str(path)!r}, weights_only=True)[{name!r}], 'new.pth')"
            )
    if others:
        raise InputError(
            f"{path}: not a state dict (a mapping of names to tensors): has {some(map(repr, others))}; {RELEASED_ONE}"
        )


def _torch_dtype(value: torch.Tensor) -> str:
    plain = str(value.layout) == "torch.strided" and value.device.type == "cpu"
    return str(value.dtype if plain else value.layout).removeprefix("torch.")


def _read_torch(path: Path, name: str, value: torch.Tensor) -> np.ndarray:
    value = value.detach()
    return _finite(path, name, (value.float() if _torch_dtype(value) == "bfloat16" else value).numpy())


def _require_own_checksums(path: Path) -> None:
    """PyTorch notes a checksum of each part of its archives, but does not look at it again."""
    if _kind(path) != "torch archive":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            written_without = not any(part.CRC for part in archive.infolist())
            damaged = None if written_without else archive.testzip()
    except Exception as error:  # zipfile and what unpacks for it let many kinds escape
        raise InputError(f"{path}: damaged ({_cause(error)}); download it again") from error
    if damaged:
        raise InputError(f"{path}: damaged ({damaged} differs from its checksum); download it again")


# --- both ------------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, progress(f"hashing {path.name}", path.stat().st_size) as bar:
            while block := file.read(1 << 22):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def progress(what: str, size: int) -> tqdm:
    """A bar over `size` bytes on a terminal; nothing elsewhere."""
    return tqdm(
        desc=what,
        total=size,
        leave=False,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=not sys.stderr.isatty(),
    )


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    first = list(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")
