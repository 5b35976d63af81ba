"""Faults outside the program: damaged files, a disk that refuses to write, processes that end at any moment."""

import logging
import multiprocessing
import os
import resource
import shutil
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm


def flip_a_bit(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@contextmanager
def limit_file_size(size):
    """Make the system refuse to write more than `size` bytes into any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def report_free_bytes(monkeypatch, free_bytes):
    """Make the operating system report this many free bytes on every disk."""
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free_bytes))


def limit_memory(monkeypatch, count):
    """Make the operating system report that this machine has about `count` bytes of memory."""
    sysconf = os.sysconf
    pages = count // sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else sysconf(name))


def start_process(log, target, *arguments):
    """Start a process that runs `target(*arguments)` and writes its output to the file `log`.

    It is forked from a process that has imported JAX but not run it, which saves seconds each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.resume_driver", "jaxla.training.features"])
    process = context.Process(target=_run, args=(log, target, arguments), daemon=True)
    process.start()
    return process


def _run(log, target, arguments):
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.__stdout__.fileno())
        os.dup2(file.fileno(), sys.__stderr__.fileno())
    tqdm.set_lock(threading.RLock())  # by default a semaphore between processes, which a killed process leaks
    target(*arguments)


def package_messages(caplog, level=logging.WARNING):
    """Return this package's log messages of at least a level, without those of other libraries."""
    records = [record for record in caplog.records if record.name.startswith("jaxla") and record.levelno >= level]
    return [record.getMessage() for record in records]
