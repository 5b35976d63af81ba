"""A command as a process: its exit code, its log, and how it is asked to stop."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from jaxla.cli.terminal import WrappedFormatter, escape_controls
from jaxla.config import InputError, command_line_wording

REDELIVERY = "redelivery of a signal"  # name of a thread
REDELIVERY_SECONDS = 0.05  # delay before a discarded signal is delivered again


class Stopped(Exception):
    """The process was asked to stop; `reason` says at which point; `resume_command`, unless empty, resumes it."""

    def __init__(self, reason: str, resume_command: str = "") -> None:
        self.reason, self.resume_command = reason, resume_command
        super().__init__(reason + (f"; resume with: {resume_command}" if resume_command else ""))


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's `main` and exit: 0 on success, 2 with one line on bad input, 1 otherwise.

    SIGTERM ends it like Ctrl-C: half-written files are removed on the way out.
    """
    log_to_terminal()
    sys.unraisablehook = _report_unraisable
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack a character, such as ×
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # on a full disk the log file loses lines; the error itself is reported
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by `start_command`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with command_line_wording():
            main(sys.argv[1:])
    except (InputError, Stopped, KeyboardInterrupt) as error:
        if not isinstance(error, InputError):
            for number in (signal.SIGTERM, signal.SIGINT):  # a second signal must not interrupt the exit
                signal.signal(number, signal.SIG_IGN)
        code, line = exit_status(error)
        print(line, file=sys.stderr, flush=True)
        if not isinstance(error, InputError):  # XLA's threads may still compile, and crash when Python shuts down
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # stdout itself: its reader has exited, as `| head` does
            os._exit(1)
        raise  # a different pipe
    sys.exit(0)


def log_to_terminal() -> None:
    """Print the package's log lines on the terminal, and warnings of other packages."""
    # Importing Orbax sets up absl's plain handler, which is replaced. Handlers of a caller in this process are kept.
    is_default = all(type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=is_default)
    if is_default:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(WrappedFormatter())
    logging.getLogger("jaxla").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs options, and tracebacks of errors that it raises


def exit_status(error: BaseException) -> tuple[int, str]:
    """Return the exit code of a command that ends with this error, and the line to print."""
    if isinstance(error, InputError):
        return 2, "error: " + escape_controls(" ".join(str(error).split()))
    return 1, f"stopped {escape_controls(str(error))}" if isinstance(error, Stopped) else "interrupted"


def _report_unraisable(report: sys.UnraisableHookArgs) -> None:
    """Report an error that Python discards, such as in a destructor; deliver a discarded signal again."""
    if isinstance(report.exc_value, KeyboardInterrupt):
        # Not at once, because this hook runs within the destructor or callback and its errors are discarded, too.
        if all(thread.name != REDELIVERY for thread in threading.enumerate()):
            timer = threading.Timer(REDELIVERY_SECONDS, _deliver_to_main_thread)
            timer.name, timer.daemon = REDELIVERY, True  # a daemon, because the command may end before it fires
            timer.start()
        return
    frames = traceback.extract_tb(report.exc_traceback)
    if not frames or frames[-1].name != "_check_closed":  # Orbax's writers call an asyncio loop that an error has ended
        sys.__unraisablehook__(report)


def _deliver_to_main_thread() -> None:
    """Send SIGTERM, which every command handles, to the main thread, where it also interrupts a system call."""
    if hasattr(signal, "pthread_kill"):  # not on Windows
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    else:
        _thread.interrupt_main(signal.SIGTERM)


@contextmanager
def handle_signals(signals: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the context, call `handler` for these signals."""
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, previous in before.items():
            signal.signal(each, previous)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Make SIGTERM and the first Ctrl-C set a flag, which the yielded function returns; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals only to the main thread
        yield lambda: False
        return
    requested = threading.Event()

    def request(received: int, frame: FrameType | None) -> None:
        requested.set()
        signal.signal(received, signal.default_int_handler)

    with handle_signals((signal.SIGTERM, signal.SIGINT), request):
        yield requested.is_set
