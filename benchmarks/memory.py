"""Measure how much a process's memory grows, from what Linux records."""

from pathlib import Path

MEMORY = Path("/proc/self")


def reset_peak():
    """Reset the process's peak memory and return its size in bytes, or 0 if the system does not record it."""
    try:
        (MEMORY / "clear_refs").write_text("5")
    except OSError:
        return 0
    return peak()


def peak():
    """Return the process's peak memory in bytes since `reset_peak`, or 0 if the system does not record it."""
    try:
        lines = (MEMORY / "status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
