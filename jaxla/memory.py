"""What a compiled program needs of a device's memory, and what the device has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import jax

from jaxla.cli.terminal import format_bytes
from jaxla.config import InputError

# Control groups, by which a container or a scheduler grants a share of the machine's memory: those of this process, and
# where the limits of a group stand, in version 1 and in version 2.
GROUPS = Path("/proc/self/cgroup")
LIMITS = {"memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), "": ("/sys/fs/cgroup", "memory.max")}


# what else makes a step take less memory
HOW_TO_SAVE_MEMORY = (
    "--preprocessing.image_size; networks in windows need less with --training.gradient=two_pass and more "
    "--model.windows; nnU-Net's patches are smaller with --model.memory_gb, or a plan of less --memory-gb"
)


class StepTooLarge(InputError):
    """A training step needs more memory than the device has."""

    def __init__(self, batch_size: int, what: str) -> None:
        lower = "lower it, or" if batch_size > 1 else "lower"
        super().__init__(
            f"option --training.batch_size={batch_size}: {what}; in a new run {lower} {HOW_TO_SAVE_MEMORY}"
        )


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and what lies between, by XLA's account."""
    of = compiled.memory_analysis()
    held = of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes
    return int(held + of.temp_size_in_bytes)


def device_bytes() -> int:
    """Memory of a device, 0 where it does not say; on CPU that of the machine, or what this process may take of it."""
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_granted()])


def peak_host_bytes() -> int | None:
    """Most memory that this process had at any time, None where the system does not say."""
    try:
        import resource
    except ImportError:  # not Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes() -> int | None:
    """Most memory of the first device that was in use at any time, None on CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _granted() -> Iterator[int]:
    """The limits of this process's control groups, and of those that these are in."""
    try:
        groups = [line.split(":", 2) for line in GROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, kinds, name in groups:
        for kind in LIMITS.keys() & kinds.split(","):
            root, file = LIMITS[kind]
            for group in (PurePosixPath(name), *PurePosixPath(name).parents):
                try:
                    yield int(Path(f"{root}/{group}", file).read_text())
                except (OSError, ValueError):  # no such file, or "max"
                    continue


def require_memory(needed: int, batch_size: int) -> None:
    """Raise `TooLarge` unless the device has that many bytes for a training step."""
    has = device_bytes()
    if has and needed > has:
        raise StepTooLarge(
            batch_size, f"a training step takes {format_bytes(needed)} and the device has {format_bytes(has)}"
        )


@contextmanager
def catch_out_of_memory(batch_size: int) -> Iterator[None]:
    """Within it, memory that runs out all the same is `TooLarge` too."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise StepTooLarge(batch_size, "the device's memory is exhausted") from error
