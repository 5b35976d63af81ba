"""Layers of the convolutional networks and of the decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.ops.convolution import convolve, same_convolution
from jaxla.models.ops.norms import BatchNorm, InstanceNorm

Norm = Literal["batch", "instance"]  # statistics over a batch, or over each image

HE_NORMAL = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, before a ReLU
LECUN_NORMAL = jax.nn.initializers.lecun_normal()  # for layers without an activation


def convolution(inputs: int, outputs: int, side: int, *, stride: int = 1, **options: Any) -> nnx.Conv:
    """Return a square convolution, [B, H, W, C] -> [B, H/stride, W/stride, K], sides rounded up; `side` is odd.

    The options are those of `convolution_nd`.
    """
    is_strided = stride > 1 and side > 1
    convolve_images = jax.lax.conv_general_dilated if is_strided else _convolve_pixels
    return convolution_nd(inputs, outputs, (side, side), (stride, stride), convolve_images, **options)


def _convolve_pixels(x: jax.Array, kernel: jax.Array, strides: Sequence[int], *_: object, **__: object) -> jax.Array:
    # only 1×1 kernels have a stride here, which skips pixels; nnx.Conv's other arguments are constants
    return same_convolution(x[:, :: strides[0], :: strides[1]], kernel)


def _convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], *_: object, **__: object) -> jax.Array:
    return convolve(x, kernel, strides)


def convolution_nd(
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    convolve: Callable[..., jax.Array] = _convolve,
    *,
    bias: bool = False,
    kernel_init: nnx.Initializer = HE_NORMAL,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Return a convolution, [B, D, H, W, C] -> [B, D/stride, …, K] or without D, sides rounded up.

    Args:
        kernel: odd sides, one for each axis. Strided padding "SAME" would shift the grid of even-sized images.
        strides: one for each axis.
        convolve: function with the arguments of `jax.lax.conv_general_dilated`.
    """
    return nnx.Conv(
        inputs, outputs, tuple(kernel), strides=tuple(strides), padding=tuple(side // 2 for side in kernel),
        use_bias=bias, dtype=dtype, kernel_init=kernel_init, conv_general_dilated=convolve, rngs=rngs,
    )  # fmt: skip


def logits_layer(inputs: int, outputs: int, side: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Return the last layer of a network: a convolution with bias, in float32 or float64."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return convolution(inputs, outputs, side, bias=True, kernel_init=LECUN_NORMAL, dtype=dtype, rngs=rngs)


class ConvolutionUnit(nnx.Module):
    """A 3×3 convolution, BatchNorm or InstanceNorm, and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, *, norm: Norm = "batch", dtype: jnp.dtype, rngs: nnx.Rngs, **options: Any
    ) -> None:
        self.convolution = convolution(inputs, outputs, 3, dtype=dtype, rngs=rngs, **options)
        self.norm = (BatchNorm if norm == "batch" else InstanceNorm)(outputs, dtype=dtype)

    def __call__(self, x: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Map [B, H, W, C] to [B, H, W, K]; BatchNorm's statistics use the images `present`, [B] bool."""
        return jax.nn.relu(self.norm(self.convolution(x), present))


class Upconvolution(nnx.Module):
    """A transposed convolution whose kernel is as large as its strides, so that outputs do not overlap.

    It is computed as one matrix product, up to 40 times as fast on CPU as `jax.lax.conv_transpose`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        strides: Sequence[int] = (2, 2),
        kernel_init: nnx.Initializer | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        axes = tuple(range(1, 1 + len(strides)))
        default_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, batch_axis=axes)
        self.kernel = nnx.Param((kernel_init or default_init)(rngs.params(), (inputs, *strides, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, h, w, C] to [B, stride·h, stride·w, K]; likewise with a depth axis."""
        batch, *sides, inputs = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        strides = kernel.shape[1:-1]
        pixels = x.astype(self.dtype).reshape(-1, inputs) @ kernel.reshape(inputs, -1)
        # [B, h, w, 2, 2, K] -> [B, h, 2, w, 2, K]
        axes = len(sides)
        interleaved = [axis for i in range(1, axes + 1) for axis in (i, i + axes)]
        pixels = pixels.reshape(batch, *sides, *strides, -1).transpose(0, *interleaved, 2 * axes + 1)
        size = [side * stride for side, stride in zip(sides, strides, strict=True)]
        return pixels.reshape(batch, *size, -1) + self.bias[...].astype(self.dtype)


def convolution_units(inputs: int, widths: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.List:
    """Return one stage of VGG or SegNet: a `ConvolutionUnit` with bias for each width."""
    return nnx.List([ConvolutionUnit(i, o, bias=True, dtype=dtype, rngs=rngs) for i, o in pairwise((inputs, *widths))])
