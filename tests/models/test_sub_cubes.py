"""Sub-cubes hold each place of a volume once, whatever its shape and however far it is filled up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxla.models.ops.sub_cubes import SubCubes

SHAPES = 20


def drawn(seed):
    """A division drawn at random, and the slices of each of three volumes in it."""
    draw = np.random.default_rng(seed)
    places = tuple(int(n) for n in draw.integers(1, 12, 3))
    counts = tuple(int(draw.integers(1, n + 1)) for n in places)
    slices = draw.integers(counts[0], places[0] + 1, 3)
    return SubCubes(counts, places, jnp.asarray(slices)), slices


def zero_beyond(x, slices):
    """[B, D, …] with zeros beyond each volume's own slices."""
    x = x.copy()
    for volume, own in zip(x, slices, strict=True):
        volume[own:] = 0
    return x


@pytest.mark.parametrize("seed", range(SHAPES))
def test_cut_and_assembled_every_place_is_there_once(seed):
    cubes, slices = drawn(seed)
    x = np.random.default_rng(seed).standard_normal((3, *cubes.places, 2), dtype=np.float32)
    parts = jax.lax.map(lambda number: cubes.cut(x, number), cubes.numbers)
    assert parts.shape == (np.prod(cubes.counts), 3, *cubes.shape, 2)
    whole, apart = jax.vjp(cubes.assemble, parts)
    np.testing.assert_array_equal(whole, zero_beyond(x, slices))

    # each place of the volume is taken from one place of one sub-cube, and no place of a sub-cube is taken twice
    (taken,) = apart(jnp.ones_like(whole))
    assert set(np.unique(taken)) <= {0.0, 1.0}
    assert taken.sum() == slices.sum() * np.prod(cubes.places[1:]) * 2


@pytest.mark.parametrize("seed", range(SHAPES))
def test_sub_cubes_differ_by_one_place_at_most_along_an_axis(seed):
    cubes, slices = drawn(seed)
    present = np.array([np.asarray(cubes.slices_of(n)[1]).sum(1) for n in cubes.numbers])
    assert (present >= 1).all()
    assert (np.ptp(present, axis=0) <= 1).all()
    assert (present.reshape(*cubes.counts, 3)[:, 0, 0].sum(0) == slices).all()


def test_a_division_by_hand():
    """Seven slices in three: from 0, 2 and 4 on; five rows in two: from 0 and 2 on, the first one filled up."""
    cubes = SubCubes((3, 2, 1), (7, 5, 1), jnp.array([7]))
    x = jnp.arange(35.0).reshape(1, 7, 1, 5, 1, 1)  # an axis between slices and rows, as of features' levels
    assert cubes.shape == (3, 3, 1)
    slices, present = cubes.slices_of(2)
    assert (slices.tolist(), present.tolist()) == ([[2, 3, 4]], [[True, True, False]])
    np.testing.assert_array_equal(cubes.cut(x, 2)[0, :, 0, :, 0, 0], [[10, 11, 11], [15, 16, 16], [15, 16, 16]])
    np.testing.assert_array_equal(cubes.cut(x, 5)[0, :, 0, :, 0, 0], [[22, 23, 24], [27, 28, 29], [32, 33, 34]])


def test_parts_so_many_times_as_fine_come_to_their_places():
    cubes = SubCubes((2, 2, 3), (5, 4, 7), jnp.array([5, 3]))
    fine = np.random.default_rng(0).standard_normal((2, 5, 8, 14, 1), dtype=np.float32)
    coarse = fine.reshape(2, 5, 4, 2, 7, 2, 1).transpose(0, 1, 3, 5, 2, 4, 6)  # [B, D, 2, 2, h, w, 1]
    parts = jax.lax.map(lambda number: cubes.cut(coarse, number), cubes.numbers)
    n, batch, depth, _, _, h, w, _ = parts.shape
    parts = parts.transpose(0, 1, 2, 5, 3, 6, 4, 7).reshape(n, batch, depth, 2 * h, 2 * w, 1)
    fine[1, 3:] = 0
    np.testing.assert_array_equal(cubes.assemble(parts), fine)


def test_how_a_volume_is_divided_does_not_depend_on_how_far_it_is_filled_up():
    x = np.random.default_rng(0).standard_normal((1, 16, 2, 2, 1), dtype=np.float32)
    as_it_is, filled = (SubCubes((3, 1, 1), (depth, 2, 2), jnp.array([8])) for depth in (8, 16))
    for number in as_it_is.numbers:
        slices, present = filled.slices_of(number)
        of_both = [np.asarray(cubes.cut(x[:, : cubes.places[0]], number)) for cubes in (as_it_is, filled)]
        own = np.asarray(present[0])
        np.testing.assert_array_equal(slices[0][own], as_it_is.slices_of(number)[0][0][: own.sum()])
        np.testing.assert_array_equal(of_both[1][0][own], of_both[0][0][: own.sum()])
