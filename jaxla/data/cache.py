"""The cache folder that all runs share: what it holds, whether a process uses it, and how to clear it."""

import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import plural
from jaxla.config import InputError, option

KINDS = {  # folder -> its content
    "volumes": "prepared volumes",
    "planned": "volumes resampled for nnU-Net",
    "features": "features of frozen backbones",
    "phantoms": "synthetic scans",
    "compiled": "compiled programs",
    "weights": "converted weights",
    "downloads": "released checkpoints as downloaded",
}
# Entries of these kinds are computed or downloaded again when needed. Weights may be the user's own.
CLEARABLE = ("volumes", "planned", "features", "phantoms", "compiled", "downloads")


class CacheEntry(NamedTuple):
    """A file or folder in the cache, or all volumes of one kind; `size` in bytes."""

    kind: str
    size: int
    description: str


@contextmanager
def mark_cache_in_use(cache_dir: Path) -> Iterator[None]:
    """Keep the cache from being cleared while this process uses it."""
    marks = cache_dir / "in-use"
    mark = marks / f"{uuid.uuid4().hex[:8]}.{platform.node()}-{os.getpid()}.lock"
    lock = FileLock(mark)  # the operating system releases it if the process is killed
    with report_os_errors("written", marks, f"Set {option('cache-dir')} or XDG_CACHE_HOME to another folder."):
        marks.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        mark.unlink(missing_ok=True)


def list_cache(cache_dir: Path) -> list[CacheEntry]:
    """Return one entry for all volumes of a kind, and one for every other file or folder in the cache."""
    if cache_dir.exists() and not cache_dir.is_dir():
        raise InputError(option("cache-dir", cache_dir), "is a file, not a folder", "Pass a folder.")
    entries = []
    for kind in KINDS:
        folder = cache_dir / kind
        children = sorted(folder.iterdir()) if folder.is_dir() else []
        children = [child for child in children if child.suffix != ".lock"]  # empty files, left by downloads
        if kind in ("volumes", "planned"):
            if volumes := [c for c in children if not c.name.startswith(".")]:
                entries.append(CacheEntry(kind, sum(map(_size, volumes)), f"{len(volumes)} volumes"))
            children = [c for c in children if c.name.startswith(".")]
        entries += [CacheEntry(kind, _size(child), _describe(child)) for child in children]
    return entries


def clear_cache(cache_dir: Path, kind: str) -> list[CacheEntry]:
    """Remove all entries of a kind, or with `all` every kind in `CLEARABLE`, and return them.

    Raises:
        InputError: a process uses the cache, or something cannot be removed.
    """
    for mark in (cache_dir / "in-use").glob("*.lock"):
        try:
            with FileLock(mark, timeout=0):
                pass
            mark.unlink(missing_ok=True)
        except Timeout as error:
            where = option("cache-dir", cache_dir)
            process = mark.stem.split(".", 1)[-1]  # host and process id
            raise InputError(where, f"process {process} uses it", "Clear it when that process has finished.") from error
        except OSError as error:
            problem = f"cannot be opened ({error.strerror}); another user's process may use the cache"
            raise InputError(mark, problem, "Clear the cache as that user.") from error
    kinds = CLEARABLE if kind == "all" else (kind,)
    removed = [entry for entry in list_cache(cache_dir) if entry.kind in kinds]
    for child in [path for name in kinds for path in (cache_dir / name).glob("*")]:
        try:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        except OSError as error:
            problem = f"cannot be removed ({error.strerror or error})"
            raise InputError(error.filename or child, problem, "Clear the cache as the owner of its files.") from error
    return removed


def _describe(path: Path) -> str:
    if path.name.startswith("."):
        return "incomplete, from a killed process"
    if path.parent.name == "compiled":
        return f"{plural(len(list(path.glob('*-cache'))), 'program')} for one kind of processor"
    if path.suffix == ".part":
        return f"{path.stem}, partly downloaded"
    try:
        backbone = json.loads((path / "backbone.json").read_text())
        network = f"{backbone['arch']}, {backbone['image_size']} px, {backbone['dtype']}"
        return f"{network}, {len(list(path.glob('*.npy')))} volumes: {backbone['features']}"
    except (OSError, ValueError, KeyError, TypeError):  # not features, or damaged, which can still be cleared
        return path.name


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
