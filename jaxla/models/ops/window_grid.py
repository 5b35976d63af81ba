"""Divide volumes into 3D windows that cover them without overlap, and assemble the windows again.

An axis of length n is divided among k windows as evenly as possible: window i starts at ⌊i n / k⌋. All windows are cut
with the shape of the largest; a smaller one is padded, and the padding is dropped on assembly.

Volumes with different numbers of slices share one array, padded at the end. The division of a volume depends only on
its own slices, not on the padding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Counts = tuple[int, int, int]


class WindowGrid(NamedTuple):
    """The division of arrays [B, D, …, h, w, C] into windows. The index of a window may be a traced array."""

    counts: Counts  # number of windows along slices, rows and columns
    size: tuple[int, int, int]  # D, h, w
    slices: jax.Array  # [B], how many of the D slices belong to the volume; the rest is padding

    @property
    def indices(self) -> jax.Array:
        """The indices of all windows, ordered by slices, then rows, then columns."""
        return jnp.arange(math.prod(self.counts))

    @property
    def window_shape(self) -> tuple[int, int, int]:
        """d, h', w' of every window, padding included."""
        depth, rows, columns = (-(-n // k) for n, k in zip(self.size, self.counts, strict=True))
        return depth, rows, columns

    def cut(self, x: jax.Array, index: int | jax.Array) -> jax.Array:
        """Cut one window [B, d, …, h', w', C] out of [B, D, …, h, w, C], padded with its last slice, row and column."""
        _, *plane_indices = self._unravel(index)
        if self.counts[0] > 1:
            numbers, present = self.slice_numbers(index)
            last = numbers[:, :1] + jnp.maximum(present.sum(1, keepdims=True) - 1, 0)
            x = _take_slices(x, jnp.minimum(numbers, last))
        for axis, i in zip((1, 2), plane_indices, strict=True):
            n, k = self.size[axis], self.counts[axis]
            if k > 1:
                start, stop = i * n // k, (i + 1) * n // k
                rows = jnp.minimum(start + jnp.arange(self.window_shape[axis]), stop - 1)
                x = jnp.take(x, rows, axis=axis - 4, mode="clip")
        return x

    def slice_numbers(self, index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the index in the volume of each slice of a window, and False for padding, both [B, d]."""
        i = self._unravel(index)[0]
        start, stop = (j * self.slices // self.counts[0] for j in (i, i + 1))
        numbers = start[:, None] + jnp.arange(self.window_shape[0])
        return numbers, numbers < stop[:, None]

    def plane_size(self, index: int | jax.Array) -> tuple[int | jax.Array, int | jax.Array] | None:
        """Return how many rows and columns of a window are not padding, or None if no window has any."""
        _, *plane_indices = self._unravel(index)
        if not any(n % k for n, k in zip(self.size[1:], self.counts[1:], strict=True)):
            return None
        rows, columns = (
            (i + 1) * n // k - i * n // k for i, n, k in zip(plane_indices, self.size[1:], self.counts[1:], strict=True)
        )
        return rows, columns

    def assemble(self, windows: jax.Array) -> jax.Array:
        """Assemble windows [index, B, d, f·h', f·w', K], f times as fine, to [B, D, f·h, f·w, K]; padding becomes 0."""
        depth = self.window_shape[0]
        rows, columns = (
            [size * fine_side // side for size in self._sizes(axis)]
            for axis, fine_side, side in zip((1, 2), windows.shape[3:5], self.window_shape[1:], strict=True)
        )
        x = windows.reshape(*self.counts, *windows.shape[1:])
        x = jnp.concatenate([x[:, :, i, ..., :size, :] for i, size in enumerate(columns)], axis=-2)
        x = jnp.concatenate([x[:, i, ..., :size, :, :] for i, size in enumerate(rows)], axis=-3)
        x = jnp.moveaxis(x, 0, 1)  # [B, windows along slices, d, …]
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        slices, numbers = jnp.maximum(self.slices, 1)[:, None], jnp.arange(self.size[0])
        if self.counts[0] > 1:
            window = jnp.minimum(((numbers + 1) * self.counts[0] - 1) // slices, self.counts[0] - 1)
            x = _take_slices(x, window * depth + numbers - window * slices // self.counts[0])
        present = numbers < self.slices[:, None]
        return jnp.where(present[:, :, None, None, None], x, 0)

    def _sizes(self, axis: int) -> list[int]:
        """Return the sizes without padding of the windows along rows or columns."""
        n, k = self.size[axis], self.counts[axis]
        return [(i + 1) * n // k - i * n // k for i in range(k)]

    def _unravel(self, index: int | jax.Array) -> tuple[int | jax.Array, ...]:
        _, rows, columns = self.counts
        return index // (rows * columns), index // columns % rows, index % columns


def _take_slices(volumes: jax.Array, numbers: jax.Array) -> jax.Array:
    """Return the slices [B, d, …] of volumes [B, D, …] with these indices [B, d]."""
    return jax.vmap(lambda volume, numbers: jnp.take(volume, numbers, axis=0, mode="clip"))(volumes, numbers)
