"""Volumes divided into sub-cubes that do not overlap and leave nothing out, and put together again.

Along each axis n places are divided among k sub-cubes as evenly as whole numbers allow: sub-cube i takes those from
⌊i n / k⌋ on. All are cut with one shape, that of the largest; what a smaller one lacks is filled up and dropped again.

Volumes of several numbers of slices stand in one array, the shorter ones filled up behind. How each is divided follows
from its own slices alone, not from how far it is filled up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Counts = tuple[int, int, int]


class SubCubes(NamedTuple):
    """How arrays [B, D, …, h, w, C] are divided; a sub-cube is named by its number, which may be traced.

    Attributes:
        counts: of sub-cubes along slices, rows and columns.
        places: D, h, w.
        slices: [B], how many of the D slices are the volume's, the first ones.
    """

    counts: Counts
    places: tuple[int, int, int]
    slices: jax.Array

    @property
    def numbers(self) -> jax.Array:
        """Of all sub-cubes: slices, then rows, then columns."""
        return jnp.arange(math.prod(self.counts))

    @property
    def shape(self) -> tuple[int, int, int]:
        """d, h', w' of every sub-cube."""
        depth, rows, columns = (-(-n // k) for n, k in zip(self.places, self.counts, strict=True))
        return depth, rows, columns

    def cut(self, x: jax.Array, number: int | jax.Array) -> jax.Array:
        """One sub-cube of [B, D, …, h, w, C]: [B, d, …, h', w', C], filled up with its last slice, row and column."""
        of_slices, *of_plane = self._along(number)
        if self.counts[0] > 1:
            taken, present = self._slices(of_slices)
            inside = jnp.minimum(taken, taken[:, :1] + jnp.maximum(present.sum(1, keepdims=True) - 1, 0))
            x = _take_slices(x, inside)
        for axis, i in zip((1, 2), of_plane, strict=True):
            n, k = self.places[axis], self.counts[axis]
            if k > 1:
                first, beyond = i * n // k, (i + 1) * n // k
                inside = jnp.minimum(first + jnp.arange(self.shape[axis]), beyond - 1)
                x = jnp.take(x, inside, axis=axis - 4, mode="clip")
        return x

    def slices_of(self, number: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, d] of a sub-cube: which slice of the volume each is, and whether it is one rather than filled up."""
        return self._slices(self._along(number)[0])

    def plane_of(self, number: int | jax.Array) -> tuple[int | jax.Array, int | jax.Array] | None:
        """How many rows and columns of a sub-cube are its own, the first ones; None where all sub-cubes fill theirs."""
        _, *i = self._along(number)
        if not any(n % k for n, k in zip(self.places[1:], self.counts[1:], strict=True)):
            return None
        rows, columns = (
            (j + 1) * n // k - j * n // k for j, n, k in zip(i, self.places[1:], self.counts[1:], strict=True)
        )
        return rows, columns

    def assemble(self, parts: jax.Array) -> jax.Array:
        """Sub-cubes [number, B, d, f·h', f·w', K], so many times as fine, to [B, D, f·h, f·w, K].

        Slices beyond the volume's own are 0.
        """
        depth = self.shape[0]
        rows, columns = (
            [size * side // of_cube for size in self._sizes(axis)]
            for axis, side, of_cube in zip((1, 2), parts.shape[3:5], self.shape[1:], strict=True)
        )
        parts = parts.reshape(*self.counts, *parts.shape[1:])
        parts = jnp.concatenate([parts[:, :, i, ..., :size, :] for i, size in enumerate(columns)], axis=-2)
        parts = jnp.concatenate([parts[:, i, ..., :size, :, :] for i, size in enumerate(rows)], axis=-3)
        whole = jnp.moveaxis(parts, 0, 1)  # [B, sub-cubes along slices, d, …]
        whole = whole.reshape(whole.shape[0], -1, *whole.shape[3:])
        slices, all_slices = jnp.maximum(self.slices, 1)[:, None], jnp.arange(self.places[0])
        if self.counts[0] > 1:
            cube = jnp.minimum(((all_slices + 1) * self.counts[0] - 1) // slices, self.counts[0] - 1)
            chosen = cube * depth + all_slices - cube * slices // self.counts[0]
            whole = _take_slices(whole, chosen)
        present = all_slices < self.slices[:, None]
        return jnp.where(present[:, :, None, None, None], whole, 0)

    def _sizes(self, axis: int) -> list[int]:
        """Of the sub-cubes along rows or columns."""
        n, k = self.places[axis], self.counts[axis]
        return [(i + 1) * n // k - i * n // k for i in range(k)]

    def _along(self, number: int | jax.Array) -> tuple[int | jax.Array, ...]:
        _, rows, columns = self.counts
        return number // (rows * columns), number // columns % rows, number % columns

    def _slices(self, i: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        first, beyond = (j * self.slices // self.counts[0] for j in (i, i + 1))
        taken = first[:, None] + jnp.arange(self.shape[0])
        return taken, taken < beyond[:, None]


def _take_slices(volumes: jax.Array, chosen: jax.Array) -> jax.Array:
    """[B, D, …] and [B, d] -> [B, d, …]."""
    return jax.vmap(lambda volume, of_volume: jnp.take(volume, of_volume, axis=0, mode="clip"))(volumes, chosen)
