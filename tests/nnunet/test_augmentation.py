"""nnU-Net's augmentation: each change gives the same result as nnU-Net's code, and is applied as often."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxla.nnunet.augmentation import (
    NNUNET_PROBABILITIES,
    Probabilities,
    blur,
    change_contrast,
    change_gamma,
    initial_patch_size,
    lower_resolution,
    make_augment,
    rotate_and_scale,
    rotation_range,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = np.load(GOLDEN / "nnunet_augmentation.npz")
IMAGE = jnp.asarray(EXPECTED["image"])


@pytest.mark.parametrize("name", ["3d", "3d_small", "2d", "still"])
def test_rotation_and_scaling_equal_nnunet(name):
    """Rotation about three axes, enlargement and reduction, rotation in a plane, and no change."""
    image, mask = rotate_and_scale(
        jnp.asarray(EXPECTED[f"{name}_image"]),
        jnp.asarray(EXPECTED[f"{name}_mask"], jnp.int8),
        jnp.asarray(EXPECTED[f"{name}_angles"]),
        jnp.asarray(EXPECTED[f"{name}_scale"]),
        size=tuple(EXPECTED[f"{name}_size"].tolist()),
        max_class=2,
        is_applied=jnp.asarray(name != "still"),
    )
    np.testing.assert_allclose(image, EXPECTED[f"{name}_out"], atol=1e-5)  # measured: 4e-6, for values up to 4
    np.testing.assert_array_equal(mask, EXPECTED[f"{name}_out_mask"])


@pytest.mark.parametrize("number", range(3))
def test_blur_resolution_and_gamma_equal_nnunet(number):
    blurred, low, gamma = (EXPECTED[f"{name}{number}"] for name in ("blur", "low", "gamma"))
    np.testing.assert_allclose(blur(IMAGE, EXPECTED[f"sigmas{number}"]), blurred, atol=2e-6)  # measured: 4.8e-7
    lowered = lower_resolution(IMAGE, EXPECTED[f"resolution{number}"])
    np.testing.assert_allclose(lowered, low, atol=5e-6)  # measured: 1.5e-6
    sign = -1 if EXPECTED[f"inverted{number}"] else 1
    changed = sign * change_gamma(sign * IMAGE, EXPECTED[f"exponent{number}"])
    np.testing.assert_allclose(changed, gamma, atol=1e-5)  # measured: 2.4e-6


def test_contrast_equals_nnunet():
    np.testing.assert_allclose(change_contrast(IMAGE, 1.2), EXPECTED["contrast"], atol=1e-6)  # measured: 2.4e-7


def test_initial_patch_sizes_equal_nnunet():
    sizes = json.loads((GOLDEN / "nnunet_read_sizes.json").read_text())
    assert [list(initial_patch_size(patch)) for patch in sizes["patch"]] == sizes["read"]


def test_rotation_range_depends_on_the_shape_of_the_patch():
    assert rotation_range((40, 56, 40)) == (30.0, False)
    assert rotation_range((20, 320, 256)) == (180.0, True)  # few slices: rotated in plane
    assert rotation_range((56, 40)) == (180.0, False)
    assert rotation_range((320, 200)) == (15.0, False)


@partial(jax.jit, static_argnames=("patch", "keep_zeros"))
def augment(patch, probabilities, key, images, masks, keep_zeros=False):
    """Augment patches. Probabilities are traced, so that tests with the same patch size share a program."""
    return make_augment(patch, 1, keep_zeros, probabilities)(key, images, masks)


# Comparisons with nnU-Net come first: once used, `fast_compilation` stays active for the rest of the module.
fast = pytest.mark.usefixtures("fast_compilation")
NONE = Probabilities(*(0.0,) * len(NNUNET_PROBABILITIES))
PATCH, COUNT = (8, 8, 8), 400
SIZE = initial_patch_size(PATCH)
KEY = jax.random.key(0)


def changed_fraction(names):
    """Return the fraction of patches that differ from the centre of the initial patch if only `names` are applied."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(np.broadcast_to(rng.standard_normal((1, *SIZE, 1)), (COUNT, *SIZE, 1)), jnp.float32)
    probabilities = NONE._replace(**{name: getattr(NNUNET_PROBABILITIES, name) for name in names})
    found, _ = augment(PATCH, probabilities, jax.random.key(1), images, jnp.ones((COUNT, *SIZE), jnp.int8))
    start = np.array(SIZE) // 2 - 4
    centre = images[0, start[0] : start[0] + 8, start[1] : start[1] + 8, start[2] : start[2] + 8]
    return float(jnp.mean(jnp.any(found != centre, axis=(1, 2, 3, 4))))


