"""Run in several processes with `jax.distributed`: start, exchange of values, and a common end.

Processes exchange small values through JAX's coordination service, which process 0 hosts. An error in one process ends
all of them. The devices of all processes form one mesh (`jaxla.mesh`).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import jax
from jax._src.clusters import OmpiCluster, SlurmCluster
from jax._src.distributed import global_state

from jaxla.cli.process import Stopped, exit_status
from jaxla.cli.terminal import EscapingFormatter
from jaxla.config import InputError
from jaxla.hardware import require_devices

T = TypeVar("T")

log = logging.getLogger("jaxla")
progress_log = logging.getLogger("jaxla.progress")

HEARTBEAT_SECONDS = 30  # JAX aborts a process this long after it lost contact with another process
GRACE_SECONDS = 5  # time for a process to exit by itself: often all processes raise the same error
MAX_WAIT_MS = 30 * 24 * 3600 * 1000
# Variables of launchers that JAX does not detect (Open MPI 5, MPICH): number of processes and index of this process.
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK", "PMI_SIZE PMI_RANK", "WORLD_SIZE RANK")


def is_first() -> bool:
    """Return whether this is process 0, the one that prints and writes."""
    return global_state.process_id == 0


def process_count() -> int:
    """Return the number of processes."""
    return global_state.num_processes


def gather(value: Any) -> list[Any]:
    """Return the JSON-like values of all processes in order; every process must call it, and waits for the others."""
    store = global_state.client
    if store is None:
        return [value]
    gather_index = next(_gathers)
    keys = [f"jaxla/gather/{gather_index}/{k}" for k in range(process_count())]
    store.key_value_set(keys[global_state.process_id], json.dumps(value))
    values = _executor.submit(lambda: [store.blocking_key_value_get(key, MAX_WAIT_MS) for key in keys]).result()
    store.key_value_delete(f"jaxla/gather/{gather_index - 1}/{global_state.process_id}")  # all processes have read it
    return [json.loads(text) for text in values]


def broadcast(value: T) -> T:
    """Return process 0's JSON-like value; every process must call it."""
    return gather(value if is_first() else None)[0]


def barrier() -> None:
    """Wait until every process has called it."""
    gather(None)


