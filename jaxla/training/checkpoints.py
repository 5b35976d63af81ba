"""Checkpoints in Orbax's format, each with a file of hashes that shows that it is complete and undamaged.

`<step>.sha256` beside a checkpoint's folder holds the hashes of its files. It is written last: a checkpoint without it
is half-written. The newest two checkpoints are kept, so that the older one can replace a damaged one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxla.cli.files import file_sha256, free_bytes, is_leftover, write_atomically
from jaxla.config import InputError, option
from jaxla.distributed import barrier, broadcast, is_first

T = TypeVar("T")

log = logging.getLogger(__name__)


@contextmanager
def _silence_warnings(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _LiteralPath(type(epath.Path("."))):
    """A path that Orbax accepts, in which `[`, `*` and `?` are ordinary characters.

    Orbax's default class treats the whole path as a pattern when it lists files, so that it does not find the arrays
    that it has written, or finds those of another folder.
    """

    def glob(self, pattern: str) -> Iterator[_LiteralPath]:
        return map(type(self), Path(self).glob(pattern))


def require_usable_path(folder: Path) -> None:
    """Raise an InputError if the path of `folder` makes Orbax write to another place."""
    path = f"{folder.absolute().as_posix()}/"
    if "\\" in path:
        problem = "Orbax treats the backslash in this path as a slash"
    elif "gs:/" in path or re.match("/(gs|s3|az|hf)/", path):
        problem = "Orbax treats this path as a remote store"
    else:
        return
    fix = "Use a folder outside /gs, /s3, /az and /hf whose path has no backslash and no name that ends in gs:."
    raise InputError(folder, problem, fix)


class Checkpoints:
    """The newest two checkpoints in a folder, by step. An older one is removed only once a newer one is complete.

    Every process must call the same methods: all of them write and read a checkpoint's arrays, but only the first
    writes hashes and lists the folder.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        require_usable_path(folder)
        self._folder = folder.absolute()
        if not read_only and is_first():
            self._remove_half_written()
        barrier()
        with _silence_warnings("absl"):  # Orbax warns about what `read_only` means
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, read_only=read_only, create=not read_only
            )
            self._manager = ocp.CheckpointManager(_LiteralPath(self._folder), options=options)

    def save(self, step: int, trees: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Save named pytrees of arrays and a JSON-like record, unless this step was saved before.

        Raises:
            InputError: the disk is full or cannot be written, or the checkpoint cannot be read back; earlier
                checkpoints are kept.
        """
        if step in self.steps():
            return
        arrays = {name: ocp.args.StandardSave(_flatten(tree)) for name, tree in trees.items()}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(trees)))
        try:
            if is_first() and free_bytes(self._folder) < size:  # Orbax's error about a full disk fills the screen
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            saved = self._manager.save(
                step, args=ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(dict(progress)))
            )
            assert saved, f"{self._folder}: step {step} does not follow {self.steps()}"
            if is_first():
                self._require_readable(step, arrays)
                write_atomically(self._hash_file(step), json.dumps(_hash_files(self._folder / str(step))))
                for old in set(checkpoint_steps(self._folder)) - set(self._manager.all_steps()):
                    self._hash_file(old).unlink()  # hashes of a checkpoint that Orbax has removed
        except (OSError, ValueError) as error:
            os_error = error if isinstance(error, OSError) else _find_os_error(error)
            if is_first():
                self._remove_half_written()
            if os_error is None:
                raise
            problem = f"cannot be written ({os_error.strerror or os_error}); earlier checkpoints are kept"
            fix = f"Fix this and rerun with {option('resume')}."
            raise InputError(self._folder / str(step), problem, fix) from error
        barrier()  # no process continues before the checkpoint is complete

    def _require_readable(self, step: int, arrays: Mapping[str, ocp.args.StandardSave]) -> None:
        """Raise an InputError unless Orbax finds every array that it has just saved. Reads no values."""
        try:
            found = self._manager.item_metadata(step)
            is_complete = all(name in found and set(found[name]) == set(saved.item) for name, saved in arrays.items())
        except ValueError as error:
            if _find_os_error(error):
                raise
            is_complete = False
        if not is_complete:
            problem = "was written, but cannot be read back; earlier checkpoints are kept"
            fix = f"Copy the run to another disk and rerun there with {option('resume')}."
            raise InputError(self._folder / str(step), problem, fix)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        return broadcast(checkpoint_steps(self._folder))

    def find_damage(self, step: int) -> str:
        """Return a description of the damage to a checkpoint's files; "" if it is intact."""
        return broadcast(self._find_damage(step) if is_first() else "")

    def _find_damage(self, step: int) -> str:
        hash_file = self._hash_file(step)
        try:
            expected = json.loads(hash_file.read_text())
            found = _hash_files(self._folder / str(step))
        except OSError as error:  # not damage: the disk may work again later
            problem = f"cannot be read ({error.strerror})"
            raise InputError(error.filename, problem, "Make the file readable, and try again.") from error
        except ValueError:
            expected = None
        if not isinstance(expected, dict):
            return f"{hash_file.name} is unreadable"
        wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
        return f"{wrong[0]} is missing or has changed" if wrong else ""

    def restore(self, like: Mapping[str, T], step: int) -> tuple[dict[str, T], dict[str, Any]]:
        """Return a checkpoint's trees, with the structure, shapes and dtypes of `like`, and its record.

        Raises:
            InputError: the checkpoint is damaged, or belongs to a different network.
        """
        if damage := self.find_damage(step):
            raise InputError(
                self._folder / str(step), f"damaged checkpoint ({damage})", "Restore this folder from a backup."
            )
        arrays = {name: ocp.args.StandardRestore(_flatten(tree)) for name, tree in like.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**arrays, progress=ocp.args.JsonRestore()))
        except (ValueError, KeyError) as error:  # intact files of other arrays, or files that Orbax never merged
            problem = f"does not contain the arrays of this network ({' '.join(str(error).split())[:200]})"
            fix = "Restore the run from a backup, or train again."
            raise InputError(self._folder / str(step), problem, fix) from error
        trees = {name: _unflatten(tree, restored[name]) for name, tree in like.items()}
        return trees, restored["progress"]

    def find_newest_intact(self) -> int:
        """Return the step of the newest intact checkpoint, or 0; log a warning for each newer, damaged one."""
        steps = self.steps()
        for step in steps:
            if not (damage := self.find_damage(step)):
                return step
            replacement = "there is no earlier one" if step == steps[-1] else "the previous one is used"
            if is_first():
                log.warning("%s: damaged checkpoint (%s); %s", self._folder / str(step), damage, replacement)
        return 0

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                self.remove(later)

    def remove(self, step: int) -> None:
        """Remove a checkpoint."""
        if is_first():
            self._hash_file(step).unlink()  # first, because a checkpoint without it counts as half-written
        if broadcast(step in self._manager.all_steps()):
            self._manager.delete(step)

    def close(self) -> None:
        self._manager.close()

    def _hash_file(self, step: int | str) -> Path:
        return self._folder / f"{step}.sha256"

    def _remove_half_written(self) -> None:
        """Remove the files of a process that was killed while it wrote or removed a checkpoint.

        Raises:
            InputError: several checkpoints lack their hashes, so the files of hashes were removed.
        """
        pattern = r"[0-9]+(\.orbax-checkpoint-tmp.*)?"  # not a user's copy, such as `4 (copy)`
        folders = [path for path in self._folder.glob("[0-9]*") if path.is_dir() and re.fullmatch(pattern, path.name)]
        half_written = [path for path in folders if not self._hash_file(path.name).exists()]
        if len([path for path in half_written if path.name.isdecimal()]) > 1:  # a process writes only one at a time
            raise InputError(self._folder, "the checkpoints' .sha256 files are missing", "Restore them from a backup.")
        for path in half_written:
            log.warning("%s: half-written checkpoint, removed", path)
            shutil.rmtree(path)
        for temporary in filter(is_leftover, self._folder.glob(".*.sha256")):
            temporary.unlink()
        for step in checkpoint_steps(self._folder):
            if not (self._folder / str(step)).is_dir():  # the checkpoint was being removed
                self._hash_file(step).unlink()


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, newest first."""
    steps = [path.stem for path in folder.glob("[0-9]*.sha256") if re.fullmatch(r"0|[1-9][0-9]*", path.stem)]
    return sorted(map(int, steps), reverse=True)


def network_state(trainable: Any, statistics: Any) -> dict[str, Any]:
    """Return the part of a network that a checkpoint holds; a frozen backbone has its own file."""
    return {"trainable": trainable, "statistics": statistics}


def _find_os_error(error: ValueError) -> OSError | None:
    """Return the OSError behind an error of TensorStore, which states the system's error number only in its text."""
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def _hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder, at any depth."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def _flatten(tree: Any) -> dict[str, Any]:
    return dict(zip(_leaf_names(tree), jax.tree.leaves(tree), strict=True)) or {"": 0}  # Orbax rejects empty trees


def _unflatten(like: T, leaves: Mapping[str, jax.Array]) -> T:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _leaf_names(like)])


def _leaf_names(tree: Any) -> list[str]:
    """Return dotted names of a tree's leaves, for a flat dict: Orbax turns integer keys into strings."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
