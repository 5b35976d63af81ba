"""The sliding window: where it stands, what it weighs, what it says, and the way back onto the scan's grid."""

import json
import tracemalloc
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.nnunet.network import NNUNet
from jaxla.nnunet.plan import Configuration
from jaxla.nnunet.preprocessing import PlannedImage
from jaxla.nnunet.tiles import count_tiles, gaussian_weights, make_tile_logits, resample_to_scan, tile_starts
from tests.parity.test_nnunet import TINY
from tests.tiny import TINY_PLAN, randomise

GOLDEN = Path(__file__).parents[1] / "golden"


def test_windows_stand_where_nnunets_do():
    for of in json.loads((GOLDEN / "nnunet_windows.json").read_text()):
        assert [tile_starts(n, side) for n, side in zip(of["image"], of["window"], strict=True)] == of["starts"]


def test_windows_weigh_what_nnunets_do():
    """Up to a factor, which the sum over windows takes out again."""
    for name, expected in np.load(GOLDEN / "nnunet_importance.npz").items():
        weight = gaussian_weights([int(side) for side in name.split("x")])
        np.testing.assert_allclose(weight, expected / 10, rtol=1e-6, atol=1e-9)  # measured: 1.2e-7
        assert weight.min() > 0


class Grey(nnx.Module):
    """Gives each voxel's grey value, and where it lies in the window from left to right."""

    def __init__(self):
        self.nothing = nnx.Param(jnp.zeros(1))

    def __call__(self, x, present=None):
        place = jnp.broadcast_to(jnp.arange(x.shape[-2], dtype=jnp.float32)[:, None], x.shape)
        return jnp.concatenate([x, place], -1)


def configuration(size):
    ones = tuple((1,) * len(size) for _ in range(2))
    return Configuration(2, tuple(size), size, (1.0,) * len(size), True, 2, (1, 1), ones, ones, (1, 1), (1,))


