"""Losses equal PyTorch's, and overlaps equal those counted by hand."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxla.config import Training
from jaxla.tasks.base import make_loss
from jaxla.training.losses import (
    count_overlap,
    cross_entropy,
    deep_supervision,
    dice_cross_entropy,
    per_volume,
    predict_classes,
)

pytestmark = pytest.mark.quick

RNG = np.random.default_rng(0)
WEIGHTS = ([1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_of_one_class_is_binary_cross_entropy_over_slices_with_nonzero_weight(weight):
    logits = 4 * RNG.standard_normal((4, 6, 9, 1), dtype=np.float32)
    mask = RNG.integers(0, 2, (4, 6, 9), np.uint8)
    counted = np.flatnonzero(weight)
    expected = torch.nn.BCEWithLogitsLoss()(
        torch.from_numpy(logits[counted, ..., 0]), torch.from_numpy(mask[counted]).float()
    )
    loss = cross_entropy(jnp.asarray(logits), mask, np.float32(weight))
    np.testing.assert_allclose(loss, expected, rtol=5e-7)  # measured: 2e-7


@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_of_several_classes_is_softmax_cross_entropy_over_slices_with_nonzero_weight(weight):
    logits = 4 * RNG.standard_normal((4, 6, 9, 3), dtype=np.float32)
    mask = RNG.integers(0, 3, (4, 6, 9), np.uint8)
    counted = np.flatnonzero(weight)
    expected = torch.nn.CrossEntropyLoss()(
        torch.from_numpy(logits[counted].transpose(0, 3, 1, 2).copy()), torch.from_numpy(mask[counted]).long()
    )
    loss = cross_entropy(jnp.asarray(logits), mask, np.float32(weight))
    np.testing.assert_allclose(loss, expected, rtol=5e-7)  # measured: 2e-7


def test_large_logits_give_finite_losses():
    logits = jnp.array([1e4, -1e4]).reshape(1, 1, 2, 1)
    assert cross_entropy(logits, np.array([[[1, 0]]]), np.ones(1)) == 0
    assert cross_entropy(logits, np.array([[[0, 1]]]), np.ones(1)) == 1e4


def test_loss_is_zero_if_all_weights_are_zero():
    assert cross_entropy(jnp.ones((2, 3, 3, 1)), np.ones((2, 3, 3)), np.zeros(2)) == 0


def test_overlap_of_one_class_is_counted_per_slice():
    logits = np.array([[[1, 2, -1], [-1, 3, -2]], [[-1, -1, -1], [-1, -1, -1]], [[1, 1, 1], [1, 1, 1]]], np.float32)
    mask = np.array([[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]]])
    counts = count_overlap(logits[..., None], mask, np.array([1, 1, 0]))  # the last slice is padding
    # pixels in the prediction, in the mask, in both
    np.testing.assert_array_equal(counts, [[[3, 3, 2]], [[0, 1, 0]], [[0, 0, 0]]])


def test_overlap_of_several_classes_excludes_the_background():
    classes = np.array([[[0, 1, 1, 2], [2, 2, 0, 0]]])
    mask = np.array([[[0, 1, 2, 2], [2, 1, 1, 0]]])
    counts = count_overlap(np.eye(3, dtype=np.float32)[classes], mask, np.ones(1))
    np.testing.assert_array_equal(counts, [[[2, 3, 1], [3, 3, 2]]])


def test_the_predicted_class_has_a_positive_logit_or_the_largest_logit():
    np.testing.assert_array_equal(predict_classes(jnp.array([-1e-6, 0.0, 1e-6])[..., None]), [0, 0, 1])
    np.testing.assert_array_equal(predict_classes(jnp.array([[0.1, 0.3, 0.2], [-1, -3, -2]])), [1, 0])


# --- nnU-Net ---


def soft_tversky(probabilities, reference, weight):
    """Return TP / (TP + (1 - weight) FP + weight FN), smoothed as in nnU-Net's Dice; Dice if `weight` is 0.5."""
    true_positives = (probabilities * reference).sum()
    false_positives, false_negatives = (probabilities * ~reference).sum(), ((1 - probabilities) * reference).sum()
    denominator = true_positives + (1 - weight) * false_positives + weight * false_negatives
    return (2 * true_positives + 1e-5) / (2 * denominator + 1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("shape", [(4, 6, 9), (4, 3, 6, 5)])
@pytest.mark.parametrize(("outputs", "false_negative_weight"), [(1, 0.5), (1, 0.7), (3, 0.5), (3, 0.7)])
def test_dice_cross_entropy_equals_its_formula(weight, batch_dice, shape, outputs, false_negative_weight):
    """Cross-entropy minus soft Dice or the Tversky index, written out for each structure.

    Only patches with non-zero weight count.
    """
    logits = 2 * RNG.standard_normal((*shape, outputs), dtype=np.float32)
    mask = RNG.integers(0, max(2, outputs), shape, np.uint8)
    counted = np.flatnonzero(weight)
    z = np.float64(logits[counted])
    probabilities = 1 / (1 + np.exp(-z)) if outputs == 1 else np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    structures = [(probabilities[..., 0 if outputs == 1 else k], mask[counted] == k) for k in range(1, max(2, outputs))]
    if batch_dice:
        dice = np.mean([soft_tversky(p, r, false_negative_weight) for p, r in structures])
    else:
        by_row = [[soft_tversky(p[i], r[i], false_negative_weight) for p, r in structures] for i in range(len(counted))]
        dice = np.mean(by_row)
    expected = float(cross_entropy(jnp.asarray(logits), mask, np.float32(weight))) - dice
    options = {"batch_dice": batch_dice, "false_negative_weight": false_negative_weight}
    loss = dice_cross_entropy(jnp.asarray(logits), mask, np.float32(weight), **options)
    np.testing.assert_allclose(loss, expected, atol=1e-6)  # measured: 2.4e-7


def test_the_loss_of_a_recipe_has_its_weight_of_missed_pixels():
    logits, mask, weight = jnp.array([[[[0.5], [-1.0]]]]), np.array([[[1, 0]]]), np.ones(1, np.float32)
    recipe = Training(loss="dice_cross_entropy", false_negative_weight=0.7)
    loss = make_loss(recipe, batch_dice=True)(logits, mask, weight)
    expected = dice_cross_entropy(logits, mask, weight, batch_dice=True, false_negative_weight=0.7)
    assert loss == expected != dice_cross_entropy(logits, mask, weight, batch_dice=True)


def test_each_coarser_resolution_has_half_the_weight_and_the_coarsest_none():
    mask = np.arange(2 * 8 * 12).reshape(2, 8, 12)
    targets = []

    def loss(logits, target, weight):
        targets.append(np.asarray(target))
        return logits.mean()

    logits = [jnp.full((2, 8, 12, 1), 1.0), jnp.full((2, 4, 6, 1), 10.0), jnp.full((2, 2, 6, 1), 100.0)]
    np.testing.assert_allclose(deep_supervision(loss, logits, mask, jnp.ones(2)), (1 + 0.5 * 10) / 1.5, rtol=1e-6)
    np.testing.assert_array_equal(targets[1], mask[:, 1::2, 1::2])  # the second of two voxels, like nearest-exact
    assert len(targets) == 2
    assert deep_supervision(loss, logits[:1], mask, jnp.ones(2)) == 1  # a single resolution has all the weight
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask[:, None]).float(), (2, 12), mode="nearest-exact")
    deep_supervision(loss, [logits[0], jnp.ones((2, 2, 12, 1)), logits[2]], mask, jnp.ones(2))
    np.testing.assert_array_equal(targets[-1], expected[:, 0].numpy())


