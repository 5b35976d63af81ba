"""The layers that the convolutional networks and the decoders are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.ops.convolution import convolve, same_convolution
from jaxla.models.ops.norms import BatchNorm

HE_NORMAL = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, for what a ReLU follows
LECUN_NORMAL = jax.nn.initializers.lecun_normal()  # for what comes out as it is


def convolution(
    inputs: int,
    outputs: int,
    side: int,
    *,
    stride: int = 1,
    bias: bool = False,
    kernel_init: nnx.Initializer = HE_NORMAL,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """[B, H, W, C] -> [B, H/stride, W/stride, K], sides rounded up; `side` is odd."""
    return nnx.Conv(
        inputs,
        outputs,
        (side, side),
        strides=stride,
        padding=side // 2,  # on both sides: with a stride, "SAME" would shift the grid of even-sized images
        use_bias=bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=_by_same_convolution if stride == 1 or side == 1 else jax.lax.conv_general_dilated,
        rngs=rngs,
    )


def _by_same_convolution(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], *_: object, **__: object
) -> jax.Array:
    # with a stride, a kernel of one pixel never sees the others; nnx.Conv's further arguments say what is always so
    return same_convolution(x[:, :: strides[0], :: strides[1]], kernel)


def convolution_of_axes(
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    *,
    bias: bool = False,
    kernel_init: nnx.Initializer = HE_NORMAL,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """[B, D, H, W, C] -> [B, D/stride, …, K] or without D, sides rounded up; the kernel's sides are odd."""
    return nnx.Conv(
        inputs,
        outputs,
        tuple(kernel),
        strides=tuple(strides),
        padding=[(side // 2, side // 2) for side in kernel],
        use_bias=bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=lambda x, kernel, strides, *_, **__: convolve(x, kernel, strides),
        rngs=rngs,
    )


def logits_layer(inputs: int, outputs: int, side: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """The last layer of a network: a convolution with bias, in float32 at least."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return convolution(inputs, outputs, side, bias=True, kernel_init=LECUN_NORMAL, dtype=dtype, rngs=rngs)


class ConvolutionUnit(nnx.Module):
    """A 3×3 convolution, BatchNorm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        kernel_init: nnx.Initializer = HE_NORMAL,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.convolution = convolution(inputs, outputs, 3, bias=bias, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, dtype=dtype)

    def __call__(self, x: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, K]; BatchNorm's statistics are of those `present`, [B] bool."""
        return jax.nn.relu(self.norm(self.convolution(x), present))


class Upconvolution(nnx.Module):
    """A transposed convolution whose kernel is as large as its stride: a pixel becomes 2×2 pixels of its own, or so.

    As one matrix product it is up to forty times as fast on CPU as `jax.lax.conv_transpose`, of the same numbers.

    Args:
        strides: along each axis.
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
        initial = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, batch_axis=axes)
        self.kernel = nnx.Param((kernel_init or initial)(rngs.params(), (inputs, *strides, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, 2h, 2w, K], or with depth."""
        batch, *sides, inputs = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        strides = kernel.shape[1:-1]
        pixels = x.astype(self.dtype).reshape(-1, inputs) @ kernel.reshape(inputs, -1)
        # [B, h, w, 2, 2, K]: beside each axis its stride
        axes = len(sides)
        beside = [axis for i in range(1, axes + 1) for axis in (i, i + axes)]
        pixels = pixels.reshape(batch, *sides, *strides, -1).transpose(0, *beside, 2 * axes + 1)
        larger = [side * stride for side, stride in zip(sides, strides, strict=True)]
        return pixels.reshape(batch, *larger, -1) + self.bias[...].astype(self.dtype)


def units_in_turn(inputs: int, widths: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.List:
    """One stage of VGG or SegNet: a `ConvolutionUnit` with bias for each width."""
    return nnx.List([ConvolutionUnit(i, o, bias=True, dtype=dtype, rngs=rngs) for i, o in pairwise((inputs, *widths))])
