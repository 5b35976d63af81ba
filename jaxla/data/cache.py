"""The cache folder that all runs share: what lies in it, whether a run uses it, and how it is cleared."""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from jaxla.cli.files import report_os_errors
from jaxla.config import InputError

KINDS = {  # folder -> what lies there
    "volumes": "prepared volumes",
    "planned": "volumes resampled for nnU-Net",
    "features": "features of frozen backbones",
    "phantoms": "synthetic scans",
    "weights": "converted weights",
    "downloads": "released checkpoints as they were fetched",
}
# what is made or fetched again; weights are the user's own
CLEARED = ("volumes", "planned", "features", "phantoms", "downloads")


@dataclass(frozen=True)
class Entry:
    """One folder or file of the cache."""

    kind: str
    path: Path
    size: int
    says: str


@contextmanager
def in_use(cache_dir: Path) -> Iterator[None]:
    """Keep the cache from being cleared while this process reads it."""
    users = cache_dir / "in-use"
    mine = users / f"{uuid.uuid4().hex[:8]}.{platform.node()}-{os.getpid()}.lock"
    lock = FileLock(mine)  # the operating system's: a killed process holds it no longer
    with report_os_errors("written", users, "choose another by --cache-dir or XDG_CACHE_HOME"):
        users.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        mine.unlink(missing_ok=True)


def cache_entries(cache_dir: Path) -> list[Entry]:
    """Everything in the cache: features by backbone, volumes together, phantoms by set, the others by file.

    Raises:
        InputError: it is no folder.
    """
    if cache_dir.exists() and not cache_dir.is_dir():
        raise InputError(f"--cache-dir={cache_dir}: is a file; give a folder")
    entries = []
    for kind in KINDS:
        folder = cache_dir / kind
        children = sorted(folder.iterdir()) if folder.is_dir() else []
        children = [child for child in children if child.suffix != ".lock"]  # empty; a download's may stay
        if kind in ("volumes", "planned"):
            whole = [c for c in children if not c.name.startswith(".")]
            if whole:
                entries.append(Entry(kind, folder, sum(map(_size, whole)), f"{len(whole)} volumes"))
            children = [c for c in children if c.name.startswith(".")]
        entries += [Entry(kind, child, _size(child), _says(child)) for child in children]
    return entries


def clear_cache(cache_dir: Path, kind: str) -> list[Entry]:
    """Remove all entries of a kind (`all`: every kind in `CLEARED`); returns what was removed.

    Raises:
        InputError: a run uses the cache, or something cannot be removed.
    """
    for mark in (cache_dir / "in-use").glob("*.lock"):
        try:
            with FileLock(mark, timeout=0):
                pass
            mark.unlink(missing_ok=True)
        except Timeout as error:
            process = mark.stem.split(".", 1)[-1]  # host and process id
            raise InputError(
                f"--cache-dir={cache_dir}: process {process} uses it; clear it when that run has ended"
            ) from error
        except OSError as error:
            raise InputError(f"{mark}: cannot be opened ({error.strerror}); another user's run may use it") from error
    kinds = CLEARED if kind == "all" else (kind,)
    removed = [entry for entry in cache_entries(cache_dir) if entry.kind in kinds]
    for child in [path for each in kinds if (cache_dir / each).is_dir() for path in (cache_dir / each).iterdir()]:
        try:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        except OSError as error:
            raise InputError(f"{error.filename or child}: cannot be removed ({error.strerror or error})") from error
    return removed


def _says(path: Path) -> str:
    if path.name.startswith("."):
        return "left half-written by a process that was killed"
    if path.suffix == ".part":
        return f"{path.stem}, as far as it was fetched"
    try:
        of = json.loads((path / "backbone.json").read_text())
        volumes = len(list(path.glob("*.npy")))
        return f"{of['arch']}, {of['image_size']} px, {of['dtype']}, {volumes} volumes: {of['features']}"
    except (OSError, ValueError, KeyError, TypeError):  # not features, or damaged ones: it can be cleared all the same
        return path.name


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
