"""Losses on logits [B, H, W, K] or [B, D, H, W, K], and the counts from which Dice is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (logits, mask, weight) -> value

SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in nnU-Net


def cross_entropy(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Return binary cross-entropy if K = 1, else softmax cross-entropy, as the mean over pixels.

    Args:
        mask: [B, H, W] class indices.
        weight: [B], 0 for rows that are padding.
    """
    if logits.shape[-1] == 1:
        losses = optax.sigmoid_binary_cross_entropy(logits[..., 0], (mask > 0).astype(logits.dtype))
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, mask.astype(jnp.int32))
    return jnp.sum(losses.mean(axis=_pixel_axes(mask)) * weight) / jnp.maximum(weight.sum(), 1)


def dice_cross_entropy(
    logits: jax.Array, mask: jax.Array, weight: jax.Array, *, batch_dice: bool, false_negative_weight: float = 0.5
) -> jax.Array:
    """Return nnU-Net's loss: cross-entropy minus the mean soft Dice of the foreground classes.

    Reference code: nnunetv2 2.8.1, `DC_and_CE_loss`. With a `false_negative_weight` other than 0.5, the Tversky index
    (Salehi et al. 2017) takes the place of Dice: TP / (TP + (1 - w) FP + w FN).

    Args:
        mask, weight: see `cross_entropy`.
        batch_dice: whether Dice is computed over the batch as a whole rather than per image and then averaged.
        false_negative_weight: w, above 0 and below 1. More than 0.5 penalises missed pixels more than surplus ones.
    """
    foreground = jnp.arange(1, max(2, logits.shape[-1]))
    predicted = jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits)[..., 1:]
    reference = (mask[..., None] == foreground).astype(predicted.dtype)
    sums = [x.sum(axis=_pixel_axes(mask)) * weight[:, None] for x in (predicted * reference, predicted, reference)]
    intersection, predicted_size, reference_size = (x.sum(0) for x in sums) if batch_dice else sums
    # TP + (1 - w) FP + w FN = (1 - w) predicted_size + w reference_size
    sizes = 2 * (1 - false_negative_weight) * predicted_size + 2 * false_negative_weight * reference_size
    dice = ((2 * intersection + SMOOTH) / (sizes + SMOOTH)).mean(-1)
    if not batch_dice:
        dice = jnp.sum(dice * weight) / jnp.maximum(weight.sum(), 1)
    return cross_entropy(logits, mask, weight) - dice


def deep_supervision(loss: Loss, logits: Sequence[jax.Array], mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the weighted mean of a loss at several resolutions, finest first, as in nnU-Net.

    Each resolution has half the weight of the finer one, and the coarsest of several has none. The mask is downsampled
    by taking the middle voxel of each block.
    """
    level_weights = [0.5**level for level in range(len(logits))]
    if len(logits) > 1:
        level_weights[-1] = 0.0
    total = 0.0
    for level_logits, level_weight in zip(logits, level_weights, strict=True):
        if level_weight:
            factors = [n // m for n, m in zip(mask.shape[1:], level_logits.shape[1:-1], strict=True)]
            coarse = mask[:, *(slice(factor // 2, None, factor) for factor in factors)]
            total += level_weight * loss(level_logits, coarse, weight)
    return total / sum(level_weights)


def per_volume(loss: Loss) -> Loss:
    """Return a loss on volumes [B, D, H, W, K]: a loss on slices, computed over each volume, then averaged.

    Its `weight` is [B, D]: 0 for slices that are padding, and for all slices of a row that is padding.
    """

    def volume_loss(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
        rows = row_weights(weight)
        return jnp.sum(jax.vmap(loss)(logits, mask, weight) * rows) / jnp.maximum(rows.sum(), 1)

    return volume_loss


def row_weights(weight: jax.Array) -> jax.Array:
    """Return weights of rows [B], 0 for padding, from weights of rows [B] or of their slices [B, D]."""
    return weight.reshape(len(weight), -1).max(1)


def predict_classes(logits: jax.Array) -> jax.Array:
    """Return class indices [B, H, W] for logits [B, H, W, K]: the largest or, if K = 1, a probability above 0.5."""
    return (logits[..., 0] > 0).astype(jnp.int32) if logits.shape[-1] == 1 else jnp.argmax(logits, axis=-1)


def count_overlap(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the pixels in prediction, mask and both, for each image and foreground class: [B, classes, 3] float32."""
    foreground = jnp.arange(1, max(2, logits.shape[-1]))
    predicted = predict_classes(logits)[..., None] == foreground
    reference = mask[..., None] == foreground
    counts = [x.sum(axis=_pixel_axes(mask)) for x in (predicted, reference, predicted & reference)]
    return jnp.stack(counts, axis=-1) * weight[:, None, None]


def _pixel_axes(mask: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, mask.ndim))
