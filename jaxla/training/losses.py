"""Losses on logits [B, H, W, K], and the counts from which Dice is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def pixel_loss(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Binary cross-entropy with logits for one class (K = 1), else softmax cross-entropy; mean over pixels.

    Args:
        mask: [B, H, W] class indices.
        weight: [B], 0 for slices that only fill the batch.
    """
    if logits.shape[-1] == 1:
        losses = optax.sigmoid_binary_cross_entropy(logits[..., 0], (mask > 0).astype(logits.dtype))
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, mask.astype(jnp.int32))
    return jnp.sum(losses.mean(axis=(1, 2)) * weight) / jnp.maximum(weight.sum(), 1)


def predicted_classes(logits: jax.Array) -> jax.Array:
    """[B, H, W, K] -> class indices [B, H, W]: probability above one half for one class, else the largest logit."""
    return (logits[..., 0] > 0).astype(jnp.int32) if logits.shape[-1] == 1 else jnp.argmax(logits, axis=-1)


def overlap_counts(logits: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Pixels in the prediction, the mask and both, for each slice and foreground class: [B, classes, 3] float32."""
    foreground = jnp.arange(1, max(2, logits.shape[-1]))
    predicted = predicted_classes(logits)[..., None] == foreground
    reference = mask[..., None] == foreground
    counts = [x.sum(axis=(1, 2)) for x in (predicted, reference, predicted & reference)]
    return jnp.stack(counts, axis=-1) * weight[:, None, None]
