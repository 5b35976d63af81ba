"""Tiled inference: positions and weights of tiles, their merged logits, and resampling onto the scan's grid."""

import json
import tracemalloc
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.models.ops.tiles import gaussian_weights, tile_starts
from jaxla.nnunet.network import NNUNet
from jaxla.nnunet.plan import Configuration
from jaxla.nnunet.preprocessing import PreprocessedImage
from jaxla.nnunet.resampling import find_coarse_axis
from jaxla.nnunet.tiles import count_tiles, make_tile_logits, resample_to_scan
from tests.parity.test_nnunet import TINY
from tests.tiny import TINY_PLAN, randomise

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_tile_positions_equal_nnunet():
    for case in json.loads((GOLDEN / "nnunet_windows.json").read_text()):
        assert [tile_starts(n, side) for n, side in zip(case["image"], case["window"], strict=True)] == case["starts"]


def test_tile_weights_equal_nnunet():
    """They are equal up to a factor, which cancels in the weighted mean."""
    for name, expected in np.load(GOLDEN / "nnunet_importance.npz").items():
        weight = gaussian_weights([int(side) for side in name.split("x")])
        np.testing.assert_allclose(weight, expected / 10, rtol=1e-6, atol=1e-9)  # measured: 1.2e-7
        assert weight.min() > 0


class Identity(nnx.Module):
    """A network that returns the grey value of each voxel, and its column within the tile."""

    def __init__(self):
        self.unused = nnx.Param(jnp.zeros(1))

    def __call__(self, x, present=None):
        column = jnp.broadcast_to(jnp.arange(x.shape[-2], dtype=jnp.float32)[:, None], x.shape)
        return jnp.concatenate([x, column], -1)


def make_configuration(size):
    ones = tuple((1,) * len(size) for _ in range(2))
    return Configuration(2, tuple(size), size, (1.0,) * len(size), True, 2, (1, 1), ones, ones, (1, 1), (1,))


