"""What a run ran on: packages, device, processor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# No JAX here: `python -m jaxla.info` reads a record in less time than JAX takes to import.

PACKAGES = (
    "jaxla",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "nibabel",
    "pillow",
)


def environment() -> dict[str, Any]:
    from jaxla.distributed import device_count, process_count
    from jaxla.hardware import first_local_device

    device = first_local_device()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": processor(),
        "devices": device_count(),
        "processes": process_count(),
    }


def processor() -> str:
    """Name and number of cores of this machine's processor; JAX calls every one of them `cpu`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def describe_device(of: Mapping[str, Any]) -> str:
    """What an `environment` ran on: `cpu: AMD EPYC 7B13, 8 cores`, or `gpu: NVIDIA H100, 4 of them, in 2 processes`."""
    count, processes = of.get("devices", 1), of.get("processes", 1)  # older records do not say
    name = f"cpu: {of['processor']}" if of["device"].startswith("cpu") and "processor" in of else of["device"]
    return name + (f", {count} of them" if count > 1 else "") + (f", in {processes} processes" if processes > 1 else "")