def test_overlap_of_volumes_is_counted_over_all_axes():
    classes = RNG.integers(0, 3, (2, 3, 4, 5))
    mask = RNG.integers(0, 3, (2, 3, 4, 5))
    counts = count_overlap(np.eye(3, dtype=np.float32)[classes], mask, np.ones(2))
    for k in (1, 2):
        expected = [
            [(classes[b] == k).sum(), (mask[b] == k).sum(), ((classes[b] == k) & (mask[b] == k)).sum()] for b in (0, 1)
        ]
        np.testing.assert_array_equal(counts[:, k - 1], expected)


def test_a_loss_per_volume_excludes_padding():
    logits, mask = RNG.standard_normal((3, 5, 4, 6, 1), dtype=np.float32), RNG.integers(0, 2, (3, 5, 4, 6), np.uint8)
    # volumes of five and three slices, and padding
    weight = np.float32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    expected = []
    for volume, slices in ((0, 5), (1, 3)):
        volume_logits, reference = (torch.from_numpy(x[volume, :slices]).double() for x in (logits[..., 0], mask))
        probability = volume_logits.sigmoid()
        dice = (2 * (probability * reference).sum() + 1e-5) / (probability.sum() + reference.sum() + 1e-5)
        expected.append(torch.nn.functional.binary_cross_entropy_with_logits(volume_logits, reference) - dice)
    loss = per_volume(partial(dice_cross_entropy, batch_dice=True))(jnp.asarray(logits), mask, weight)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)  # measured: 2.0e-7
