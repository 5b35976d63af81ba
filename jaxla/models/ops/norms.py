"""BatchNorm that follows PyTorch's to the last statistic, InstanceNorm, and GroupNorm of volumes."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

MOMENTUM, EPSILON = 0.1, 1e-5  # PyTorch's defaults; its momentum is the weight of the new batch
GROUPS = 8  # of channels, in GroupNorm


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
        full = jnp.promote_types(x.dtype, jnp.float32)
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            deviation = jax.lax.rsqrt(self.var[...] + EPSILON)
            return ((x.astype(full) - self.mean[...]) * (scale * deviation) + bias).astype(self.dtype)
        images = jnp.ones(len(x), full) if present is None else present.astype(full)
        count = images.sum() * (x.shape[1] * x.shape[2])
        normalised, mean, var = _normalise(x, scale, bias, (images / count)[:, None, None, None], (0, 1, 2))
        self._remember(*(jax.lax.stop_gradient(of_all.ravel()) for of_all in (mean, var)), count)
        return normalised.astype(self.dtype)

    def _remember(self, mean: jax.Array, var: jax.Array, count: jax.Array) -> None:
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        self.mean[...] = (1 - MOMENTUM) * self.mean[...] + MOMENTUM * mean
        self.var[...] = (1 - MOMENTUM) * self.var[...] + MOMENTUM * unbiased


class InstanceNorm(nnx.Module):
    """Each channel of each image to mean 0 and variance 1, then scaled and shifted: no statistic is kept.

    Args:
        width: C.
        dtype: of the result; parameters are float32.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] or [B, D, H, W, C] -> the same."""
        pixels = tuple(range(1, x.ndim - 1))
        weight = jnp.full((1,) * x.ndim, 1 / math.prod(x.shape[1:-1]), jnp.promote_types(x.dtype, jnp.float32))
        normalised, *_ = _normalise(x, self.scale[...], self.bias[...], weight, pixels)
        return normalised.astype(self.dtype)


class GroupNorm(nnx.Module):
    """Each group of channels of each volume to mean 0 and variance 1, then each channel scaled and shifted.

    Args:
        width: C; there are as many groups as its greatest common divisor with GROUPS.
        dtype: of the result; parameters are float32.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.groups = math.gcd(width, GROUPS)
        self.dtype = dtype

    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        """[B, D, H, W, C] -> the same, by the statistics of the voxels `present`, bool [B, D, H, W] or [B, D, 1, 1]."""
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        full = jnp.promote_types(x.dtype, jnp.float32)
        of_each = math.prod(grouped.shape[1:4]) // math.prod(present.shape[1:]) * grouped.shape[-1]
        count = jnp.maximum(present.sum((1, 2, 3), keepdims=True), 1) * of_each
        weight = (present / count).astype(full)[..., None, None]
        normalised, *_ = _normalise(grouped, jnp.ones(1, full), jnp.zeros(1, full), weight, (1, 2, 3, 5))
        return (normalised.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, weight: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x by the statistics of x itself over `axes`, in which each value counts as `weight`; and those statistics.

    What JAX derives keeps several arrays as large as x for the gradient; this keeps x alone, as PyTorch does.
    """
    return _forward(x, scale, bias, weight, axes)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, weight: jax.Array, axes: tuple[int, ...]
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    full = x.astype(weight.dtype)
    mean = (full * weight).sum(axes, keepdims=True)
    var = (jnp.square(full - mean) * weight).sum(axes, keepdims=True)
    deviation = jax.lax.rsqrt(var + EPSILON)
    normalised = (full - mean) * (scale * deviation) + bias
    return (normalised, mean, var), (x, scale, weight, mean, deviation)


def _backward(
    axes: tuple[int, ...], kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x, scale, weight, mean, deviation = kept
    gradient = gradients[0]  # the statistics' own are zero: they are only remembered
    centred = (x.astype(weight.dtype) - mean) * deviation
    of_bias = gradient.sum(axes, keepdims=True)
    of_scale = (gradient * centred).sum(axes, keepdims=True)
    of_x = (gradient - weight * (of_bias + centred * of_scale)) * (scale * deviation)
    of_scale, of_bias = (of_all.reshape(-1, len(scale)).sum(0).astype(scale.dtype) for of_all in (of_scale, of_bias))
    return of_x.astype(x.dtype), of_scale, of_bias, None


_normalise.defvjp(_forward, _backward)
