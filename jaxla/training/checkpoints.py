"""Checkpoints of a run, by Orbax: `checkpoints/latest` (everything training goes on from) and `checkpoints/best`.

A checkpoint counts once `<step>.sha256` stands beside it, the sums of its files, by which one that was damaged later is
known too. Two of each kind are kept: should the newer one be damaged, there is the one before it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxla.cli.files import file_sha256, free_bytes, write_atomically
from jaxla.config import InputError
from jaxla.distributed import barrier, broadcast, is_first

T = TypeVar("T")

log = logging.getLogger(__name__)


class Checkpoints:
    """The newest two checkpoints of one kind, by their step; an older one goes only once a newer one is complete.

    Of several processes each must call what the others call: all of them write and read a checkpoint's arrays, the
    first alone its sums, and what there is is what the first one sees.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, read_only=read_only, create=not read_only
        )
        self._folder = folder.absolute()
        if not read_only and is_first():
            self._remove_half_written()
        barrier()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, trees: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Save named pytrees of arrays, and a JSON-like record, unless this step was saved before.

        Raises:
            InputError: the disk is full or refuses; what was saved before is kept.
        """
        if step in self.steps():
            return
        arrays = {name: ocp.args.StandardSave(_by_name(tree)) for name, tree in trees.items()}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(trees)))
        try:
            if is_first() and free_bytes(self._folder) < size:  # Orbax's own report of a full disk fills the screen
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            saved = self._manager.save(
                step, args=ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(dict(progress)))
            )
            assert saved, f"{self._folder}: step {step} is not beyond {self.steps()}"
            if is_first():
                write_atomically(self._sums_file(step), json.dumps(_sums(self._folder / str(step))))
                self._forget_sums()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "os_error_code" not in str(error):  # TensorStore's word for an OSError
                raise
            if is_first():
                self._remove_half_written()
            reason = getattr(error, "strerror", None) or str(error).split(": ")[-1]
            raise InputError(
                f"{self._folder / str(step)}: cannot be written ({reason}); the checkpoints before it are kept: "
                "mend that and go on with --resume"
            ) from error
        barrier()  # none leaves before the checkpoint counts

    def steps(self) -> list[int]:
        return broadcast(checkpoint_steps(self._folder))

    def damage(self, step: int) -> str:
        """The first thing wrong with a checkpoint's files; empty if it is whole."""
        return broadcast(self._damage(step) if is_first() else "")

    def _damage(self, step: int) -> str:
        try:
            expected = json.loads(self._sums_file(step).read_text())
            found = _sums(self._folder / str(step))
        except OSError as error:  # not damage: it may be readable tomorrow
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except ValueError:
            return f"{self._sums_file(step).name} is unreadable"
        if not isinstance(expected, dict):
            return f"{self._sums_file(step).name} is unreadable"
        wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
        return f"{wrong[0]} is missing or has changed" if wrong else ""

    def restore(self, like: Mapping[str, T], step: int) -> tuple[dict[str, T], dict[str, Any]]:
        """The trees of `like`, which gives their structure, shapes and dtypes, and the record.

        Raises:
            InputError: the checkpoint is damaged.
        """
        if damage := self.damage(step):
            raise InputError(f"{self._folder / str(step)}: damaged checkpoint, {damage}; restore it from a copy")
        arrays = {name: ocp.args.StandardRestore(_by_name(tree)) for name, tree in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arrays, progress=ocp.args.JsonRestore()))
        trees = {name: _from_names(tree, restored[name]) for name, tree in like.items()}
        return trees, restored["progress"]

    def newest_whole(self) -> int | None:
        """The step of the newest checkpoint that is whole; damaged ones after it are named in the log and removed."""
        for step in self.steps():
            if not (damage := self.damage(step)):
                return step
            self.remove(step)
            instead = "the one before it is used" if self.steps() else "there is none before it"
            if is_first():
                log.warning("%s: damaged checkpoint, %s; %s", self._folder / str(step), damage, instead)
        return None

    def remove(self, step: int) -> None:
        if is_first():
            self._sums_file(step).unlink()  # first, for without it the rest counts as half-written
        if broadcast(step in self._manager.all_steps()):
            self._manager.delete(step)

    def close(self) -> None:
        self._manager.close()

    def _sums_file(self, step: int | str) -> Path:
        return self._folder / f"{step}.sha256"

    def _forget_sums(self) -> None:
        for step in set(checkpoint_steps(self._folder)) - set(self._manager.all_steps()):
            self._sums_file(step).unlink()

    def _remove_half_written(self) -> None:
        unsummed = [
            path for path in self._folder.glob("[0-9]*") if path.is_dir() and not self._sums_file(path.name).exists()
        ]
        if len([path for path in unsummed if path.name.isdecimal()]) > 1:  # one at most is being written
            raise InputError(f"{self._folder}: the .sha256 files of its checkpoints are missing; put them back")
        for path in unsummed:
            log.warning("%s: half-written checkpoint, removed", path)
            shutil.rmtree(path)
        for unfinished in self._folder.glob(".*.sha256"):
            unfinished.unlink()
        for sums in self._folder.glob("[0-9]*.sha256"):
            if not sums.with_suffix("").is_dir():  # it was being removed
                sums.unlink()


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder that were written to the end, the newest first."""
    return sorted((int(path.stem) for path in folder.glob("[0-9]*.sha256")), reverse=True)


def network_state(trainable: Any, statistics: Any) -> dict[str, Any]:
    """Return the part of a network that a checkpoint holds. A frozen backbone has its own file."""
    return {"trainable": trainable, "statistics": statistics}


def _sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file under a folder."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def _by_name(tree: Any) -> dict[str, jax.Array]:
    # flat, because Orbax gives integer keys back as strings
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in _leaves(tree)} or {"": 0}


def _from_names(like: T, named: Mapping[str, jax.Array]) -> T:
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in _leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in names])


def _leaves(tree: Any) -> list:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
