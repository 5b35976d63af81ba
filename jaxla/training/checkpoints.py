"""Checkpoints of a run, by Orbax: `checkpoints/latest` (everything training goes on from) and `checkpoints/best`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxla.config import InputError

T = TypeVar("T")


class Checkpoints:
    """The newest checkpoint of one kind; the older one goes only once the newer one is complete."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, read_only=read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, epoch: int, trees: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Save named pytrees of arrays, and a JSON-like record."""
        arrays = {name: ocp.args.StandardSave(_by_name(tree)) for name, tree in trees.items()}
        self._manager.save(epoch, args=ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(dict(progress))))

    def restore(self, like: Mapping[str, T]) -> tuple[dict[str, T], dict[str, Any]]:
        """The trees of `like`, which gives their structure, shapes and dtypes, and the record.

        Raises:
            InputError: there is no complete checkpoint.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            raise InputError(f"{self._manager.directory}: no checkpoint; the run stopped before its first epoch ended")
        arrays = {name: ocp.args.StandardRestore(_by_name(tree)) for name, tree in like.items()}
        restored = self._manager.restore(epoch, args=ocp.args.Composite(**arrays, progress=ocp.args.JsonRestore()))
        trees = {name: _from_names(tree, restored[name]) for name, tree in like.items()}
        return trees, restored["progress"]

    def close(self) -> None:
        self._manager.close()


def _by_name(tree: Any) -> dict[str, jax.Array]:
    # flat, because Orbax gives integer keys back as strings
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in _leaves(tree)} or {"": 0}


def _from_names(like: T, named: Mapping[str, jax.Array]) -> T:
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in _leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in names])


def _leaves(tree: Any) -> list:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
