"""The environment of a run: packages, devices and processor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# JAX is imported within functions: `python -m jaxla.info` reads a record faster than JAX can be imported.

PACKAGES = (
    "jaxla", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "nibabel", "pillow",
)  # fmt: skip

# Environment variables that change how JAX and XLA compute, except those that commands set (jaxla.cli.start).
NUMERIC_SETTINGS = (
    "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_RANDOM_SEED_OFFSET",
    "JAX_THREEFRY_GPU_KERNEL_LOWERING", "JAX_DISABLE_JIT", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_OPTIMIZATION_LEVEL",
    "JAX_ALLOW_F16_REDUCTIONS", "JAX_HIGH_DYNAMIC_RANGE_GUMBEL", "XLA_FLAGS", "LIBTPU_INIT_ARGS",
    "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the packages, devices and processor of this process, ready for JSON."""
    from jaxla.distributed import process_count
    from jaxla.hardware import first_local_device
    from jaxla.mesh import device_count

    device = first_local_device()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": processor(),
        "devices": device_count(),
        "processes": process_count(),
        "settings": {name: os.environ[name] for name in NUMERIC_SETTINGS if os.environ.get(name)},
    }


def processor() -> str:
    """Return this machine's processor and its number of cores; JAX's name of every processor is `cpu`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def describe_device(environment: Mapping[str, Any]) -> str:
    """Return the devices of an environment in words.

    Examples: `cpu: AMD EPYC 7B13, 8 cores`; `gpu: NVIDIA H100, 4 devices, in 2 processes`.
    """
    name = environment["device"]
    if name.startswith("cpu"):
        name = f"cpu: {environment['processor']}"
    count, processes = environment["devices"], environment["processes"]
    return name + (f", {count} devices" if count > 1 else "") + (f", in {processes} processes" if processes > 1 else "")
