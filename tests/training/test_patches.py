"""preprocessing.patch_size: random patches are cut from training slices."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxla.training.patches import cut_patches

SIDE, PATCH, COUNT = 9, 4, 2000
STARTS = {(row, column) for row in range(6) for column in range(6)}
PIXEL = (1, 5)  # the only pixel of the structure
CONTAINING = {(row, column) for row in (0, 1) for column in (2, 3, 4, 5)}  # starts of the patches that contain it


def draw_starts(fraction, seed=0):
    """Return the start of one patch of each slice. Every other slice has a structure, of a single pixel."""
    grid = np.stack(np.indices((SIDE, SIDE)), -1)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[PIXEL] = 2
    images = np.repeat(grid[None].astype(np.float32), COUNT, 0)  # channels: the row and the column of the pixel
    masks = np.stack([mask, 0 * mask] * (COUNT // 2))
    cut = jax.jit(partial(cut_patches, PATCH, fraction))
    patches, patch_masks = map(np.asarray, cut(jax.random.key(seed), images, masks))
    starts = [tuple(map(int, patch[0, 0])) for patch in patches]
    for (row, column), patch, patch_mask, whole in zip(starts, patches, patch_masks, masks, strict=True):
        part = slice(row, row + PATCH), slice(column, column + PATCH)
        np.testing.assert_array_equal(patch, grid[part])
        np.testing.assert_array_equal(patch_mask, whole[part])
    return starts


def test_patches_cover_all_positions_and_are_determined_by_the_key():
    starts = draw_starts(0.0)
    counts = [starts.count(start) for start in STARTS]
    assert sum(counts) == COUNT
    assert min(counts) > COUNT / 36 / 2  # measured: 39; 56 are expected
    assert starts == draw_starts(0.0)
    assert starts != draw_starts(0.0, seed=1)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_given_fraction_of_patches_contains_the_structure(fraction):
    """All other patches may start anywhere."""
    starts = draw_starts(fraction)
    with_structure, without = starts[::2], starts[1::2]
    assert set(without) == STARTS
    assert set(with_structure) == (CONTAINING if fraction == 1 else STARTS)
    containing = np.mean([start in CONTAINING for start in with_structure])
    by_chance = len(CONTAINING) / len(STARTS)
    assert containing == pytest.approx(fraction + (1 - fraction) * by_chance, abs=0.05)
