"""Text for the terminal: progress, and counts, sizes and times in words."""

import logging
import sys
from collections.abc import Iterable

from tqdm import tqdm

log = logging.getLogger(__name__)


def track(items: Iterable, label: str) -> Iterable:
    """Yield the items, one per case, with a progress bar on a terminal, or a log line at each quarter elsewhere."""
    items = list(items)
    if sys.stdout.isatty():
        yield from tqdm(items, label, leave=False, file=sys.stdout, unit="case")
        return
    for count, item in enumerate(items, start=1):
        yield item
        if 4 * count // len(items) > 4 * (count - 1) // len(items):
            log.info("%s: %d of %d cases", label, count, len(items))


def escape_controls(text: str) -> str:
    """Return text from a file with its control characters, such as newlines and colour codes, as escapes like `\\n`."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def shorten(text: str, length: int = 60) -> str:
    """Return text from a file for a message: without control characters, at most `length` characters."""
    text = escape_controls(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plural(count: int, noun: str) -> str:
    """Return `1 seed`, `2 seeds`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: int) -> str:
    """Return three digits and a unit, such as `1.05kB`."""
    return tqdm.format_sizeof(count, "B")


def format_duration(seconds: float) -> str:
    """Return a duration in words, such as `1 h 05 min`, `3 min 20 s` or `20 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
