"""The capabilities of the devices, and the variant of each operation that suits them.

Other modules do not query devices, except `jaxla.mesh`, which lists them to build its mesh. Variants are chosen
when JAX traces a function.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import jax
import jax.numpy as jnp
from filelock import FileLock, Timeout

from jaxla.config import InputError

AMPERE = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16 products and cuDNN attention

# Containers and schedulers limit the memory of a process with control groups. Controller ("" in version 2) -> mount
# point of its groups, and name of the file in each group that holds the limit.
CONTROL_GROUPS = Path("/proc/self/cgroup")
MEMORY_LIMITS = {"memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), "": ("/sys/fs/cgroup", "memory.max")}


MAX_COMPILED_BYTES = 2 * 1024**3  # above this size, JAX removes the least recently used programs
MIN_COMPILE_SECONDS = 0.2  # programs that compile faster are not kept


def require_devices() -> None:
    """Raise an InputError if JAX finds no device of the platforms in JAX_PLATFORMS."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if GPU support is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        problem = f"JAX finds no such device ({' '.join(str(error).split())[:200] or 'not installed'})"
        raise InputError(f"JAX_PLATFORMS={platforms}", problem, "Use JAX_PLATFORMS=cpu, or unset it.") from error


def require_float32() -> None:
    """Raise an InputError if JAX computes in float64 by default, which changes the results of the networks."""
    if jax.config.jax_enable_x64:
        fix = 'Call jax.config.update("jax_enable_x64", False) first.'
        raise InputError("jax_enable_x64", "is on, but the networks compute in float32", fix)


def keep_compiled_programs(cache_dir: Path) -> None:
    """Make JAX keep compiled programs in the cache folder: the next process starts sooner, with the same results.

    JAX_COMPILATION_CACHE_DIR sets another folder, and JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. Call this
    before the first program is compiled. If the folder cannot be written, nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    folder = cache_dir / "compiled" / _processor_key()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lockfile", timeout=10):  # JAX's own lock
            for program in folder.glob("*-cache"):
                # JAX writes the file with the access time last. If it is missing, the process was killed before that.
                if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                    program.unlink()
    except (OSError, Timeout):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_COMPILED_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def _processor_key() -> str:
    """Return a hash of the processor's features and cores: XLA's code may depend on them, but JAX's key does not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = "\n".join([platform.machine(), str(cores), *features])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def first_local_device() -> jax.Device:
    """Return the first device of this process."""
    return jax.local_devices()[0]


def device_name() -> str:
    """Return JAX's name of the first device, such as `NVIDIA H200`, or `cpu` for any CPU."""
    return jax.devices()[0].device_kind


def prefers_bfloat16(device: jax.Device) -> bool:
    """Return whether the device multiplies bfloat16 faster than float32; assumed for every AMD GPU and TPU."""
    if device.platform == "cpu":
        return False
    return not _is_nvidia(device) or _compute_capability(device) >= AMPERE


def supports_cudnn_attention(device: jax.Device) -> bool:
    """Return whether the device runs `jax.nn.dot_product_attention(implementation="cudnn")`, in bfloat16 or float16."""
    return _is_nvidia(device) and _compute_capability(device) >= AMPERE


def _is_nvidia(device: jax.Device) -> bool:
    return device.platform == "gpu" and "cuda" in device.client.platform_version  # "rocm …" for AMD GPUs


def _compute_capability(device: jax.Device) -> tuple[int, ...]:
    return tuple(map(int, device.compute_capability.split(".")))


def compute_dtype() -> jnp.dtype:
    """Return bfloat16 if all devices of all processes multiply it faster than float32, otherwise float32."""
    return jnp.bfloat16 if all(map(prefers_bfloat16, jax.devices())) else jnp.float32


def attention_variant(dtype: jnp.dtype) -> Literal["per_head", "cudnn", "xla"]:
    """Return how attention is computed: head by head (CPU), by cuDNN, or as batched matrix products (XLA)."""
    if on_cpu():
        return "per_head"
    return "cudnn" if dtype == jnp.bfloat16 and all(map(supports_cudnn_attention, jax.devices())) else "xla"


def convolution_variant() -> Literal["cpu", "xla"]:
    """Return whether convolutions and their gradients are rewritten for XLA's CPU compiler, or left to XLA."""
    return "cpu" if on_cpu() else "xla"


def fusion_variant() -> Literal["sums", "product"]:
    """Return how weighted sums of block features are computed: term by term, or as one matrix product.

    Sums are twice as fast on CPU. XLA's GPU compiler needs a minute for the sums of 12 blocks, and much longer for 40.
    """
    return "sums" if on_cpu() else "product"


def device_bytes() -> int:
    """Return the memory of a device, 0 if unknown; on CPU, the memory that this process may use."""
    if not on_cpu():
        return (first_local_device().memory_stats() or {}).get("bytes_limit", 0)
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_control_group_limits()])


def peak_device_bytes() -> int | None:
    """Return the peak memory use of the first device so far, None on CPU."""
    return (first_local_device().memory_stats() or {}).get("peak_bytes_in_use")


def peak_host_bytes() -> int | None:
    """Return the peak memory use of this process so far, None if the system does not report it."""
    try:
        import resource
    except ImportError:  # not Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _control_group_limits() -> Iterator[int]:
    """Yield the memory limits in bytes of this process's control groups and of their parents."""
    try:
        groups = [line.split(":", 2) for line in CONTROL_GROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, name in groups:
        for controller in MEMORY_LIMITS.keys() & controllers.split(","):
            mount, file = MEMORY_LIMITS[controller]
            for group in (PurePosixPath(name), *PurePosixPath(name).parents):
                try:
                    yield int(Path(f"{mount}/{group}", file).read_text())
                except (OSError, ValueError):  # no such file, or "max"
                    continue
