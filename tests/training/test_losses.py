"""The loss against PyTorch's, and overlaps counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxla.training.losses import overlap_counts, pixel_loss, predicted_classes

RNG = np.random.default_rng(0)
WEIGHTS = ([1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_one_class_is_binary_cross_entropy_over_the_slices_that_count(weight):
    logits = 4 * RNG.standard_normal((4, 6, 9, 1), dtype=np.float32)
    mask = RNG.integers(0, 2, (4, 6, 9), np.uint8)
    counted = np.flatnonzero(weight)
    expected = torch.nn.BCEWithLogitsLoss()(
        torch.from_numpy(logits[counted, ..., 0]), torch.from_numpy(mask[counted]).float()
    )
    loss = pixel_loss(jnp.asarray(logits), mask, np.float32(weight))
    np.testing.assert_allclose(loss, expected, rtol=5e-7)  # measured: 2e-7


@pytest.mark.parametrize("weight", WEIGHTS)
def test_several_classes_are_softmax_cross_entropy_over_the_slices_that_count(weight):
    logits = 4 * RNG.standard_normal((4, 6, 9, 3), dtype=np.float32)
    mask = RNG.integers(0, 3, (4, 6, 9), np.uint8)
    counted = np.flatnonzero(weight)
    expected = torch.nn.CrossEntropyLoss()(
        torch.from_numpy(logits[counted].transpose(0, 3, 1, 2).copy()), torch.from_numpy(mask[counted]).long()
    )
    loss = pixel_loss(jnp.asarray(logits), mask, np.float32(weight))
    np.testing.assert_allclose(loss, expected, rtol=5e-7)  # measured: 2e-7


def test_confident_logits_stay_finite():
    logits = jnp.array([1e4, -1e4]).reshape(1, 1, 2, 1)
    assert pixel_loss(logits, np.array([[[1, 0]]]), np.ones(1)) == 0
    assert pixel_loss(logits, np.array([[[0, 1]]]), np.ones(1)) == 1e4


def test_no_slice_that_counts_is_no_loss():
    assert pixel_loss(jnp.ones((2, 3, 3, 1)), np.ones((2, 3, 3)), np.zeros(2)) == 0


def test_overlap_of_one_class_is_counted_slice_by_slice():
    logits = np.array([[[1, 2, -1], [-1, 3, -2]], [[-1, -1, -1], [-1, -1, -1]], [[1, 1, 1], [1, 1, 1]]], np.float32)
    mask = np.array([[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]])
    counts = overlap_counts(logits[..., None], mask, np.array([1, 1, 0]))  # the last slice only fills the batch
    # pixels of the prediction, of the mask, of both
    np.testing.assert_array_equal(counts, [[[3, 3, 2]], [[0, 1, 0]], [[0, 0, 0]]])


def test_overlap_of_several_classes_leaves_the_background_out():
    classes = np.array([[[0, 1, 1, 2], [2, 2, 0, 0]]])
    mask = np.array([[[0, 1, 2, 2], [2, 1, 1, 0]]])
    counts = overlap_counts(np.eye(3, dtype=np.float32)[classes], mask, np.ones(1))
    np.testing.assert_array_equal(counts, [[[2, 3, 1], [3, 3, 2]]])


def test_a_pixel_is_foreground_above_one_half_or_takes_its_largest_logit():
    np.testing.assert_array_equal(predicted_classes(jnp.array([-1e-6, 0.0, 1e-6])[..., None]), [0, 0, 1])
    np.testing.assert_array_equal(predicted_classes(jnp.array([[0.1, 0.3, 0.2], [-1, -3, -2]])), [1, 0])
