"""How far the process grows, by what Linux keeps of it."""

from pathlib import Path

MEMORY = Path("/proc/self")


def reset_peak():
    """Forget the process's largest size so far; -> its size now, in bytes. 0 where the system keeps none."""
    try:
        (MEMORY / "clear_refs").write_text("5")
    except OSError:
        return 0
    return peak()


def peak():
    """The process's largest size since then, in bytes."""
    try:
        lines = (MEMORY / "status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
