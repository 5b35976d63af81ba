"""Which process of how many this one is, and where they meet: from the options, from SLURM, or from Open MPI."""

from __future__ import annotations

import importlib.util
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxla.config import InputError

PORTS = range(61440, 65536)  # above those that Linux hands out by itself; one of them by the job's number


@dataclass(frozen=True)
class Launch:
    """One process of several that run a command together.

    Attributes:
        coordinator: HOST:PORT at which process 0 is met.
        count: of processes.
        index: of this one.
        own_devices: whether what this process sees is its own, not shared with others on its host.
    """

    coordinator: str
    count: int
    index: int
    own_devices: bool = False


def find_launch(coordinator: str, count: int | None, index: int | None, environ: Mapping[str, str]) -> Launch | None:
    """How this process was launched; None where it is the only one.

    What the options leave out (an empty string, None) is taken from the launcher's environment.

    Raises:
        InputError: too little is said, or what does not fit together.
    """
    found = _from_slurm(environ) or _from_open_mpi(environ)
    if count is None and found is None:
        for name in ("PMI_SIZE", "WORLD_SIZE"):
            if environ.get(name, "").isdigit() and int(environ[name]) > 1:
                raise InputError(
                    f"started as one of {environ[name]} by a launcher that is not recognised ({name}); give "
                    "--coordinator=HOST:PORT, --processes and --process, or --processes=1 for runs of their own"
                )
    if count == 1 or (not coordinator and count is None and index is None and (found is None or found.count == 1)):
        return None
    coordinator = coordinator or (found.coordinator if found else "")
    count = found.count if count is None and found else count
    index = found.index if index is None and found else index
    for option, value in (("--coordinator", coordinator), ("--processes", count), ("--process", index)):
        if value in ("", None):
            raise InputError(
                f"option {option} is missing: several processes need --coordinator=HOST:PORT (where process 0 runs, "
                "and a free port there), --processes=N and --process=0 to N-1; under SLURM start them with srun"
            )
    if not re.fullmatch(r".+:\d{1,5}", coordinator) or not 0 < int(coordinator.rsplit(":", 1)[1]) < 65536:
        raise InputError(f"option --coordinator={coordinator}: expected HOST:PORT, such as node1:62000")
    if count < 1:
        raise InputError(f"option --processes={count}: must be 1 or more")
    if not 0 <= index < count:
        raise InputError(f"option --process={index}: must be from 0 to {count - 1}, for --processes={count}")
    return Launch(coordinator, count, index, found is not None and found.own_devices)


def gpus_of(launch: Launch, members: Sequence[Mapping[str, Any]], gpus: int) -> list[int]:
    """Which of the GPUs that this process sees are its own: a share where others on its host see the same; [] for all.

    Args:
        members: what each process says of itself: its `host`, and its `visible` devices (CUDA_VISIBLE_DEVICES).
        gpus: that this process sees.

    Raises:
        InputError: there are fewer than processes that share them.
    """
    host = members[launch.index]["host"]
    here = [k for k, member in enumerate(members) if member["host"] == host]
    each_its_own = launch.own_devices or len({members[k]["visible"] for k in here}) == len(here)
    if each_its_own or not gpus:
        return []
    if gpus < len(here):
        raise InputError(
            f"{host}: {len(here)} processes run there, and share {gpus} GPUs; start one process a host, or give each "
            "its own GPUs (srun --gpus-per-task=1)"
        )
    each = gpus // len(here)
    return [here.index(launch.index) * each + i for i in range(each)]


def count_gpus() -> int:
    """NVIDIA GPUs that JAX will see in this process, found without starting CUDA."""
    platforms, visible = (os.environ.get(name) for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"))
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return 0
    if visible is not None:
        return 0 if visible in ("", "-1") else len(visible.split(","))
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def _from_slurm(environ: Mapping[str, str]) -> Launch | None:
    """A task of a job step: what `srun` starts. Within a job, but not by `srun`, a process is the only one."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(name in environ for name in names):
        return None
    job, step, nodes, count, index = (environ[name] for name in names)
    return Launch(
        coordinator=f"{first_host(nodes)}:{_port(f'{job}.{step}')}",
        count=int(count),
        index=int(index),
        own_devices="SLURM_GPUS_PER_TASK" in environ,
    )


def _from_open_mpi(environ: Mapping[str, str]) -> Launch | None:
    """A rank of `mpirun`; where it meets the others is told by Open MPI 4, and plain where all are on one host."""
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if not all(name in environ for name in names):
        return None
    count, index, here = (int(environ[name]) for name in names)
    launcher = re.search(r"tcp6?://\[?([^,:\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    host = "127.0.0.1" if here == count else launcher[1] if launcher else ""
    job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", ""))
    return Launch(f"{host}:{_port(job)}" if host else "", count, index)


def first_host(nodes: str) -> str:
    """The first of a SLURM list of hosts, such as `node[007-012,15],login1`."""
    prefix, numbers, suffix = re.match(r"([^,\[]*)(?:\[([^,\-\]]*)[^\]]*\])?([^,\[]*)", nodes).groups()
    return f"{prefix}{numbers or ''}{suffix}"


def _port(job: str) -> int:
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]
