"""The atlas baseline: the mean training mask, transferred between grids without a shift."""

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.evaluation.atlas import GRID_SIZE, THRESHOLDS, Atlas, apply_atlas, build_atlas, choose_threshold


def cuboid(shape, starts, stops, value=1):
    """Return a mask with a box between fractions of each axis, as class `value`."""
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(round(a * n), round(b * n)) for a, b, n in zip(starts, stops, shape, strict=True))] = value
    return mask


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("shape", [(GRID_SIZE, GRID_SIZE, GRID_SIZE), (96, 48, 24), (40, 56, 31)])
def test_the_atlas_of_one_mask_reproduces_it(shape):
    mask = cuboid(shape, (0.25, 0.25, 0.25), (0.5, 0.75, 0.75))
    back = apply_atlas(build_atlas([mask], 1), shape)
    assert back.dtype == np.uint8
    assert back.shape == shape
    assert dice(back == 1, mask == 1) > 0.93
    if shape == (GRID_SIZE, GRID_SIZE, GRID_SIZE):
        np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("shape", [(12, 33, 64), (47, 49, 200)])
def test_transfer_between_grids_causes_no_shift(shape):
    """Half-voxel centres in both directions keep a symmetric mask symmetric."""
    mask = cuboid(shape, (0.25, 0.25, 0.25), (0.75, 0.75, 0.75))
    mask = mask | mask[::-1] | mask[:, ::-1] | mask[:, :, ::-1]
    atlas = build_atlas([mask], 1)
    for axis in range(3):
        np.testing.assert_allclose(atlas.probabilities, np.flip(atlas.probabilities, axis + 1), atol=1e-5)
    back = apply_atlas(atlas, (50, 60, 71))
    # A shift of half a voxel would be 0.5. Rounding decides about voxels exactly at the threshold.
    assert np.abs(np.argwhere(back).mean(axis=0) - np.array([24.5, 29.5, 35])).max() < 0.02


def test_probabilities_are_the_mean_over_cases_of_any_shape():
    left, right = cuboid((48, 48, 48), (0, 0, 0), (0.5, 1, 1)), cuboid((96, 96, 96), (0.5, 0, 0), (1, 1, 1))
    atlas = build_atlas(iter([left, left, left, right]), 1)
    assert atlas.probabilities.shape == (1, GRID_SIZE, GRID_SIZE, GRID_SIZE)
    assert atlas.probabilities.dtype == np.float32
    assert atlas.probabilities[0, 4, 4, 4] == pytest.approx(0.75)
    assert atlas.probabilities[0, -4, 4, 4] == pytest.approx(0.25)


def test_every_voxel_of_a_large_volume_contributes_to_the_atlas():
    mask = np.zeros((480, 48, 48), np.uint8)
    mask[243] = 1  # one of the ten planes in an atlas cell
    assert build_atlas([mask], 1).probabilities.sum() == pytest.approx(GRID_SIZE**3 / 480, rel=1e-3)


def test_foreground_voxels_get_the_most_probable_class():
    probabilities = np.zeros((2, GRID_SIZE, GRID_SIZE, GRID_SIZE), np.float32)
    probabilities[:, :16] = [[[[0.25]]], [[[0.375]]]]
    probabilities[:, 16:32] = [[[[0.375]]], [[[0.25]]]]
    probabilities[:, 32:] = [[[[0.5]]], [[[0.0]]]]
    labels = apply_atlas(Atlas(probabilities, threshold=0.625), (GRID_SIZE, 2, 2))
    assert labels[:, 0, 0].tolist() == [2] * 16 + [1] * 16 + [0] * 16


def test_the_threshold_has_the_best_mean_dice_on_the_validation_masks():
    rng = np.random.default_rng(0)

    def case():
        start = rng.uniform(0.1, 0.4, size=3)
        shape = tuple(rng.integers(20, 40, size=3))
        first = cuboid(shape, start, start + 0.4)
        second = cuboid(shape, start + np.array([0, 0, 0.2]), start + 0.4, 2)
        return np.where(second > 0, second, first)

    validation = [case() for _ in range(4)]
    atlas = choose_threshold(build_atlas((case() for _ in range(12)), 2), iter(validation))

    def mean_dice(threshold):
        predictions = [apply_atlas(Atlas(atlas.probabilities, float(threshold)), mask.shape) for mask in validation]
        return np.mean([[dice(p == c, m == c) for c in (1, 2)] for p, m in zip(predictions, validation, strict=True)])

    values = [mean_dice(t) for t in THRESHOLDS]
    assert atlas.threshold == THRESHOLDS[np.argmax(values)]
    assert 0.05 < atlas.threshold < 0.95
    assert max(values) > max(values[0], values[-1])


def test_an_atlas_without_masks_is_an_error():
    with pytest.raises(InputError, match="training mask"):
        build_atlas([], 1)
    with pytest.raises(InputError, match="validation mask"):
        choose_threshold(Atlas(np.zeros((1, GRID_SIZE, GRID_SIZE, GRID_SIZE), np.float32)), [])
