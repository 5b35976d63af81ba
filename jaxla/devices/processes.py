"""The processes that run one command together: they meet, tell each other what they know, and end together.

Each is linked to process 0 by a connection of its own, beside those over which JAX moves arrays. By it process 0
collects and hands out small values (`gather`), prints what others have to say, and learns within moments that one of
them is gone, at which all of them end: without it those that are left would wait for ever.

Outside of `joined` a process is the only one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from jaxla.cli.process import Stopped, exit_status
from jaxla.config import InputError
from jaxla.devices.launch import Launch, count_gpus, gpus_of
from jaxla.devices.meeting import GRACE, bound_to, host_and_port, meet

T = TypeVar("T")

log = logging.getLogger("jaxla")


class _Processes:
    """The processes as one of them sees them.

    Attributes:
        hosts: of each process, by its index.
        links: the connections of this process: process 0's to all others, every other one's to process 0.
        go_on: the command that goes on once they have ended.
        note: keeps a line beside the terminal, should another one end.
        ending: whether this process is about to leave.

    Messages are JSON: `{"value": …}` for `gather`, `{"log": [level, text]}` for process 0 to print, and
    `{"end": [exit code, line]}` from one that leaves, at which all do. A process that comes to its end by itself calls
    `leave`, one that is ended by a mistake or a signal `end`; `_after_end_of` ends one whose other has ended.
    """

    def __init__(self, index: int, hosts: Sequence[str], links: dict[int, Connection]) -> None:
        self.index, self.hosts, self.links = index, hosts, links
        self.go_on = ""
        self.note: Callable[[str], None] = lambda message: None
        self._values = {k: queue.SimpleQueue() for k in links}
        self._told, self._gone = ({k: threading.Event() for k in links} for _ in range(2))  # its end; its connection's
        self.ending, self._lock = False, threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def name(self, k: int) -> str:
        return f"process {k} of {len(self.hosts)} ({self.hosts[k]})"

    def gather(self, value: Any) -> list[Any]:
        if self.index:
            self.send(0, {"value": value})
            return self._values[0].get()
        values = [value] + [self._values[k].get() for k in sorted(self.links)]
        values = json.loads(json.dumps(values))  # the same for all
        for k in self.links:
            self.send(k, {"value": values})
        return values

    def send(self, k: int, message: dict[str, Any]) -> None:
        """Send a message; one to a process that is gone is lost, which `_watch` sees."""
        with self._lock, contextlib.suppress(OSError):
            self.links[k].send_bytes(json.dumps(message).encode())

    def end(self, code: int, line: str) -> None:
        """Leave the process with this exit code, and have all others leave; never returns."""
        if not self._begin_to_end():
            threading.Event().wait()  # for the other thread, which leaves the process
        self._end(code, line)

    def _begin_to_end(self) -> bool:
        with self._lock:
            begins, self.ending = not self.ending, True
        return begins

    def _end(self, code: int, line: str) -> None:
        try:
            if self.index and not self._gone[0].is_set():
                self.send(0, {"end": [code, line]})  # which prints the line
                self._told[0].wait(3 * GRACE)
            elif line:
                print(line, file=sys.stderr)
            if not self.index:
                for k in self.links:
                    self.send(k, {"end": [code, ""]})
                for gone in self._gone.values():  # JAX aborts those that find process 0 gone
                    gone.wait(2 * GRACE)
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # by `sys.exit` JAX would wait for the other processes

    def leave(self) -> None:
        """At the end of the command, for all of them."""
        self.gather(None)
        self._begin_to_end()
        import jax

        jax.distributed.shutdown()

    def _watch(self) -> None:
        """Read all that comes, in a thread; end the process when another one has ended."""
        left = dict(self.links)
        while left:
            for connection in wait(list(left.values())):
                k = next(k for k, link in left.items() if link is connection)
                try:
                    message = json.loads(connection.recv_bytes())
                except (OSError, EOFError):
                    del left[k]
                    self._gone[k].set()
                    message = {"end": [1, ""]}
                if "value" in message:
                    self._values[k].put(message["value"])
                elif "log" in message:
                    level, text = message["log"]
                    log.log(level, "%s", text)
                elif not self._told[k].is_set():
                    self._told[k].set()
                    threading.Thread(target=self._after_end_of, args=(k, *message["end"]), daemon=True).start()

    def _after_end_of(self, k: int, code: int, line: str) -> None:
        without_word = self._gone[k].is_set()
        if not without_word:
            time.sleep(GRACE)
        if not self._begin_to_end():
            return
        what, _, _ = line.partition("; go on with: ")
        if without_word:
            line = f"stopped: {self.name(k)} has ended without a word"
        elif what.startswith("error: "):
            line = f"error: {self.name(k)}: {what.removeprefix('error: ')}"
        elif what:
            line = f"{what} ({self.name(k)})"
        if line and self.go_on:
            line += f"; go on with: {self.go_on}"
        try:
            self.note(line)
        finally:
            self._end(code, line)


_processes: _Processes | None = None


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return _processes is None or _processes.index == 0


def process_count() -> int:
    """The number of processes."""
    return 1 if _processes is None else len(_processes.hosts)


def gather(value: Any) -> list[Any]:
    """The JSON-like values of all processes, by their index; each must call it, and waits until all have."""
    return [value] if _processes is None else _processes.gather(value)


def broadcast(value: T) -> T:
    """Process 0's value; each process must call it."""
    return gather(value if is_first() else None)[0]