@pytest.mark.parametrize("size", [(4, 6, 6), (6, 6), (16, 20, 18), (40, 9)])
@pytest.mark.parametrize("shape", [(10, 13, 9), (1, 7, 30)])
def test_logits_return_to_their_voxels(size, shape):
    """Scans are larger or smaller than a tile; mirrored tiles are flipped back, so the mean column is the centre."""
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = list(make_tile_logits([Identity()], make_configuration(size))(image))
    found = np.stack(rows)
    assert found.shape == (*shape, 2)
    np.testing.assert_allclose(found[..., 0], image, atol=1e-5)  # measured: 1e-6
    np.testing.assert_allclose(found[..., 1], (size[-1] - 1) / 2, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_the_weighted_mean_of_all_mirrored_tiles(name):
    """The expected logits are computed by plain loops over tiles and flips."""
    configuration = TINY[name]
    networks = [randomise(nnx.eval_shape(lambda: NNUNet(configuration, 3, rngs=nnx.Rngs(0))), seed) for seed in (0, 1)]
    run = nnx.jit(lambda network, images: network(images))
    shape = (3, 20, 30) if name == "2d" else (10, 20, 15)
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    size = (1, *configuration.patch_size) if name == "2d" else configuration.patch_size
    total, weights = np.zeros((*shape, 3)), np.zeros(shape)
    for start in product(*(tile_starts(n, side) for n, side in zip(shape, size, strict=True))):
        part = tuple(slice(s, s + side) for s, side in zip(start, size, strict=True))
        tile = image[part][0] if name == "2d" else image[part]
        seen = []
        for axes in product((False, True), repeat=tile.ndim):
            flips = [axis for axis, flip in enumerate(axes) if flip]
            for network in networks:
                logits = np.asarray(run(network, np.flip(tile, flips)[None, ..., None].copy()))[0]
                seen.append(np.flip(logits, flips))
        mean = np.mean(seen, 0)
        weight = gaussian_weights(size)
        total[part] += (mean[None] if name == "2d" else mean) * weight[..., None]
        weights[part] += weight
    found = np.stack(list(make_tile_logits(networks, configuration)(image)))
    np.testing.assert_allclose(found, total / weights[..., None], atol=4e-6)  # measured: 8.7e-7


def test_memory_for_logits_does_not_grow_with_the_scan():
    """Slices of logits are freed once no further tile overlaps them."""
    tile_logits = make_tile_logits([Identity()], make_configuration((4, 32, 32)))
    peaks = {}
    for depth in (40, 400):
        image = np.ones((depth, 32, 32), np.float32)
        next(tile_logits(image))  # compiles
        tracemalloc.start()
        assert sum(1 for _ in tile_logits(image)) == depth
        peaks[depth] = tracemalloc.get_traced_memory()[1] - image.nbytes  # without the padded copy
        tracemalloc.stop()
    all_logits = 360 * 32 * 32 * (2 + 1) * 4  # bytes of the logits and weights of the additional slices
    assert peaks[400] - peaks[40] < 0.1 * all_logits  # measured: 0.001


GOLDEN_RESAMPLING = np.load(GOLDEN / "nnunet_resampling.npz")


@pytest.mark.parametrize("number", range(6))
def test_logits_on_the_scans_grid_equal_nnunet(number):
    logits, expected, scan, plan = (GOLDEN_RESAMPLING[f"{n}{number}"] for n in ("logits", "out_logits", "from", "to"))
    shape = expected.shape[1:]
    box = tuple(slice(0, side) for side in shape)
    image = PreprocessedImage(np.zeros(logits.shape[1:]), box, shape, tuple(scan), tuple(plan), (0, 1, 2))
    found = np.stack(list(resample_to_scan(iter(np.moveaxis(logits, 0, -1)), image)))
    np.testing.assert_allclose(found, np.moveaxis(expected, 0, -1), atol=1e-6)  # measured: 2.4e-7


@pytest.mark.parametrize(
    ("spacing", "coarse_axis"),
    [((1.0, 1.0, 5.0), 2), ((1.0, 3.5, 3.5), None), ((2.0, 2.0, 5.0), 0), ((1.0, 1.0, 1.0), 0)],
)
def test_resampling_to_the_scan_uses_the_coarse_axis_of_the_plan(spacing, coarse_axis):
    """nnU-Net first checks the spacing that it resamples from: the scan's for images, the plan's for logits."""
    target = (5.0, 1.0, 1.0)
    image = PreprocessedImage(
        np.zeros((4, 5, 5)), (slice(0, 20), slice(0, 2), slice(0, 2)), (20, 2, 2), spacing, target, ()
    )
    assert find_coarse_axis(image.spacing, image.new_spacing) == coarse_axis
    assert find_coarse_axis(image.new_spacing, image.spacing) == 0
    rows = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((4, 5, 5, 1), np.float32)
    back = np.stack(list(resample_to_scan(iter(rows), image)))[:, 0, 0, 0]
    np.testing.assert_array_equal(back, np.repeat(np.arange(4), 5))  # nearest, not interpolated


def test_2d_tiles_cover_each_slice_once_per_flip():
    batches = []

    class Counting(Identity):
        def __call__(self, x, present=None):
            jax.debug.callback(lambda batch: batches.append(np.array(batch)), x)
            return super().__call__(x)

    image = np.arange(1, 8, dtype=np.float32)[:, None, None] * np.ones((7, 6, 6), np.float32)
    list(make_tile_logits([Counting()], make_configuration((6, 6)))(image))
    jax.effects_barrier()
    tiles = np.concatenate(batches)
    for depth in range(1, 8):  # one tile for each of four flips
        assert np.count_nonzero((tiles == depth).all((1, 2, 3))) == 4


def test_count_tiles_includes_flips():
    class Scan:
        slice_axis, shape, spacing = "head-foot", (10, 13, 9), (1.0, 1.0, 1.0)

    plan = TINY_PLAN._replace(transpose_forward=(0, 1, 2))
    assert count_tiles([Scan, Scan], plan, make_configuration((4, 6, 6))) == 2 * 8 * (
        4 * 4 * 2
    )  # scans × flips × tiles
    assert count_tiles([Scan], plan, make_configuration((6, 6))) == 4 * 10 * (4 * 2)  # flips × slices × tiles
