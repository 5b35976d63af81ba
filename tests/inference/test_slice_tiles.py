"""preprocessing.patch_size: a network reads slices in overlapping tiles, whose logits are averaged."""

from itertools import product

import numpy as np
import pytest
from flax import nnx

from jaxla.inference.segment import mean_probabilities
from jaxla.models.ops.tiles import apply_in_tiles, gaussian_weights, tile_starts

IMAGES = np.random.default_rng(0).random((2, 20, 13, 3), np.float32)  # 2.5D: three channels


class Pointwise(nnx.Module):
    """A network whose logits at a pixel depend only on the channels of this pixel."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def __call__(self, images):
        return images @ self.kernel[...]


def apply_ramp(images, present=None):
    """A network for tiles of 8 × 8 pixels, whose logits depend on the position within the tile."""
    assert images.shape[1:3] == (8, 8)
    ramp = np.arange(64, dtype=np.float32).reshape(8, 8, 1)
    return images * ramp if present is None else images * ramp * present[:, None, None, None]


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_tiles_change_nothing_for_pointwise_networks(classes, flips):
    kernels = np.random.default_rng(1).standard_normal((2, 3, classes)).astype(np.float32)
    networks = [Pointwise(kernel) for kernel in kernels]
    found, expected = (mean_probabilities(networks, flips, tile_size)(IMAGES) for tile_size in (8, 0))
    assert found.shape == (2, 20, 13, classes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)  # measured: 1.2e-7


def test_logits_are_the_mean_of_all_tiles_weighted_towards_their_centres():
    """The expected logits are computed by plain loops in float64."""
    total, weights = np.zeros(IMAGES.shape), np.zeros((20, 13, 1))
    weight = gaussian_weights((8, 8))[..., None].astype(float)
    for row, column in product(tile_starts(20, 8), tile_starts(13, 8)):
        part = slice(row, row + 8), slice(column, column + 8)
        total[:, *part] += weight * apply_ramp(IMAGES[:, *part])
        weights[part] += weight
    expected = total / weights
    np.testing.assert_allclose(apply_in_tiles(apply_ramp, 8, IMAGES), expected, rtol=1e-5)  # measured: 3e-7
    masked = apply_in_tiles(apply_ramp, 8, IMAGES, np.array([1, 0], np.float32))
    np.testing.assert_allclose(masked[0], expected[0], rtol=1e-5)
    assert not masked[1].any()
