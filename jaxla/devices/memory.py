"""What a compiled program needs of a device's memory, and what the device has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from tqdm import tqdm

from jaxla.config import InputError

# What a container or a scheduler's job may take of the machine's memory: control groups, version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class TooLarge(InputError):
    """A training step needs more memory than the device has."""

    def __init__(self, batch_size: int, what: str) -> None:
        super().__init__(f"option --training.batch_size={batch_size}: {what}; lower it, or --preprocessing.image_size")


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and what lies between, by XLA's account."""
    of = compiled.memory_analysis()
    held = of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes
    return int(held + of.temp_size_in_bytes)


def device_bytes() -> int:
    """Memory of a device, 0 where it does not say; on CPU that of the machine, or what this process may take of it."""
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in LIMITS:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)


def require_memory(needed: int, batch_size: int) -> None:
    """Raise `TooLarge` unless the device has that many bytes for a training step."""
    has = device_bytes()
    if has and needed > has:
        raise TooLarge(batch_size, f"a training step takes {as_bytes(needed)} and the device has {as_bytes(has)}")


@contextmanager
def exhaustion_named(batch_size: int) -> Iterator[None]:
    """Within it, memory that runs out all the same is `TooLarge` too."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(batch_size, "the device's memory is exhausted") from error


def as_bytes(count: int) -> str:
    return tqdm.format_sizeof(count, "B")
