"""A tensor of a checkpoint whose values are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxla.config import InputError


class Tensor(NamedTuple):
    """One tensor of a checkpoint; `read()` returns its values, with bfloat16 widened to float32."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def require_finite(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Return `array`, or raise an InputError if it contains NaN or infinite values."""
    if not np.isfinite(array).all():
        raise InputError(path, f"{name} contains NaN or infinite values", "Download the file again.")
    return array


def join_first(items: Iterable[str]) -> str:
    """Return the first three items as text, with `…` if there are more."""
    items = list(items)
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
