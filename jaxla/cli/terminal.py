"""Text for the terminal: progress bars, line wrapping, and counts, sizes and times in words."""

import logging
import shutil
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

MAX_COLUMNS = 100

log = logging.getLogger(__name__)


def track(items: Iterable, label: str) -> Iterable:
    """Yield the items, one per case, with a progress bar on a terminal; elsewhere, log after each quarter of them."""
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

    def is_shown(letter: str) -> bool:
        return letter.isprintable() or unicodedata.category(letter) == "Zs"  # no-break and ideographic spaces, too

    return "".join(letter if is_shown(letter) else letter.encode("unicode_escape").decode() for letter in text)


def shorten(text: str, length: int = 60) -> str:
    """Return text from a file for a message: without control characters, at most `length` characters."""
    text = escape_controls(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


@contextmanager
def show_elapsed(label: str) -> Iterator[None]:
    """Show `label … 00:12` on a terminal while the context runs."""
    if not sys.stdout.isatty():
        yield
        return
    finished = threading.Event()
    with tqdm(desc=label, bar_format="{desc} … {elapsed}", leave=False, file=sys.stdout) as bar:

        def refresh() -> None:
            while not finished.wait(1):
                bar.refresh()

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


def wrap(text: str, indent: str = "  ") -> str:
    """Wrap text to the terminal's width and at most 100 columns, with `indent` before continuation lines.

    Output to a file or pipe is not wrapped.
    """
    if not sys.stdout.isatty():
        return text
    columns = min(MAX_COLUMNS, shutil.get_terminal_size().columns)
    wrapper = textwrap.TextWrapper(
        columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return "\n".join(line if len(line) <= columns else wrapper.fill(line) for line in text.split("\n"))


class EscapingFormatter(logging.Formatter):
    """Formats each message as one line, in which the control characters of file names are escapes."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape_controls(super().formatMessage(record))


class WrappedFormatter(EscapingFormatter):
    """Formats log lines to fit the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return wrap(super().format(record))


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
