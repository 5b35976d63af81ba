"""nnU-Net's augmentation: each change against its own code, how often it comes, and what does not change."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxla.nnunet.augmentation import (
    NNUNET,
    Chances,
    at_low_resolution,
    blurred,
    contrasted,
    gamma_changed,
    make_augment,
    moved,
    read_size,
    turning,
)

GOLDEN = Path(__file__).parents[1] / "golden"
OF = np.load(GOLDEN / "nnunet_augmentation.npz")
IMAGE = jnp.asarray(OF["image"])


@pytest.mark.parametrize("name", ["3d", "3d_small", "2d", "still"])
def test_turning_and_scaling_are_nnunets(name):
    """About all three axes, larger and smaller, in a plane, and not at all; of masks every voxel is the same."""
    image, mask = moved(
        jnp.asarray(OF[f"{name}_image"]),
        jnp.asarray(OF[f"{name}_mask"], jnp.int8),
        jnp.asarray(OF[f"{name}_angles"]),
        jnp.asarray(OF[f"{name}_scale"]),
        size=tuple(OF[f"{name}_size"].tolist()),
        classes=2,
        happens=jnp.asarray(name != "still"),
    )
    np.testing.assert_allclose(image, OF[f"{name}_out"], atol=1e-5)  # measured: 4e-6, of values up to 4
    np.testing.assert_array_equal(mask, OF[f"{name}_out_mask"])


@pytest.mark.parametrize("number", range(3))
def test_blur_resolution_and_gamma_are_nnunets(number):
    blur, low, gamma = (OF[f"{name}{number}"] for name in ("blur", "low", "gamma"))
    np.testing.assert_allclose(blurred(IMAGE, OF[f"sigmas{number}"]), blur, atol=2e-6)  # measured: 4.8e-7
    np.testing.assert_allclose(at_low_resolution(IMAGE, OF[f"resolution{number}"]), low, atol=5e-6)  # measured: 1.5e-6
    sign = -1 if OF[f"inverted{number}"] else 1
    changed = sign * gamma_changed(sign * IMAGE, OF[f"exponent{number}"])
    np.testing.assert_allclose(changed, gamma, atol=1e-5)  # measured: 2.4e-6


def test_contrast_is_nnunets():
    np.testing.assert_allclose(contrasted(IMAGE, 1.2), OF["contrast"], atol=1e-6)  # measured: 2.4e-7


def test_what_is_read_is_as_large_as_nnunets():
    sizes = json.loads((GOLDEN / "nnunet_read_sizes.json").read_text())
    assert [list(read_size(patch)) for patch in sizes["patch"]] == sizes["read"]


def test_how_patches_are_turned():
    assert turning((40, 56, 40)) == (30.0, False)
    assert turning((20, 320, 256)) == (180.0, True)  # flat patches: within their slices
    assert turning((56, 40)) == (180.0, False)
    assert turning((320, 200)) == (15.0, False)


def changed_shares(names, count=400):
    """How often a patch is not what it was, if only these changes may happen."""
    patch, draw = (8, 8, 8), np.random.default_rng(0)
    size = read_size(patch)
    images = jnp.asarray(np.broadcast_to(draw.standard_normal((1, *size, 1)), (count, *size, 1)), jnp.float32)
    masks = jnp.ones((count, *size), jnp.int8)
    chances = Chances(**{name: value if name in names else 0.0 for name, value in NNUNET._asdict().items()})
    found, _ = jax.jit(make_augment(patch, 1, zeros_stay=False, chances=chances))(jax.random.key(1), images, masks)
    start = np.array(size) // 2 - 4
    still = images[0, start[0] : start[0] + 8, start[1] : start[1] + 8, start[2] : start[2] + 8]
    return float(jnp.mean(jnp.any(found != still, axis=(1, 2, 3, 4))))


SHARES = {  # of changed patches, as nnU-Net's trainer has its probabilities
    "moved": 1 - 0.8**2,
    "noise": 0.1,
    "blur": 0.1,
    "brightness": 0.15,
    "contrast": 0.15,
    "low_resolution": 0.125,
    "inverted_gamma": 0.1,
    "gamma": 0.3,
    "mirrored": 1 - 0.5**3,
}


def test_nothing_happens_to_most_of_what_is_read_but_its_middle():
    assert changed_shares(()) == 0


@pytest.mark.parametrize("name", SHARES)
def test_each_change_comes_as_often_as_in_nnunet(name):
    share, expected = changed_shares((name,)), SHARES[name]
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)


def test_image_and_mask_are_moved_together():
    """A structure that is bright stays bright, wherever it goes."""
    patch = (12, 14, 10)
    size, draw = read_size(patch), np.random.default_rng(2)
    masks = jnp.asarray(draw.random((40, *size)) > 0.5, jnp.int8)
    images = jnp.where(masks == 1, 10.0, -10.0)[..., None]
    images, masks = jax.jit(make_augment(patch, 1, zeros_stay=False))(jax.random.key(0), images, masks)
    assert images.shape == (40, *patch, 1)
    inside, outside = (np.asarray(images[..., 0])[np.asarray(masks) == k].mean() for k in (1, 0))
    assert inside > 5
    assert outside < -3  # beyond the scan it is 0


def test_flat_patches_are_changed_slice_by_slice_all_alike():
    """Every slice of a scan is the same, and so they are in the end, whatever happened to them; the mask with them."""
    patch, draw = (4, 16, 20), np.random.default_rng(3)
    assert turning(patch).in_plane
    size = read_size(patch)
    assert size[0] == patch[0]
    plane = ndimage.gaussian_filter(draw.standard_normal((30, *size[1:])), (0, 2, 2)) > 0
    masks = jnp.asarray(np.broadcast_to(plane[:, None], (30, *size)), jnp.int8)
    images = jnp.where(masks == 1, 1.0, 0.0)[..., None]
    alike = NNUNET._replace(noise=0.0)
    changed, after = jax.jit(make_augment(patch, 1, zeros_stay=False, chances=alike))(jax.random.key(0), images, masks)
    assert changed.shape == (30, *patch, 1)
    assert after.shape == (30, *patch)
    np.testing.assert_array_equal(after, after[:, :1].repeat(patch[0], 1))
    np.testing.assert_array_equal(changed, changed[:, :1].repeat(patch[0], 1))
    moved = NNUNET._replace(**dict.fromkeys(set(NNUNET._fields) - {"moved", "mirrored"}, 0.0))
    changed, after = jax.jit(make_augment(patch, 1, zeros_stay=False, chances=moved))(jax.random.key(0), images, masks)
    inside, outside = (np.asarray(where) for where in (changed[..., 0] > 0.51, changed[..., 0] < 0.32))
    assert (inside | outside).mean() > 0.9  # elsewhere the structure's share of a voxel is near that of others
    assert (np.asarray(after)[inside] == 1).all()
    assert (np.asarray(after)[outside] == 0).all()
    start = [(n - m) // 2 for n, m in zip(size, patch, strict=True)]
    still = np.asarray(images)[:, :, start[1] : start[1] + 16, start[2] : start[2] + 20]
    assert 5 < sum(not np.array_equal(a, b) for a, b in zip(still, np.asarray(changed), strict=True)) <= 30


def test_zeros_stay_zero_where_that_is_asked_for():
    patch = (8, 8, 8)
    size = read_size(patch)
    masks = jnp.full((30, *size), -1, jnp.int8).at[:, : size[0] // 2].set(0)
    images = jnp.where(masks == 0, 1.0, 0.0)[..., None]
    none = Chances(*(0.0,) * len(NNUNET))
    for zeros_stay in (True, False):
        bright = none._replace(inverted_gamma=1.0, noise=1.0)  # and nothing is moved: the lower half is outside
        changed, after = jax.jit(make_augment(patch, 1, zeros_stay, bright))(jax.random.key(0), images, masks)
        assert after.min() == 0
        assert bool((changed[:, patch[0] // 2 :] == 0).all()) == zeros_stay
        assert bool((changed[:, : patch[0] // 2] != 0).all())
    # of noise, which comes to one patch in ten, nothing is left outside of the scan
    noise = {}
    for zeros_stay in (True, False):
        changed, _ = make_augment(patch, 1, zeros_stay)(
            jax.random.key(0), jnp.zeros_like(images), jnp.full_like(masks, -1)
        )
        noise[zeros_stay] = float(jnp.abs(changed).max())
    assert noise[True] == 0 < noise[False]


def test_the_same_key_gives_the_same_patches():
    patch = (10, 12)
    size = read_size(patch)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, *size, 1)), jnp.float32)
    masks = jnp.ones((4, *size), jnp.int8)
    augment = jax.jit(make_augment(patch, 1, zeros_stay=False))
    first, again, other = (augment(jax.random.key(seed), images, masks)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({np.asarray(image).tobytes() for image in first}) == 4
