"""Windows contain each voxel of a volume once, for any shape and any padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxla.models.ops.window_grid import WindowGrid

pytestmark = pytest.mark.usefixtures("fast_compilation")

SEEDS = range(20)


def random_grid(seed):
    """Return a random grid, and the number of slices of each of its three volumes."""
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(1, 12, 3))
    counts = tuple(int(rng.integers(1, n + 1)) for n in size)
    slices = rng.integers(counts[0], size[0] + 1, 3)
    return WindowGrid(counts, size, jnp.asarray(slices)), slices


def zero_padding(x, slices):
    """Return a copy of [B, D, …] in which the slices after the last one of each volume are zero."""
    x = x.copy()
    for volume, count in zip(x, slices, strict=True):
        volume[count:] = 0
    return x


@pytest.mark.parametrize("seed", SEEDS)
def test_cutting_and_assembling_returns_each_voxel_once(seed):
    grid, slices = random_grid(seed)
    x = np.random.default_rng(seed).standard_normal((3, *grid.size, 2), dtype=np.float32)

    @jax.jit  # one program instead of one for each operation
    def cut_and_assemble(x):
        windows = jax.lax.map(lambda index: grid.cut(x, index), grid.indices)
        assembled, vjp = jax.vjp(grid.assemble, windows)
        return windows, assembled, *vjp(jnp.ones_like(assembled))

    windows, assembled, used = cut_and_assemble(x)
    assert windows.shape == (np.prod(grid.counts), 3, *grid.window_shape, 2)
    np.testing.assert_array_equal(assembled, zero_padding(x, slices))

    # each voxel of the volume comes from one voxel of one window, and no voxel of a window is used twice
    assert set(np.unique(used)) <= {0.0, 1.0}
    assert used.sum() == slices.sum() * np.prod(grid.size[1:]) * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_window_sizes_differ_by_one_at_most(seed):
    grid, slices = random_grid(seed)
    present = np.asarray(jax.jit(jax.vmap(lambda index: grid.slice_numbers(index)[1]))(grid.indices)).sum(2)
    assert (present >= 1).all()
    assert (np.ptp(present, axis=0) <= 1).all()
    assert (present.reshape(*grid.counts, 3)[:, 0, 0].sum(0) == slices).all()


def test_division_matches_a_worked_example():
    """Three windows over seven slices start at 0, 2 and 4; two over five rows start at 0 and 2, the first padded."""
    grid = WindowGrid((3, 2, 1), (7, 5, 1), jnp.array([7]))
    x = jnp.arange(35.0).reshape(1, 7, 1, 5, 1, 1)  # with an axis between slices and rows, as features have
    assert grid.window_shape == (3, 3, 1)
    numbers, present = grid.slice_numbers(2)
    assert (numbers.tolist(), present.tolist()) == ([[2, 3, 4]], [[True, True, False]])
    np.testing.assert_array_equal(grid.cut(x, 2)[0, :, 0, :, 0, 0], [[10, 11, 11], [15, 16, 16], [15, 16, 16]])
    np.testing.assert_array_equal(grid.cut(x, 5)[0, :, 0, :, 0, 0], [[22, 23, 24], [27, 28, 29], [32, 33, 34]])


def test_windows_with_twice_the_resolution_are_assembled_with_twice_the_resolution():
    grid = WindowGrid((2, 2, 3), (5, 4, 7), jnp.array([5, 3]))
    fine = np.random.default_rng(0).standard_normal((2, 5, 8, 14, 1), dtype=np.float32)
    coarse = fine.reshape(2, 5, 4, 2, 7, 2, 1).transpose(0, 1, 3, 5, 2, 4, 6)  # [B, D, 2, 2, h, w, 1]
    windows = jax.lax.map(lambda index: grid.cut(coarse, index), grid.indices)
    n, batch, depth, _, _, h, w, _ = windows.shape
    windows = windows.transpose(0, 1, 2, 5, 3, 6, 4, 7).reshape(n, batch, depth, 2 * h, 2 * w, 1)
    fine[1, 3:] = 0
    np.testing.assert_array_equal(grid.assemble(windows), fine)


def test_division_does_not_depend_on_padding():
    x = np.random.default_rng(0).standard_normal((1, 16, 2, 2, 1), dtype=np.float32)
    plain, padded = (WindowGrid((3, 1, 1), (depth, 2, 2), jnp.array([8])) for depth in (8, 16))
    for index in plain.indices:
        numbers, present = padded.slice_numbers(index)
        plain_window, padded_window = (grid.cut(x[:, : grid.size[0]], index)[0] for grid in (plain, padded))
        is_present = np.asarray(present[0])
        np.testing.assert_array_equal(numbers[0][is_present], plain.slice_numbers(index)[0][0][: is_present.sum()])
        np.testing.assert_array_equal(padded_window[is_present], plain_window[: is_present.sum()])
