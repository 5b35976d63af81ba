"""List the tensors of a checkpoint in any supported file format; their values are read on demand.

A checkpoint is a PyTorch `.pth` or `.bin` file, a `.safetensors` file, several of either named by an index, or a folder
that contains one of these. Code in a file is never executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from convert_weights.tensors import Tensor, join_first, require_finite
from convert_weights.torch_file import open_torch_file, require_archive_checksums
from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import plural
from jaxla.config import InputError
from jaxla.models.weights_format import FORMAT

log = logging.getLogger("jaxla.convert_weights")

# Matches Hugging Face's names of shards, except "-00001-of-00001", which is a complete checkpoint.
SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.")

# Every Hugging Face repository uses these names; the index of shards has `.index.json` appended.
HUGGING_FACE_FILES = ["model.safetensors", "pytorch_model.bin"]

DOWNLOAD_AGAIN = "Download the file again."
FIX_OR_DOWNLOAD_AGAIN = "Fix this, or download the file again."


class Checkpoint(NamedTuple):
    """An opened checkpoint whose values are not read yet."""

    path: Path  # the file, or the index of the shards
    files: tuple[Path, ...]  # the files that contain tensors
    tensors: dict[str, Tensor]


def open_checkpoint(path: Path, state_dict_key: str = "") -> Checkpoint:
    """List the tensors of a checkpoint; the type of a file is recognised by its content.

    Args:
        state_dict_key: key of the state dict in a PyTorch file that contains more; a plain state dict is also accepted.

    Raises:
        InputError: the file is missing, damaged or incomplete, is not a checkpoint, would run code, or needs torch.
    """
    path = find_checkpoint(path)
    if _file_kind(path) == "index":
        return _open_shards(path)
    return Checkpoint(path, (path,), _open_file(path, state_dict_key))


def find_checkpoint(source: str | Path) -> Path:
    """Return the checkpoint file, or the index of shards, in --source; a folder must contain exactly one."""
    if os.path.isdir(source):  # Path.is_dir raises if a name is too long or a folder cannot be read
        return _find_in_folder(Path(source))
    if not os.path.isfile(source):
        # The message shows `source` as given: a Path would replace the // of a URL by /.
        fix = "Download the checkpoint and pass its file or folder."
        raise InputError(f"--source={source}", "no such file", fix)
    return Path(source)


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Return the sha256 of a checkpoint; PyTorch archives are also compared with their own checksums.

    The hash of several files is what `sha256sum model-0* | sha256sum` prints.
    """
    hashes = {file.name: _file_sha256(file) for file in checkpoint.files}
    for file in checkpoint.files:
        if _file_kind(file) == "torch archive":
            require_archive_checksums(file)
    if len(checkpoint.files) == 1:
        return hashes[checkpoint.files[0].name]
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def require_not_source(output: Path, sources: Iterable[Path]) -> None:
    """Raise an InputError if writing `output` would replace one of its sources."""
    if os.path.exists(output) and any(os.path.samefile(output, source) for source in sources):
        raise InputError(f"--output={output}", "is the source itself", "Choose another --output.")


def _find_in_folder(folder: Path) -> Path:
    """Return the only checkpoint in a folder, such as a downloaded Hugging Face repository."""
    where = f"--source={folder}"
    indices = sorted(folder.glob("*.index.json"))
    indexed = {name for index in indices for name in _read_index(index).values()}
    files = sorted(path for suffix in ("safetensors", "pth", "bin") for path in folder.glob(f"[!.]*.{suffix}"))
    found = indices + [path for path in files if path.name not in indexed]
    if not found:
        problem = "contains no checkpoint (*.safetensors, *.pth, *.bin or their *.index.json)"
        raise InputError(where, problem, "Pass the folder or file of a checkpoint.")
    if shards := [path.name for path in found if SHARD.search(path.name)]:
        problem = f"contains shards ({join_first(shards)}) without their *.index.json"
        raise InputError(where, problem, "Download the index too, or pass a checkpoint that is a single file.")
    if sorted(path.name.removesuffix(".index.json") for path in found) == HUGGING_FACE_FILES:
        used, ignored = sorted(found)  # the same weights in two formats
        log.info("%s: using %s, ignoring %s", folder, used.name, ignored.name)
        return used
    if len(found) > 1:
        names = join_first(path.name for path in found)
        raise InputError(where, f"contains {len(found)} checkpoints ({names})", "Pass one of these files.")
    return found[0]