@pytest.mark.parametrize("size", [(4, 6, 6), (6, 6), (16, 20, 18), (40, 9)])
@pytest.mark.parametrize("shape", [(10, 13, 9), (4, 6, 6), (1, 7, 30)])
def test_every_voxel_comes_back_where_it_was(size, shape):
    """Of scans larger and smaller than a window; mirrored windows are turned back, so that left is right as often."""
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = list(make_tile_logits([Grey()], configuration(size))(image))
    found = np.stack(rows)
    assert found.shape == (*shape, 2)
    np.testing.assert_allclose(found[..., 0], image, atol=1e-5)  # measured: 1e-6
    np.testing.assert_allclose(found[..., 1], (size[-1] - 1) / 2, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_the_weighted_mean_of_all_mirrored_windows(name):
    """Written out, one window and one way of mirroring after the other."""
    c = TINY[name]
    networks = [randomise(nnx.eval_shape(lambda: NNUNet(c, 3, rngs=nnx.Rngs(0))), seed) for seed in (0, 1)]
    shape = (3, 20, 30) if name == "2d" else (10, 20, 15)
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    size = (1, *c.patch_size) if name == "2d" else c.patch_size
    total, weights = np.zeros((*shape, 3)), np.zeros(shape)
    for start in product(*(tile_starts(n, side) for n, side in zip(shape, size, strict=True))):
        part = tuple(slice(s, s + side) for s, side in zip(start, size, strict=True))
        window = image[part][0] if name == "2d" else image[part]
        seen = []
        for axes in product((False, True), repeat=window.ndim):
            flips = [axis for axis, flip in enumerate(axes) if flip]
            for network in networks:
                logits = np.asarray(network(jnp.asarray(np.flip(window, flips)[None, ..., None].copy())))[0]
                seen.append(np.flip(logits, flips))
        mean = np.mean(seen, 0)
        weight = gaussian_weights(size)
        total[part] += (mean[None] if name == "2d" else mean) * weight[..., None]
        weights[part] += weight
    found = np.stack(list(make_tile_logits(networks, c)(image)))
    np.testing.assert_allclose(found, total / weights[..., None], atol=4e-6)  # measured: 8.7e-7


def test_memory_does_not_grow_with_the_scan():
    """But for the scan itself: of logits those slices are held that a window may still reach."""
    window_logits = make_tile_logits([Grey()], configuration((4, 32, 32)))
    peaks = {}
    for depth in (40, 400):
        image = np.ones((depth, 32, 32), np.float32)
        next(window_logits(image))  # compiles
        tracemalloc.start()
        assert sum(1 for _ in window_logits(image)) == depth
        peaks[depth] = tracemalloc.get_traced_memory()[1] - image.nbytes  # the padded copy
        tracemalloc.stop()
    of_logits = 360 * 32 * 32 * (2 + 1) * 4  # of the slices more, and their weights
    assert peaks[400] - peaks[40] < 0.1 * of_logits  # measured: 0.001


GOLDEN_RESAMPLING = np.load(GOLDEN / "nnunet_resampling.npz")


@pytest.mark.parametrize("number", range(6))
def test_logits_go_back_onto_the_scans_grid_as_nnunets_do(number):
    logits, expected, scan, planned = (
        GOLDEN_RESAMPLING[f"{n}{number}"] for n in ("logits", "out_logits", "from", "to")
    )
    shape = expected.shape[1:]
    box = tuple(slice(0, side) for side in shape)
    image = PlannedImage(np.zeros(logits.shape[1:]), box, shape, tuple(scan), tuple(planned), (0, 1, 2))
    found = np.stack(list(resample_to_scan(iter(np.moveaxis(logits, 0, -1)), image)))
    np.testing.assert_allclose(found, np.moveaxis(expected, 0, -1), atol=1e-6)  # measured: 2.4e-7


@pytest.mark.parametrize(
    ("spacing", "there"), [((1.0, 1.0, 5.0), 2), ((1.0, 3.5, 3.5), None), ((2.0, 2.0, 5.0), 0), ((1.0, 1.0, 1.0), 0)]
)
def test_where_two_axes_are_coarse_the_plans_counts_on_the_way_back(spacing, there):
    """nnU-Net asks first of what it resamples from: the scan on the way there, the plan's spacing on the way back."""
    target = (5.0, 1.0, 1.0)
    image = PlannedImage(np.zeros((4, 5, 5)), (slice(0, 20), slice(0, 2), slice(0, 2)), (20, 2, 2), spacing, target, ())
    assert image.separate == there
    assert image.separate_back == 0
    rows = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((4, 5, 5, 1), np.float32)
    back = np.stack(list(resample_to_scan(iter(rows), image)))[:, 0, 0, 0]
    np.testing.assert_array_equal(back, np.repeat(np.arange(4), 5))  # the nearest slice, and nothing between


def test_of_slices_each_is_seen_once_from_each_place():
    seen = []

    class Counting(Grey):
        def __call__(self, x, present=None):
            jax.debug.callback(lambda batch: seen.append(np.array(batch)), x)
            return super().__call__(x)

    image = np.arange(1, 8, dtype=np.float32)[:, None, None] * np.ones((7, 6, 6), np.float32)
    list(make_tile_logits([Counting()], configuration((6, 6)))(image))
    jax.effects_barrier()
    windows = np.concatenate(seen)
    for depth in range(1, 8):  # in four ways of mirroring
        assert np.count_nonzero((windows == depth).all((1, 2, 3))) == 4


def test_windows_are_counted():
    class Scan:
        slice_axis, shape, spacing = "head-foot", (10, 13, 9), (1.0, 1.0, 1.0)

    plan = TINY_PLAN._replace(transpose_forward=(0, 1, 2))
    assert count_tiles([Scan, Scan], plan, configuration((4, 6, 6))) == 2 * 8 * (4 * 4 * 2)
    assert count_tiles([Scan], plan, configuration((6, 6))) == 4 * 10 * (4 * 2)
