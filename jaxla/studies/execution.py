"""The execution of a study: its runs, one after the other, each in its own process.

A run that fails or runs out of memory does not affect the others. Its folder is the same as after
`python -m jaxla.train` with the same options.
"""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jaxla.cli.process import Stopped, handle_signals
from jaxla.cli.terminal import format_duration
from jaxla.config import InputError
from jaxla.runs.folder import is_finished, is_running
from jaxla.studies.forecast import describe_exit
from jaxla.studies.schedule import ScheduledRun, State, read_state

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0  # between two checks of a run that another process trains


def wait_for_running(runs: Sequence[ScheduledRun], output: Path) -> None:
    """Wait for runs that another process trains, such as those that a killed study left; refuse a second study."""
    if is_running(output):
        problem = "another process runs a study in this folder"
        raise InputError(f"--output={output}", problem, "Wait until it has finished, or stop it.")
    for run in runs:
        _wait_until_idle(run.folder)


def _wait_until_idle(folder: Path) -> None:
    if is_running(folder):
        log.info("waiting for another process that trains in %s", folder)
        while is_running(folder):
            time.sleep(POLL_SECONDS)


def execute_runs(runs: Sequence[ScheduledRun], states: Sequence[State], seconds: Sequence[float], command: str) -> None:
    """Train and test, in order, all runs that are not complete. After a run fails, the others are still run.

    Args:
        seconds: forecast for each run.
        command: command that resumes the study, for messages.

    Raises:
        Stopped: a run failed, or the process was asked to stop; the current run has saved its state.
    """
    failures, expected, elapsed = [], 0.0, 0.0
    remaining = [n for n, state in enumerate(states) if state != "complete"]
    for position, n in enumerate(remaining, start=1):
        run = runs[n]
        log.info("run %d of %d: %s, %s, seed %d", position, len(remaining), run.protocol, run.method, run.seed)
        start = time.perf_counter()
        try:
            if failure := _execute(run):
                failures.append(f"{run.folder} ({failure})")
                log.warning("failed: %s", failure)
            elapsed, expected = elapsed + time.perf_counter() - start, expected + seconds[n]
            left = sum(seconds[m] for m in remaining[position:]) * elapsed / max(expected, 1e-9)
            log.info("%d of %d done; about %s left", position, len(remaining), format_duration(left))
        except KeyboardInterrupt as interrupt:
            raise Stopped(f"in run {run.folder.name}", command) from interrupt
    if failures:
        raise Stopped(f"after {len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}", command)


def _execute(run: ScheduledRun) -> str:
    """Run `jaxla.train` in a separate process and print its output indented; return why it failed, or "".

    Raises:
        KeyboardInterrupt: the run was asked to stop, and has stopped.
    """
    _wait_until_idle(run.folder)
    try:
        state = read_state(run)
    except InputError as error:
        return str(error)
    if state == "complete":
        return ""
    command = [sys.executable, "-m", "jaxla.train", *run.arguments, f"--run-dir={run.folder}", "--processes=1"]
    command += ["--resume"] * (state == "started")
    last_line, stopped = "", None
    # In its own process group: otherwise Ctrl-C would reach it as well, and a second signal ends it at once.
    popen_options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "process_group": 0}
    with (
        handle_signals(_stop_signals(), signal.default_int_handler),
        subprocess.Popen(command, text=True, errors="replace", **popen_options) as process,
    ):
        while True:
            try:
                for line in process.stdout:
                    with suppress(OSError):  # the terminal may be gone, as after Ctrl-C of `… | tee`
                        print(f"    {line.rstrip()}", flush=True)
                    last_line = line.strip() or last_line
                break
            except KeyboardInterrupt as interrupt:
                stopped = interrupt
                process.send_signal(signal.SIGINT)
    if stopped:
        raise stopped
    if process.returncode == 0 and is_finished(run.folder):
        return ""
    ending = describe_exit(process.returncode)
    return f"{ending}: {last_line}" if process.returncode > 0 and last_line else ending


def _stop_signals() -> list[signal.Signals]:
    """Return SIGINT, SIGTERM and SIGHUP, the signal of a closed terminal (unless ignored, as under nohup)."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has no SIGHUP
        signals.append(signal.SIGHUP)
    return signals
