"""A command as a process: what it prints and returns, and how it is asked to end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxla.config import InputError, command_line_wording

if TYPE_CHECKING:
    from types import FrameType


class Stopped(Exception):
    """The process was asked to end, and what is needed to go on is saved; the message says where it stopped."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's `main` and leave the process: 0 on success, 2 with one line on bad input, 1 otherwise.

    SIGTERM ends it as Ctrl-C does: what is half-written is removed on the way out.
    """
    log_to_terminal()
    sys.unraisablehook = _report_unraisable
    logging.raiseExceptions = False  # a log file on a full disk loses lines, and the error itself is what is said
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with command_line_wording():
            main(sys.argv[1:])
    except (InputError, Stopped, KeyboardInterrupt) as error:
        code, line = exit_status(error)
        print(line, file=sys.stderr, flush=True)
        if not isinstance(error, InputError):  # XLA's threads may still compile, and would crash as Python goes down
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # it is this one: whoever read what is printed has left, as `| head` does
            os._exit(1)
        raise  # some other pipe
    sys.exit(0)


def log_to_terminal() -> None:
    """Say on the terminal what the package logs, and of others what is worth a warning."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("jaxla").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: each option, and tracebacks of errors that it raises


def exit_status(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that this ends, and the line to print."""
    if isinstance(error, InputError):
        return 2, "error: " + " ".join(str(error).split())
    return 1, f"stopped {error}" if isinstance(error, Stopped) else "interrupted"


def _report_unraisable(report: sys.UnraisableHookArgs) -> None:
    if str(report.exc_value) != "Event loop is closed":  # Orbax's writers, to a loop that an error has ended
        sys.__unraisablehook__(report)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM and the first Ctrl-C only set a flag, which the yielded function reads; a second one ends."""
    if threading.current_thread() is not threading.main_thread():  # Python takes signals only there
        yield lambda: False
        return
    requested = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        signal.signal(number, signal.default_int_handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