def local_items(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of a work list: each item goes to one process."""
    return items[global_state.process_id :: process_count()]


def require_same(entries: dict[str, str], fix: str) -> None:
    """Raise an InputError in every process unless all have the same entries: name -> value."""
    (first_host, first), *others = gather([platform.node(), entries])
    for k, (host, given) in enumerate(others, start=1):
        for name in sorted(first.keys() | given.keys()):
            expected, value = (values.get(name, "missing") or "not given" for values in (first, given))
            if value != expected:
                problem = f"{value} on process {k} ({host}), but {expected} on process 0 ({first_host})"
                raise InputError(name, problem, fix)


def log_progress(line: str) -> None:
    """Log a line of progress; every process prints its own lines."""
    progress_log.info("%s", line)


@contextmanager
def name_resume_command(command: str, note: Callable[[str], None]) -> Iterator[None]:
    """Add `command` to the line that says why another process stopped this one; `note` receives the line."""
    before = _exit.resume, _exit.note
    _exit.resume, _exit.note = f" Resume with: {command}", note
    yield
    _exit.resume, _exit.note = before  # kept after an error, whose line needs them


@contextmanager
def join_processes(coordinator: str, processes: int | None, process: int | None, timeout: float) -> Iterator[None]:
    """Within the context, run together with the other processes; an error in one process ends all of them.

    Does nothing for a single process. Values that are not given ("" or None) are detected from `srun` or `mpirun`.

    Args:
        coordinator: HOST:PORT, a free port on the host of process 0.
        processes, process: the number of processes, and the index of this one.
        timeout: seconds to wait for the other processes.

    Raises:
        InputError: the options do not fit together, or JAX finds no device.
    """
    launch = find_launch(coordinator, processes, process)
    if launch is None:
        require_devices()
        yield
        return
    _connect(*launch, timeout)
    watcher = threading.Thread(target=_await_failure, daemon=True)
    watcher.start()
    name = f"process {global_state.process_id}"
    try:
        require_devices()
        _require_same_count()
        log.info("%d processes, on %s", process_count(), ", ".join(dict.fromkeys(gather(platform.node()))))
        yield
        barrier()
    except InputError as error:
        _end_all(2, f"error: {'' if is_first() else f'{name}: '}{error}")
    except (Stopped, KeyboardInterrupt) as error:
        _end_all(*exit_status(error))
    except Exception:
        traceback.print_exc()
        line = f"stopped: {name} failed or lost another process, see its traceback.{_exit.resume}"
        _exit.note(line)
        _end_all(1, line)
    jax.distributed.shutdown()  # also ends the watcher's wait, which must not last until Python exits
    watcher.join()


def find_launch(coordinator: str, processes: int | None, process: int | None) -> tuple[str, int, int] | None:
    """Return the arguments of `join_processes` as given or detected; None for a single process.

    Raises:
        InputError: a value is missing or wrong.
    """
    variables = [[os.environ.get(name, "") for name in names.split()] for names in LAUNCHER_VARIABLES]
    detected = next((tuple(map(int, pair)) for pair in variables if all(map(str.isdigit, pair))), (None, None))
    cluster = next((cluster for cluster in (SlurmCluster, OmpiCluster) if cluster.is_env_present()), None)
    if cluster is SlurmCluster and os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        cluster = None  # in an interactive shell SLURM_NTASKS counts the tasks of the whole job
    if cluster:
        detected = cluster.get_process_count(), cluster.get_process_id()
    count = detected[0] if processes is None else processes
    index = detected[1] if process is None else process
    if count == 1 or (count is None and process is None and not coordinator):
        return None
    if cluster and not coordinator:
        coordinator = cluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    needed = {"--coordinator": coordinator, "--processes": count, "--process": index}
    if missing := [name for name, value in needed.items() if value in ("", None)]:
        fix = "Pass --coordinator=HOST:PORT, --processes=N and --process=0 to N-1, or --processes=1 to run alone."
        raise InputError(missing[0], "missing, but several processes need it", fix)
    if not re.fullmatch(r".+:\d{1,5}", coordinator) or not 0 < int(coordinator.rsplit(":", 1)[1]) < 65536:
        raise InputError(f"--coordinator={coordinator}", "not HOST:PORT", "Use a value such as node1:62000.")
    if not 0 <= index < count:
        problem = f"must be from 0 to N-1, where N is --processes={count}"
        raise InputError(f"--process={index}", problem, "Number the processes from 0.")
    return coordinator, count, index


def _connect(address: str, count: int, index: int, timeout: float) -> None:
    """Connect to the other processes; all but process 0 print only warnings and progress.

    If the others do not connect in time, JAX aborts (see `_leave`).

    Raises:
        InputError: process 0 cannot use the port.
    """
    host, port = address.rsplit(":", 1)
    loopback = host if host in ("127.0.0.1", "localhost") else ""  # empty: all addresses of this host
    if index == 0:
        try:
            socket.create_server((loopback, int(port))).close()  # JAX may crash if the port is in use
        except OSError as error:
            problem = f"process 0 cannot use port {port} ({os.strerror(error.errno)})"
            fix = "Use another port, and only one --process=0."
            raise InputError(f"--coordinator={address}", problem, fix) from error
        log.info("waiting at %s for the other processes, up to %g s", address, timeout)
    fix = "Start every process with its own --process and the same --processes. Raise --wait if they start late."
    _exit.code, _exit.line = 2, f"error: --coordinator={address}: the {count} processes could not connect. {fix}"
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)
    os.environ["no_grpc_proxy"] = host.strip("[]")  # noqa: SIM112  (gRPC would use a web proxy)
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    _executor.submit(
        jax.distributed.initialize, address, count, index, local_device_ids=[],  # all visible devices
        initialization_timeout=max(1, round(timeout)), heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        coordinator_bind_address=address if loopback else None,
    ).result()  # fmt: skip
    _exit.code, _exit.line = 1, None
    if index > 0:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(EscapingFormatter(f"process {index}: %(message)s"))
        logging.basicConfig(force=True, handlers=[handler])
        log.setLevel(logging.WARNING)
        progress_log.setLevel(logging.INFO)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)


def _require_same_count() -> None:
    """Raise an InputError if process 0 was started with a different number of processes: `gather` would never end."""
    if is_first():
        global_state.client.key_value_set("jaxla/processes", str(process_count()))
    expected = int(global_state.client.blocking_key_value_get("jaxla/processes", MAX_WAIT_MS))
    if expected != process_count():
        problem = f"differs from --processes={expected} of process 0"
        raise InputError(f"--processes={process_count()}", problem, "Start all processes with the same number.")


def _await_failure() -> None:
    """End this process when another one has failed, unless it exits by itself."""
    with suppress(jax.errors.JaxRuntimeError):  # the command is finished, or JAX aborts this process
        code, line = json.loads(global_state.client.blocking_key_value_get("jaxla/failure", MAX_WAIT_MS))
        time.sleep(GRACE_SECONDS)
        if not _failing.locked():
            _exit.note(line)
        _end_all(code, line)


def _end_all(code: int, line: str) -> NoReturn:
    """Exit with this code and have the other processes do the same; process 0 prints its line for all."""
    if not _failing.acquire(blocking=False):
        threading.Event().wait()  # another thread ends this process
    _exit.code, _exit.line = code, line
    with suppress(jax.errors.JaxRuntimeError):  # another process failed before, or process 0 is dead
        global_state.client.key_value_set("jaxla/failure", json.dumps([code, line]))
    with suppress(jax.errors.JaxRuntimeError):  # a process is dead or does not respond: this one prints its own line
        global_state.client.wait_at_barrier("jaxla/exit", 2000 * GRACE_SECONDS)
        if is_first():
            time.sleep(1)  # JAX aborts a process that loses process 0
        else:
            _exit.line = ""
    _leave()


def _leave(signal_number: int = 0) -> NoReturn:
    """Print the last line and exit at once; `sys.exit` would wait for the other processes.

    Also handles SIGABRT, by which JAX ends a process that lost another one; Python's own handler would never run.
    """
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()
    try:
        if _exit.line is None:
            _exit.line = f"stopped: another process exited unexpectedly, or JAX failed (see above).{_exit.resume}"
            _exit.note(_exit.line)
        if _exit.line:
            print(_exit.line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:
        os._exit(_exit.code)


# The exit code and last line of a failing process (line is None: JAX aborts it), and what `name_resume_command` set.
_exit = SimpleNamespace(code=1, line=None, resume="", note=lambda line: None)
_failing, _leaving = threading.Lock(), threading.Lock()
_abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_leave)
_gathers = itertools.count(1)
_executor = ThreadPoolExecutor(1)  # a signal interrupts the main thread while it waits for this thread
