"""Refuse a training step that needs more memory than the device has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxla.cli.terminal import format_bytes
from jaxla.config import InputError, option
from jaxla.hardware import device_bytes


class StepTooLarge(InputError):
    """A training step needs more memory than the device has."""

    def __init__(self, batch_size: int, problem: str, advice: str = "") -> None:
        smaller_batch = "Start a new run with a smaller batch. " if batch_size > 1 else ""
        super().__init__(option("training.batch_size", batch_size), problem, smaller_batch + advice)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the memory that XLA reserves for a program: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(arrays + memory.temp_size_in_bytes)


def require_memory(needed: int, batch_size: int, advice: str = "") -> None:
    """Raise `StepTooLarge` if a training step needs more bytes than the device has.

    Args:
        advice: how to reduce the memory, besides a smaller batch.
    """
    available = device_bytes()
    if available and needed > available:
        problem = f"a training step needs {format_bytes(needed)}, but the device has {format_bytes(available)}"
        raise StepTooLarge(batch_size, problem, advice)


@contextmanager
def catch_out_of_memory(batch_size: int, advice: str = "") -> Iterator[None]:
    """Turn JAX's out-of-memory error into `StepTooLarge`; `advice` as for `require_memory`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string != "RESOURCE_EXHAUSTED":
            raise
        raise StepTooLarge(batch_size, "the device ran out of memory in a training step", advice) from error
