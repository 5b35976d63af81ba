"""What a device computes with: bfloat16 or float32, cuDNN's attention or XLA's own."""

from __future__ import annotations

import jax

AMPERE = (8, 0)  # NVIDIA's first generation that multiplies bfloat16, and that cuDNN's attention runs on


def prefers_bfloat16(device: jax.Device) -> bool:
    """Whether products of bfloat16 are faster there than those of float32; of AMD's GPUs it is taken for granted."""
    if device.platform == "cpu":
        return False
    return not _is_nvidia(device) or _generation(device) >= AMPERE


def supports_cudnn_attention(device: jax.Device) -> bool:
    """Whether `jax.nn.dot_product_attention(implementation="cudnn")` runs there; it needs bfloat16 or float16."""
    return _is_nvidia(device) and _generation(device) >= AMPERE


def _is_nvidia(device: jax.Device) -> bool:
    return device.platform == "gpu" and "cuda" in device.client.platform_version  # "rocm …" of AMD's


def _generation(device: jax.Device) -> tuple[int, ...]:
    return tuple(map(int, device.compute_capability.split(".")))


def device_name() -> str:
    """Return the kind of device that computes, such as `NVIDIA H200` or `cpu`."""
    return jax.devices()[0].device_kind


def first_device() -> jax.Device:
    """Return this process's first device."""
    return jax.local_devices()[0]