def _file_kind(path: Path) -> Literal["index", "safetensors", "torch archive", "old torch"]:
    with report_os_errors("read", path, FIX_OR_DOWNLOAD_AGAIN), path.open("rb") as file:
        start = file.read(256)
    # A header length below 2^40, then JSON. This test comes first: a length can begin with the bytes of any other kind.
    if start[5:9] == b"\0\0\0{":
        return "safetensors"
    text = start.lstrip().lower()
    if text.startswith((b"<", b"version https://git-lfs")):
        raise InputError(path, "a web page or a Git LFS pointer, not a checkpoint", DOWNLOAD_AGAIN)
    if text.startswith(b"{"):
        return "index"
    if start.startswith(b"PK\x03\x04"):
        return "torch archive"
    if start.startswith(b"\x80"):
        return "old torch"
    raise InputError(path, "neither a PyTorch nor a safetensors checkpoint, or damaged", DOWNLOAD_AGAIN)


def _open_shards(index: Path) -> Checkpoint:
    shard_names = _read_index(index)
    files = [index.parent / name for name in sorted(set(shard_names.values()))]
    if missing := [file.name for file in files if not os.path.isfile(file)]:
        problem = f"lacks {len(missing)} of its {len(files)} shards ({join_first(missing)})"
        raise InputError(index, problem, f"Download them into {index.parent}.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _open_file(file)
        expected = {name for name, shard in shard_names.items() if shard == file.name}
        if missing := sorted(expected - set(found)):
            problem = f"lacks {plural(len(missing), 'tensor')} that {index.name} lists ({join_first(missing)})"
            raise InputError(file, problem, "Download both files again.")
        if extra := sorted(set(found) - expected):
            problem = f"contains {plural(len(extra), 'tensor')} that {index.name} does not list ({join_first(extra)})"
            raise InputError(file, problem, "Download both files again.")
        tensors |= found
    return Checkpoint(index, tuple(files), tensors)


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> file name of its shard, which is in the folder of the index."""
    with report_os_errors("read", index, FIX_OR_DOWNLOAD_AGAIN):
        text = index.read_bytes()
    try:
        shard_names = json.loads(text)["weight_map"]
        if all(Path(shard).name == shard and shard not in ("", "..") for shard in shard_names.values()):
            return dict(shard_names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(index, "damaged, or not the index of a checkpoint's shards", DOWNLOAD_AGAIN)


def _open_file(path: Path, state_dict_key: str = "") -> dict[str, Tensor]:
    match _file_kind(path):
        case "index":
            raise InputError(path, "an index of shards, not a shard", DOWNLOAD_AGAIN)
        case "safetensors":
            return _open_safetensors(path)
        case kind:
            return open_torch_file(path, kind == "torch archive", state_dict_key)


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
        raise InputError(path, f"truncated or damaged ({error})", DOWNLOAD_AGAIN) from error
    if metadata.get("format") == FORMAT:
        others = "To convert this file back, use --to-torch. To check it, use --verify and --output."
        raise InputError(path, "already converted", f"Pass the released checkpoint. {others}")
    return tensors


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    try:
        # Opened for each tensor: the pages of an open file stay in memory once they are read.
        with safe_open(path, framework="numpy") as file:
            array = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"{name} cannot be read ({error})", DOWNLOAD_AGAIN) from error
    return require_finite(path, name, array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with (
        report_os_errors("read", path, FIX_OR_DOWNLOAD_AGAIN),
        path.open("rb") as file,
        progress_bar(f"hashing {path.name}", path.stat().st_size) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def progress_bar(label: str, size: int) -> tqdm:
    """Return a progress bar over `size` bytes, which is shown on a terminal only."""
    return tqdm(desc=label, total=size, leave=False, unit="B", unit_scale=True, disable=None)
