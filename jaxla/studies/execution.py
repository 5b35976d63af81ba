"""The runs of a study, one after the other, each in a process of its own.

A run that fails, or takes all memory, so ends alone; and what stands in a run's folder is what `python -m jaxla.train`
with the same options would have left there.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jaxla.cli.process import Stopped
from jaxla.cli.terminal import format_duration
from jaxla.config import InputError
from jaxla.runs.folder import is_finished, is_running
from jaxla.studies.forecast import RunsForecast, how_it_ended
from jaxla.studies.schedule import PlannedRun, State, state_of

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between two looks at a run that another process trains


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end, and the last that it said."""

    run: PlannedRun
    reason: str


def wait_for_orphans(runs: Sequence[PlannedRun], output: Path) -> None:
    """Wait for runs that a killed study has left behind, or that were started by hand.

    Raises:
        InputError: another process runs a study in this folder.
    """
    if is_running(output):
        raise InputError(f"--output={output}: another process runs a study there; wait for it or end it")
    for run in runs:
        _wait_for(run.folder)


def _wait_for(folder: Path) -> None:
    if is_running(folder):
        log.info("another process trains in %s; waiting for it", folder)
        while is_running(folder):
            time.sleep(POLL)


def run_all(runs: Sequence[PlannedRun], states: Sequence[State], forecast: RunsForecast) -> list[Failure]:
    """Run what is not complete, in order; -> those that failed.

    Raises:
        Stopped: asked to end; the run in progress has saved where it stands.
    """
    failures, expected, taken = [], 0.0, 0.0
    left = [n for n, state in enumerate(states) if state != "complete"]
    for done, n in enumerate(left):
        run = runs[n]
        log.info("run %d of %d: %s, %s, seed %d", done + 1, len(left), run.protocol, run.method, run.seed)
        began = time.perf_counter()
        failure = _run(run)
        expected, taken = expected + forecast.seconds[n], taken + time.perf_counter() - began
        outlook = sum(forecast.seconds[m] for m in left[done + 1 :]) * taken / max(expected, 1e-9)
        if failure:
            failures.append(Failure(run, failure))
            log.warning("failed: %s", failure)
        log.info("%d of %d done; about %s left", done + 1, len(left), format_duration(outlook))
    return failures


def _run(run: PlannedRun) -> str:
    """Train and test in a process of its own, whose lines are printed indented; -> why it failed, or nothing."""
    _wait_for(run.folder)
    try:
        state = state_of(run)
    except InputError as error:
        return str(error)
    if state == "complete":
        return ""
    command = [sys.executable, "-m", "jaxla.train", *run.arguments, f"--run-dir={run.folder}", "--processes=1"]
    command += ["--resume"] * (state == "begun")
    said, stopped = "", None
    with (
        interruptible(),
        # a process group of its own: Ctrl-C on a terminal would reach it too, and the same signal twice ends it at once
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
        ) as process,
    ):
        while True:
            try:
                for line in process.stdout:
                    if stopped:  # how to go on with the study is said at its end
                        line = line.partition("; go on with:")[0]
                    with suppress(OSError):  # nobody reads any more, as after Ctrl-C of `… | tee`
                        print(f"    {line.rstrip()}", flush=True)
                    said = line.strip() or said
                break
            except KeyboardInterrupt as interrupt:
                stopped = interrupt
                process.send_signal(signal.SIGINT)
    if stopped:
        raise Stopped(f"in {run.folder.name}") from stopped
    if process.returncode == 0 and is_finished(run.folder):
        return ""
    if process.returncode < 0:
        return f"ended with {how_it_ended(process.returncode)}"
    return said.removeprefix("error: ") or how_it_ended(process.returncode)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and a closed terminal, unless it is ignored as under nohup, are a KeyboardInterrupt."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
