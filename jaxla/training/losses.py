"""Losses on logits [B, H, W, K] or [B, D, H, W, K], and the counts from which Dice is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (logits, mask, weight) -> value

SMOOTH = 1e-5  # of Dice, as nnU-Net has it


def cross_entropy(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Binary cross-entropy with logits for one class (K = 1), else softmax cross-entropy; mean over pixels.

    Args:
        mask: [B, H, W] class indices.
        weight: [B], 0 for slices that only fill the batch.
    """
    if logits.shape[-1] == 1:
        losses = optax.sigmoid_binary_cross_entropy(logits[..., 0], (mask > 0).astype(logits.dtype))
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, mask.astype(jnp.int32))
    return jnp.sum(losses.mean(axis=_pixels(mask)) * weight) / jnp.maximum(weight.sum(), 1)


def dice_cross_entropy(logits: jax.Array, mask: jax.Array, weight: jax.Array, *, batch_dice: bool) -> jax.Array:
    """nnU-Net's loss: `pixel_loss` less the mean soft Dice of the structures.

    Reference code: nnunetv2 2.8.1, `DC_and_CE_loss`.

    Args:
        mask, weight: as for `pixel_loss`.
        batch_dice: whether Dice is of all images together; else it is of each, then averaged.
    """
    of_structures = jnp.arange(1, max(2, logits.shape[-1]))
    predicted = jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits)[..., 1:]
    reference = (mask[..., None] == of_structures).astype(predicted.dtype)
    sums = [x.sum(axis=_pixels(mask)) * weight[:, None] for x in (predicted * reference, predicted, reference)]
    if batch_dice:
        both, of_prediction, of_reference = (x.sum(0) for x in sums)
        dice = (2 * both + SMOOTH) / (of_prediction + of_reference + SMOOTH)
        return cross_entropy(logits, mask, weight) - dice.mean()
    both, of_prediction, of_reference = sums
    dice = ((2 * both + SMOOTH) / (of_prediction + of_reference + SMOOTH)).mean(-1)
    return cross_entropy(logits, mask, weight) - jnp.sum(dice * weight) / jnp.maximum(weight.sum(), 1)


def deep_supervision(loss: Loss, logits: Sequence[jax.Array], mask: jax.Array, weight: jax.Array) -> jax.Array:
    """A loss at several resolutions, the finest first: each counts half of the one before, the coarsest not at all.

    Of a mask that is so many times as fine, the voxel in the middle stands for all. (Deep supervision as nnU-Net has
    it; of one resolution alone that one counts.)
    """
    weights = [0.5**level for level in range(len(logits))]
    if len(logits) > 1:
        weights[-1] = 0.0
    total = 0.0
    for of_level, share in zip(logits, weights, strict=True):
        if share:
            times = [n // m for n, m in zip(mask.shape[1:], of_level.shape[1:-1], strict=True)]
            coarse = mask[:, *(slice(factor // 2, None, factor) for factor in times)]
            total += share * loss(of_level, coarse, weight)
    return total / sum(weights)


def per_volume(loss: Loss) -> Loss:
    """A loss on slices as one on volumes [B, D, H, W, K], each of which is taken together; then their mean.

    Its `weight` is [B, D]: 0 for slices that only fill a volume up, and for all of one that only fills a batch up.
    """

    def loss_of_volumes(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
        rows = row_weights(weight)
        return jnp.sum(jax.vmap(loss)(logits, mask, weight) * rows) / jnp.maximum(rows.sum(), 1)

    return loss_of_volumes


def row_weights(weight: jax.Array) -> jax.Array:
    """[B] of weights of rows, or [B, D] of their slices: 0 for rows that only fill a batch up."""
    return weight.reshape(len(weight), -1).max(1)


def predicted_classes(logits: jax.Array) -> jax.Array:
    """[B, H, W, K] -> class indices [B, H, W]: probability above one half for one class, else the largest logit."""
    return (logits[..., 0] > 0).astype(jnp.int32) if logits.shape[-1] == 1 else jnp.argmax(logits, axis=-1)


def overlap_counts(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Pixels in the prediction, the mask and both, for each image and foreground class: [B, classes, 3] float32."""
    foreground = jnp.arange(1, max(2, logits.shape[-1]))
    predicted = predicted_classes(logits)[..., None] == foreground
    reference = mask[..., None] == foreground
    counts = [x.sum(axis=_pixels(mask)) for x in (predicted, reference, predicted & reference)]
    return jnp.stack(counts, axis=-1) * weight[:, None, None]


def _pixels(mask: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, mask.ndim))
