"""Augmentation changes image and mask together, within its limits, and identically for the same key."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxla.config import Augmentation
from jaxla.training.augmentation import augment

SIDE = 48
KINDS = {
    "rotation": Augmentation(rotation=30),
    "scale": Augmentation(scale=0.3),
    "flips": Augmentation(flips=True),
    "elastic": Augmentation(elastic=3),
    "intensity": Augmentation(intensity=0.3),
}


def make_slices(count=64):
    """Return images of a bright ellipse off the centre and their masks; class 2 is a smaller disc in it."""
    rows, columns = np.indices((SIDE, SIDE))
    mask = (((rows - 20) / 10) ** 2 + ((columns - 27) / 6) ** 2 < 1).astype(np.uint8)
    mask[(rows - 20) ** 2 + (columns - 27) ** 2 < 9] = 2
    image = np.array([0.2, 0.6, 0.9], np.float32)[mask]
    return np.repeat(image[None, ..., None], count, 0), np.repeat(mask[None], count, 0)


def run_augment(augmentation, seed=0):
    images, masks = jax.jit(lambda key: augment(augmentation, key, *make_slices()))(jax.random.key(seed))
    return np.asarray(images), np.asarray(masks)


def moments(mask):
    """Return area, centre, and angle of the long axis in degrees."""
    pixels = np.argwhere(mask > 0)
    values, vectors = np.linalg.eigh(np.cov(pixels.T))
    long = vectors[:, values.argmax()]
    return len(pixels), pixels.mean(0), np.degrees(np.arctan2(long[1], long[0]))


def test_all_channels_of_a_slice_change_identically():
    everything = Augmentation(rotation=30, scale=0.3, flips=True, elastic=3, intensity=0.3)
    images, masks = make_slices(8)
    single, moved = jax.jit(lambda key: augment(everything, key, images, masks))(jax.random.key(0))
    triple, moved_too = jax.jit(lambda key: augment(everything, key, np.repeat(images, 3, -1), masks))(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(moved_too, moved)
    np.testing.assert_allclose(triple, np.repeat(single, 3, -1), rtol=0, atol=1e-6)  # measured: 1.8e-7


@pytest.mark.parametrize("name", KINDS)
def test_every_slice_changes_differently_and_identically_for_the_same_key(name):
    images, masks = run_augment(KINDS[name])
    assert images.shape == (64, SIDE, SIDE, 1)
    assert (images.dtype, masks.dtype) == (np.float32, np.uint8)
    different = 4 if name == "flips" else 64
    assert len({image.tobytes() for image in images}) == different
    repeated = run_augment(KINDS[name])
    np.testing.assert_array_equal(images, repeated[0])
    np.testing.assert_array_equal(masks, repeated[1])
    assert (run_augment(KINDS[name], seed=1)[0] != images).any()


@pytest.mark.parametrize("name", ["rotation", "scale", "flips", "elastic"])
def test_the_mask_moves_with_its_structure(name):
    images, masks = run_augment(KINDS[name])
    assert set(np.unique(masks)) == {0, 1, 2}
    for image, mask in zip(images[..., 0], masks, strict=True):
        inner = [ndimage.binary_erosion(mask == k, iterations=2, border_value=1) for k in (0, 2)]
        if inner[1].any():
            np.testing.assert_allclose(image[inner[1]], 0.9, atol=0.01)
        visible = inner[0] & ndimage.binary_erosion(image > 0.1, iterations=2)  # zeros lie outside the image
        assert visible.sum() > 500
        np.testing.assert_allclose(image[visible], 0.2, atol=0.01)


def test_angles_and_sizes_stay_within_their_limits():
    """The limits are 30 degrees and a factor of 1.3; 64 slices come close to them, and pixels limit the precision."""
    before = moments(make_slices(1)[1][0])
    angles = [moments(mask)[2] - before[2] for mask in run_augment(KINDS["rotation"])[1]]
    angles = (np.array(angles) + 90) % 180 - 90
    assert -31 < angles.min() < -24
    assert 24 < angles.max() < 31
    ratio = np.sqrt([moments(mask)[0] / before[0] for mask in run_augment(KINDS["scale"])[1]])
    assert 1 / 1.34 < ratio.min() < 1 / 1.2
    assert 1.2 < ratio.max() < 1.34


def test_intensity_changes_only_the_image_and_keeps_its_range():
    images, masks = run_augment(KINDS["intensity"])
    np.testing.assert_array_equal(masks, make_slices()[1])
    assert images.min() >= 0
    assert images.max() <= 1
    background = images[:, 0, 0, 0]
    assert background.std() > 0.05


def test_elastic_displacements_have_the_given_size():
    shifts = [
        np.abs(moments(mask)[1] - moments(make_slices(1)[1][0])[1]).mean() for mask in run_augment(KINDS["elastic"])[1]
    ]
    assert 0.3 < np.mean(shifts) < 1.5 * 0.03 * SIDE  # pixels; the standard deviation is 3 % of the side


@pytest.mark.parametrize("name", KINDS)
def test_all_slices_of_a_volume_change_identically(name):
    """This includes slices that differ: equal grey values in two slices stay equal."""
    image, mask = (batch[0] for batch in make_slices(1))
    bright = np.where(mask[..., None] > 0, image, 1.0).astype(np.float32)  # a different mean
    volumes = np.stack([np.stack([image, bright, image])] * 8), np.stack([np.stack([mask] * 3)] * 8)
    images, masks = jax.jit(lambda key: augment(KINDS[name], key, *volumes))(jax.random.key(3))
    assert (images.shape, masks.shape) == ((8, 3, SIDE, SIDE, 1), (8, 3, SIDE, SIDE))
    np.testing.assert_array_equal(images[:, 0], images[:, 2])
    np.testing.assert_array_equal(masks[:, 0], masks[:, 1])
    inner = ndimage.binary_erosion(np.asarray(masks[:, 0]) > 0, np.ones((1, 3, 3)), iterations=2)
    np.testing.assert_array_equal(np.asarray(images[:, 0])[inner], np.asarray(images[:, 1])[inner])
    assert len({np.asarray(volume).tobytes() for volume in images}) > 2