CHANGED_FRACTIONS = {  # from the probabilities of nnU-Net's trainer
    "spatial": 1 - 0.8**2,
    "noise": 0.1,
    "blur": 0.1,
    "brightness": 0.15,
    "contrast": 0.15,
    "low_resolution": 0.125,
    "inverted_gamma": 0.1,
    "gamma": 0.3,
    "mirror": 1 - 0.5**3,
}


@fast
def test_without_changes_the_centre_of_the_patch_is_returned():
    assert changed_fraction(()) == 0


@fast
@pytest.mark.parametrize("name", CHANGED_FRACTIONS)
def test_each_change_is_as_frequent_as_in_nnunet(name):
    fraction, expected = changed_fraction((name,)), CHANGED_FRACTIONS[name]
    assert abs(fraction - expected) < 4 * np.sqrt(expected * (1 - expected) / COUNT)


@fast
def test_image_and_mask_are_transformed_together():
    """A bright structure stays bright, wherever it moves."""
    masks = jnp.asarray(np.random.default_rng(2).random((COUNT, *SIZE)) > 0.5, jnp.int8)
    images = jnp.where(masks == 1, 10.0, -10.0)[..., None]
    images, masks = augment(PATCH, NNUNET_PROBABILITIES, KEY, images, masks)
    assert images.shape == (COUNT, *PATCH, 1)
    inside, outside = (np.asarray(images[..., 0])[np.asarray(masks) == k].mean() for k in (1, 0))
    assert inside > 5
    assert outside < -3  # beyond the scan the image is 0


@fast
def test_all_slices_of_flat_patches_are_changed_identically():
    """Patches and masks of identical slices still have identical slices afterwards."""
    patch, rng = (4, 16, 20), np.random.default_rng(3)
    assert rotation_range(patch).in_plane
    size = initial_patch_size(patch)
    assert size[0] == patch[0]
    plane = ndimage.gaussian_filter(rng.standard_normal((30, *size[1:])), (0, 2, 2)) > 0
    masks = jnp.asarray(np.broadcast_to(plane[:, None], (30, *size)), jnp.int8)
    images = jnp.where(masks == 1, 1.0, 0.0)[..., None]
    changed, after = augment(patch, NNUNET_PROBABILITIES._replace(noise=0.0), KEY, images, masks)
    assert changed.shape == (30, *patch, 1)
    assert after.shape == (30, *patch)
    np.testing.assert_array_equal(after, after[:, :1].repeat(patch[0], 1))
    np.testing.assert_array_equal(changed, changed[:, :1].repeat(patch[0], 1))
    changed, after = augment(patch, NONE._replace(spatial=0.2, mirror=0.5), KEY, images, masks)
    inside, outside = (np.asarray(where) for where in (changed[..., 0] > 0.51, changed[..., 0] < 0.32))
    assert (inside | outside).mean() > 0.9  # in between, structure and background have similar weights
    assert (np.asarray(after)[inside] == 1).all()
    assert (np.asarray(after)[outside] == 0).all()
    start = [(n - m) // 2 for n, m in zip(size, patch, strict=True)]
    centres = np.asarray(images)[:, :, start[1] : start[1] + 16, start[2] : start[2] + 20]
    assert 5 < sum(not np.array_equal(a, b) for a, b in zip(centres, np.asarray(changed), strict=True)) <= 30


@fast
def test_zeros_of_the_scan_stay_zero_if_requested():
    """The lower half is outside the scan. Patches are not rotated."""
    masks = jnp.full((COUNT, *SIZE), -1, jnp.int8).at[:, : SIZE[0] // 2].set(0)
    images = jnp.where(masks == 0, 1.0, 0.0)[..., None]
    noisy = NONE._replace(inverted_gamma=1.0, noise=1.0)
    for keep_zeros in (True, False):
        changed, after = augment(PATCH, noisy, KEY, images, masks, keep_zeros=keep_zeros)
        assert after.min() == 0
        assert bool((changed[:, PATCH[0] // 2 :] == 0).all()) == keep_zeros
        assert bool((changed[:, : PATCH[0] // 2] != 0).all())
        outside = jnp.zeros_like(images), jnp.full_like(masks, -1)
        changed, _ = augment(PATCH, NNUNET_PROBABILITIES, KEY, *outside, keep_zeros=keep_zeros)
        assert bool((changed == 0).all()) == keep_zeros


@fast
def test_same_key_gives_same_2d_patches():
    patch = (10, 12)
    size = initial_patch_size(patch)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, *size, 1)), jnp.float32)
    masks = jnp.ones((4, *size), jnp.int8)
    first, again, rekeyed = (
        augment(patch, NNUNET_PROBABILITIES, jax.random.key(seed), images, masks)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, rekeyed)
    assert len({np.asarray(image).tobytes() for image in first}) == 4
