"""Files on disk: the cache folder, atomic writes, locks between processes, hashes and free space."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from jaxla.config import InputError, option

WRITE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # a full or read-only disk

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return the default cache folder, which all runs share.

    Raises:
        InputError: the user has no home folder.
    """
    import platformdirs

    try:
        folder = Path(platformdirs.user_cache_dir("jaxla"))
    except RuntimeError:
        folder = Path("~")
    if folder.parts[0] == "~":  # in earlier versions of platformdirs; the cache would be written to a folder named ~
        raise InputError(option("cache-dir"), "the user has no home folder", "Pass a folder, or set XDG_CACHE_HOME.")
    return folder


@contextlib.contextmanager
def report_os_errors(action: Literal["read", "written"], where: object, fix: str = "") -> Iterator[None]:
    """Turn an OSError within the context into an InputError: `where` cannot be `action`, for the system's reason."""
    try:
        yield
    except OSError as error:
        # NumPy raises an OSError without a reason if the disk is full.
        reason = error.strerror or ("the disk is full" if action == "written" else error)
        raise InputError(where, f"cannot be {action} ({reason})", fix) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces `path` once it is complete; after an error nothing is left."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")  # unique among processes and hosts
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # some file systems report only here that they are full
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_leftover(path: Path) -> bool:
    """Return whether a process left the path when it was killed within `atomic_file` or `atomic_folder`."""
    return re.fullmatch(r"\.[0-9a-f]{32}\..+", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove all leftovers in a folder, at any depth."""
    for parent, folders, files in os.walk(folder):
        for path in filter(is_leftover, (Path(parent, name) for name in (*folders, *files))):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file by `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder for files. It becomes `folder`, which must not exist, or is removed on an error."""
    temporary = folder.with_name(f".{uuid.uuid4().hex}.{folder.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def has_files(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has all files of these names."""
    return all((folder / name).exists() for name in names)


@contextlib.contextmanager
def create_folder_once(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Do what `atomic_folder` does, for a folder whose path determines its content: the first process to write it wins.

    Args:
        names: the files of a complete folder; an incomplete one is replaced.
    """
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
            if folder.exists() and not has_files(folder, names):  # some of its files were removed
                shutil.rmtree(folder)
    except OSError:
        if not has_files(folder, names):
            raise


@contextlib.contextmanager
def file_lock(path: Path, message: str) -> Iterator[None]:
    """Hold the lock file `path`. If another process holds it, log the message and wait."""
    lock = FileLock(path)  # a lock of the operating system, which releases it when the process is killed
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s; waiting for it", message)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a file or folder, which need not exist yet."""
    path = path.absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if os.path.exists(parent))).free