def barrier() -> None:
    """Until each process has called it."""
    gather(None)


def local_items(items: Sequence[T]) -> Sequence[T]:
    """The part of a work list that this process does; each item is in the part of one."""
    return items if _processes is None else items[_processes.index :: process_count()]


def require_same(entries: dict[str, str], mend: str) -> None:
    """Raise an InputError, in every process, unless all have the same entries.

    Args:
        mend: what to do about it.
    """
    first, *others = gather(entries)
    for k, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            ours, theirs = (of_process.get(key, "missing") or "not given" for of_process in (first, other))
            if ours != theirs:
                name = _processes.name
                raise InputError(f"{key} is {theirs} on {name(k)}, but {ours} on {name(0)}; {mend}")


def log_progress(line: str) -> None:
    """Log a line of progress, which the first process prints."""
    if is_first():
        log.info("%s", line)
    else:
        _processes.send(0, {"log": [logging.INFO, line]})


@contextmanager
def if_others_end(go_on: str, note: Callable[[str], None]) -> Iterator[None]:
    """Within it, the command that goes on, and where to note what is said, should another process end."""
    if _processes is None:
        yield
        return
    before = _processes.go_on, _processes.note
    _processes.go_on, _processes.note = go_on, note
    try:
        yield
    finally:
        _processes.go_on, _processes.note = before


@contextmanager
def join_processes(launch: Launch | None, timeout: float) -> Iterator[None]:
    """Run what stands within it together with the other processes; they end together.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        InputError: they do not come.
    """
    global _processes
    if launch is None:
        yield
        return
    links, members = meet(launch, timeout)
    _processes = met = _Processes(launch.index, [member["host"] for member in members], links)
    if launch.index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
        logging.getLogger().handlers = [_ToFirst(met)]
    try:
        import jax

        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        # The way to process 0 is no way for a proxy of the web, by which gRPC would go, and of which JAX would warn.
        os.environ["no_grpc_proxy"] = host_and_port(launch.coordinator)[0]  # noqa: SIM112  (its name)
        jax.config.update("jax_check_proxy_envs", False)
        jax.distributed.initialize(
            launch.coordinator,
            launch.count,
            launch.index,
            local_device_ids=gpus_of(launch, members, count_gpus()),
            initialization_timeout=round(timeout) + 10,
            coordinator_bind_address=bound_to(launch.coordinator),
        )
        log.info("%d processes, on %s", launch.count, ", ".join(dict.fromkeys(met.hosts)))
        yield
        met.leave()
    except (InputError, Stopped, KeyboardInterrupt) as error:
        met.end(*exit_status(error))
    except Exception:
        time.sleep(GRACE)  # collectives fail when a process is gone, which is said, and ends this one, meanwhile
        if not met.ending:
            traceback.print_exc()
        met.end(1, "stopped: failed, for the reason that it printed")
    finally:
        _processes = None


class _ToFirst(logging.Handler):
    """What another process than the first has to say is printed by the first."""

    def __init__(self, processes: _Processes) -> None:
        super().__init__(logging.WARNING)
        self._processes = processes

    def emit(self, record: logging.LogRecord) -> None:
        said = f"{self._processes.name(self._processes.index)}: {record.getMessage()}"
        self._processes.send(0, {"log": [record.levelno, said]})
