"""The device mesh, the sharding of arrays over it, and runs in several processes with `jax.distributed`.

Within `use_devices` all devices of the mesh share each batch. Every device holds all parameters, or with
`shard_params` a part of the large ones (see SHARDED). Outside `use_devices` everything runs on one device.

Each of several processes holds the rows of a batch that its own devices compute. Processes exchange small values
through JAX's coordination service, which process 0 hosts.
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
import numpy as np
from jax._src.clusters import OmpiCluster, SlurmCluster
from jax._src.distributed import global_state
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxla.cli.process import Stopped, exit_status
from jaxla.cli.terminal import plural
from jaxla.config import InputError, option
from jaxla.hardware import require_devices

T = TypeVar("T")

log = logging.getLogger("jaxla")
progress_log = logging.getLogger("jaxla.progress")

DATA, MODEL = "data", "model"
BATCH = PartitionSpec((DATA, MODEL))
REPLICATED = PartitionSpec()

# Part of a parameter's name -> its sharding; axis 0 indexes the stacked blocks of a vision transformer. These kernels
# hold nearly all of a backbone's parameters. Parameters that are not listed are replicated.
SHARDED = {
    "blocks.attention.qkv.kernel": PartitionSpec(None, MODEL, None),
    "blocks.attention.projection.kernel": PartitionSpec(None, MODEL, None),
    "blocks.mlp.expand.kernel": PartitionSpec(None, MODEL, None),
    "blocks.mlp.contract.kernel": PartitionSpec(None, MODEL, None),
}

HEARTBEAT_SECONDS = 30  # JAX aborts a process this long after it lost contact with another process
GRACE_SECONDS = 5  # time for a process to exit by itself: often all processes raise the same error
MAX_WAIT_MS = 30 * 24 * 3600 * 1000
# Variables of launchers that JAX does not detect (Open MPI 5, MPICH): number of processes and index of this process.
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK", "PMI_SIZE PMI_RANK", "WORLD_SIZE RANK")


# --- the mesh ---


@contextmanager
def use_devices(count: int = 0, shard_params: bool = False) -> Iterator[Mesh]:
    """Within the context, use a mesh of `count` devices (0: all), the same number from each process.

    With `shard_params`, the parameters in SHARDED are sharded over all of these devices. Raises an InputError if there
    are fewer devices, or the processes cannot provide the same number.
    """
    devices, processes = jax.devices(), jax.process_count()
    total, kind = len(devices), devices[0].device_kind
    by_process = [[device for device in devices if device.process_index == k] for k in range(processes)]
    visible = [len(local) for local in by_process]
    if not 0 <= count <= total:
        problem = f"out of range, because JAX detects {plural(total, 'device')} ({kind})"
        raise InputError(option("devices", count), problem, f"Use a number from 0 (all) to {total}.")
    if len(set(visible)) > 1:
        problem = f"the processes detect {', '.join(map(str, visible))} devices, but need the same number"
        raise InputError("CUDA_VISIBLE_DEVICES", problem, "Hide the extra devices, or use other hosts.")
    if count % processes:
        problem = f"not a multiple of the number of processes, {processes}"
        raise InputError(option("devices", count), problem, f"Use a multiple of {processes}.")
    per_process = count // processes or visible[0]
    if per_process * processes > 1:
        log.info("%d devices share each batch (%s)", per_process * processes, kind)
    with _use_mesh([device for local in by_process for device in local[:per_process]], shard_params) as mesh:
        yield mesh


@contextmanager
def use_local_devices() -> Iterator[None]:
    """Within `use_devices`: use only the devices of this process, for work that each process does separately."""
    devices = jax.sharding.get_mesh().devices.flat
    with _use_mesh([device for device in devices if device.process_index == jax.process_index()], shard_params=False):
        yield


@contextmanager
def on_host() -> Iterator[None]:
    """Create arrays in host memory, because they may not fit on one device."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        host = jax.local_devices()[0]
    with jax.default_device(host), _use_mesh([host], shard_params=False):
        yield


@contextmanager
def _use_mesh(devices: Sequence[jax.Device], shard_params: bool) -> Iterator[Mesh]:
    shape = (1, len(devices)) if shard_params else (len(devices), 1)
    mesh = Mesh(np.array(devices).reshape(shape), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        yield mesh


def device_count() -> int:
    """Return how many devices share a batch."""
    return jax.sharding.get_abstract_mesh().size or 1


# --- sharding ---


def shardings(tree: T) -> T:
    """Return the sharding of each array or shape of a pytree; raise an InputError if an axis cannot be divided."""
    mesh = jax.sharding.get_abstract_mesh()

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = next((spec for part, spec in SHARDED.items() if f".{part}" in f".{name}"), REPLICATED)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                problem = f"{name} of shape {tuple(leaf.shape)} cannot be divided over {mesh.shape[axis]} devices"
                raise InputError(option("shard-params"), problem, f"Set {option('devices')} to a divisor of {size}.")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_on_devices(tree: T) -> T:
    """Place parameters, statistics or optimiser state on the devices of the mesh, sharded as `shardings` says."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    mesh = jax.sharding.get_mesh()

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        sharding = NamedSharding(mesh, sharding.spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)  # every process holds the whole array and uses the part for its own devices
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, tree, shardings(tree))


def constrain_sharding(tree: T) -> T:
    """Do what `place_on_devices` does, within a compiled function."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree))


def replicate(tree: T) -> T:
    """Within a compiled function: gather sharded arrays, so that every device holds all of them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, REPLICATED)


def local_rows(batch_size: int) -> range:
    """Return which rows of a batch the devices of this process compute; rows from `batch_size` on are padding."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return range(batch_size)
    rows_per_device = -(-batch_size // mesh.size)
    local = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return range(local[0] * rows_per_device, (local[-1] + 1) * rows_per_device)


def shard_batch(rows: T) -> T:
    """Shard a batch, or one array of it, over the devices; each process passes its own rows (see `local_rows`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), rows)


def map_over_devices(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a version of `function` that each device runs on its own rows of a batch, for code XLA cannot shard."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def global_max(value: int) -> int | jax.Array:
    """Return the maximum of a value over all processes, which must all call it; does not wait for the result."""
    if jax.process_count() == 1:
        return value
    mesh = jax.sharding.get_mesh()
    local = np.full(len(mesh.local_devices), value)
    return _max(jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), local))


@jax.jit
def _max(values: jax.Array) -> jax.Array:
    return replicate(values.max())


# --- several processes ---


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
        logging.basicConfig(force=True, format=f"process {index}: %(message)s", stream=sys.stdout)
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
