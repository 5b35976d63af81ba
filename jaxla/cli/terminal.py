"""What is said on the terminal: how far the work has come, and counts, sizes and times in words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from tqdm import tqdm

log = logging.getLogger(__name__)


def track(items: Iterable, label: str) -> Iterable:
    """The items, one for each case: with a progress bar on a terminal, elsewhere a line at each quarter."""
    items = list(items)
    if sys.stdout.isatty():
        yield from tqdm(items, label, leave=False, file=sys.stdout, unit="case")
        return
    for number, item in enumerate(items, start=1):
        yield item
        if 4 * number // len(items) > 4 * (number - 1) // len(items):
            log.info("%s: %d of %d cases", label, number, len(items))


def plural(count: int, what: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def format_bytes(count: int) -> str:
    """`1.05kB`: three digits."""
    return tqdm.format_sizeof(count, "B")


def format_duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `20 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
