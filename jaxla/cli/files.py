"""Files on disk: written whole or not at all, locked against other processes, hashed; and the room for them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from jaxla.config import InputError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def report_os_errors(done: str, what: object, mend: str = "") -> Iterator[None]:
    """Within it what the system does not allow is an InputError: `what` cannot be `done` (written, read), and why."""
    try:
        yield
    except OSError as error:
        # NumPy's errors of a full disk tell no reason
        reason = error.strerror or ("the disk is full" if done == "written" else error)
        raise InputError(f"{what}: cannot be {done} ({reason}){mend and f'; {mend}'}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its name once it is whole; of a failed one nothing remains.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{uuid.uuid4().hex}.{path.name}")  # another's, on any host, has another name
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # some file systems say only now that they are full
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def is_leftover(path: Path) -> bool:
    """Whether it is what a process that was killed while it wrote by `replacing` or `replacing_folder` has left."""
    return re.fullmatch(r"\.[0-9a-f]{32}\..+", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what is left over there, at any depth."""
    for place, folders, files in os.walk(folder):
        for path in filter(is_leftover, (Path(place, name) for name in (*folders, *files))):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, as `replacing` does."""
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which is new, to write files in; it takes its name once all are there, or is removed.

    Raises:
        OSError: it cannot be written.
    """
    beside = folder.with_name(f".{uuid.uuid4().hex}.{folder.name}")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def has_files(folder: Path, names: Sequence[str]) -> bool:
    """Whether every file of these names lies in a folder."""
    return all((folder / name).exists() for name in names)


@contextlib.contextmanager
def create_folder_once(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """As `replacing_folder`, for one whose content follows from its path: where another process was faster, that stays.

    Args:
        names: of the files that make it whole; one that lacks some is replaced.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with atomic_folder(folder) as beside:
            yield beside
            if folder.exists() and not has_files(folder, names):  # somebody removed files from it
                shutil.rmtree(folder)
    except OSError:
        if not has_files(folder, names):
            raise


@contextlib.contextmanager
def file_lock(path: Path, held: str) -> Iterator[None]:
    """Hold the lock that is the file `path`; waits while another process does, and says so: `held` is what to say."""
    lock = FileLock(path)  # the operating system's: a killed process holds it no longer
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s; waiting for it", held)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """What is free on the disk where `path`, a file or folder that need not be there yet, lies."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if os.path.exists(place))).free
