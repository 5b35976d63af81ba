"""BatchNorm that follows PyTorch's to the last statistic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

MOMENTUM, EPSILON = 0.1, 1e-5  # PyTorch's defaults; its momentum is the weight of the new batch


class BatchNorm(nnx.Module):
    """Each channel to mean 0 and variance 1 over a batch, then scaled and shifted; in evaluation over all batches seen.

    `nnx.BatchNorm` keeps the biased running variance and computes it as the difference of two large numbers; this one
    keeps the unbiased one, as PyTorch's does, and sums squares of differences.

    Args:
        width: C.
        dtype: of the result; statistics and parameters are float32.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))
        self.dtype = dtype
        self.use_running_average = True

    def __call__(self, x: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> the same; while it trains its statistics change in place.

        Args:
            present: [B] bool, which images the statistics are of; by default all.
        """
        full = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var, count = _statistics(full, present)
            self._remember(jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var), count)
        return ((full - mean) * (self.scale[...] * jax.lax.rsqrt(var + EPSILON)) + self.bias[...]).astype(self.dtype)

    def _remember(self, mean: jax.Array, var: jax.Array, count: jax.Array | int) -> None:
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        self.mean[...] = (1 - MOMENTUM) * self.mean[...] + MOMENTUM * mean
        self.var[...] = (1 - MOMENTUM) * self.var[...] + MOMENTUM * unbiased


def _statistics(x: jax.Array, present: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Mean and variance of each channel, and over how many values."""
    pixels = x.shape[1] * x.shape[2]
    if present is None:
        mean = x.mean((0, 1, 2))
        return mean, jnp.square(x - mean).mean((0, 1, 2)), x.shape[0] * pixels
    images = present.astype(x.dtype)
    count = images.sum() * pixels
    weight = images[:, None, None, None] / count
    mean = (x * weight).sum((0, 1, 2))
    return mean, (jnp.square(x - mean) * weight).sum((0, 1, 2)), count
