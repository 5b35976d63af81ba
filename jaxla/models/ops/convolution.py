"""Convolutions whose values and gradients are fast and accurate, also on CPU.

XLA's CPU compiler runs one form of convolution fast: images [N, H, W, C] with a small kernel [h, w, C, K]. On CPU
everything here is reduced to that form or to matrix products (`jaxla.hardware.convolution_variant`):

- The gradient of the image is a convolution of that form, with the flipped kernel.
- The gradient of the kernel is not: it has a kernel as large as the image, takes up to nine times as long as the
  forward pass, and adds about 100,000 products one after the other, which loses two digits. This module computes
  a sum of matrix products over blocks of pixels that fit in the processor's cache.
- A volume is convolved slice by slice, or with a stride as one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp

from jaxla.hardware import convolution_variant

Inputs = tuple[jax.Array, jax.Array]  # images or volumes, and the kernel
Gradients = tuple[jax.Array, jax.Array]

# A matrix product of the kernel's gradient covers as many pixels as fit in CACHE_BYTES, but at least MIN_PIXELS, so
# that adding up the products takes less time than computing them.
CACHE_BYTES, MIN_PIXELS = 3_000_000, 512


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> jax.Array:
    """Convolve [B, …, C] with a kernel [k, …, C, K] of odd sides, and zeros around the image, along any number of axes.

    Return [B, …/stride, K], sides rounded up.
    """
    if kernel.ndim == 4 and set(strides) == {1} and kernel.shape[0] == kernel.shape[1]:
        return same_convolution(x, kernel)
    variant = _convolve_on_cpu if convolution_variant() == "cpu" else _convolve_by_xla
    return variant(x, kernel, tuple(strides))


def same_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [B, H, W, C] with a kernel [k, k, C, K], k odd, with stride 1 and zeros around the image."""
    # on several devices the blocks of the kernel's gradient would not stay on the devices that hold their images
    single_device = jax.sharding.get_abstract_mesh().size <= 1
    variant = _same_on_cpu if convolution_variant() == "cpu" and single_device else _same
    return variant(x, kernel)


def _same(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if kernel.shape[0] == 1:
        return x @ kernel[0, 0]
    return _convolve_by_xla(x, kernel, (1, 1))


def _convolve_by_xla(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    axes = "DHW"[3 - len(strides) :]
    layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    padding = [(side // 2, side // 2) for side in kernel.shape[:-2]]
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


# --- images on CPU: stride 1 -----------------------------------------------------------------------------------------


@jax.custom_vjp
def _same_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _same(x, kernel)


def _same_backward(inputs: Inputs, gradient: jax.Array) -> Gradients:
    x, kernel = inputs
    grad_x = _same(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return grad_x, _kernel_gradient(x, gradient, kernel.shape[0])


_same_on_cpu.defvjp(lambda x, kernel: (_same(x, kernel), (x, kernel)), _same_backward)


def _kernel_gradient(x: jax.Array, gradient: jax.Array, side: int) -> jax.Array:
    """Return [side, side, C, K]: for each shift of `x`, its channels times the gradient's, summed over all pixels."""
    batch, height, width, inputs = x.shape
    outputs = gradient.shape[-1]
    if side > 1 and outputs < inputs:  # shifting the gradient is cheaper
        return _kernel_gradient(gradient, x, side)[::-1, ::-1].swapaxes(2, 3)
    images, rows = _block_size(x, side)
    # zeros fill the last blocks
    extra_images, extra_rows = -batch % images, -height % rows
    gradient = jnp.pad(gradient, ((0, extra_images), (0, extra_rows), (0, 0), (0, 0)))
    border = side // 2
    x = jnp.pad(x, ((0, extra_images), (border, border + extra_rows), (border, border), (0, 0)))
    blocks_per_image = (height + extra_rows) // rows

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        start = (i // blocks_per_image * images, i % blocks_per_image * rows, 0, 0)
        block = jax.lax.dynamic_slice(x, start, (images, rows + side - 1, width + side - 1, inputs))
        shifts = [block[:, i : i + rows, j : j + width] for i in range(side) for j in range(side)]
        patches = jnp.concatenate(shifts, axis=-1).reshape(-1, side * side * inputs)
        grad_block = jax.lax.dynamic_slice(gradient, start, (images, rows, width, outputs)).reshape(-1, outputs)
        return total + jax.lax.dot_general(grad_block, patches, (((0,), (0,)), ((), ())))

    blocks = gradient.shape[0] // images * blocks_per_image
    total = jax.lax.fori_loop(0, blocks, add_block, jnp.zeros((outputs, side * side * inputs), x.dtype))
    return total.T.reshape(side, side, inputs, outputs)


def _block_size(x: jax.Array, side: int) -> tuple[int, int]:
    """Return how many images, and how many of their rows, make one block: several images, or some rows of one."""
    batch, height, width, inputs = x.shape
    pixels = max(MIN_PIXELS, CACHE_BYTES // (x.dtype.itemsize * side * side * inputs))
    if height * width <= pixels:
        return _divisor_near(batch, pixels // (height * width)), height
    return 1, _divisor_near(height, -(-pixels // width))


def _divisor_near(count: int, limit: int) -> int:
    """Return the largest divisor of `count` between `limit / 2` and `limit`, or `limit` if there is none."""
    limit = min(count, limit)
    return next((size for size in range(limit, limit // 2, -1) if count % size == 0), limit)


# --- any axes and strides on CPU -------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_on_cpu(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    return _cpu_form(x, kernel, strides)


def _backward_on_cpu(strides: tuple[int, ...], inputs: Inputs, gradient: jax.Array) -> Gradients:
    if set(strides) == {1} and len(strides) == 3:
        return _slices_backward(*inputs, gradient)
    # recomputed: the intermediate arrays are several times as large as `x`, so the forward pass does not keep them
    return jax.vjp(partial(_cpu_form, strides=strides), *inputs)[1](gradient)


_convolve_on_cpu.defvjp(lambda x, kernel, strides: (_cpu_form(x, kernel, strides), (x, kernel)), _backward_on_cpu)


def _cpu_form(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """Compute the same as `_convolve_by_xla`, with its gradients up to ten times as fast on CPU."""
    *sides, _, outputs = kernel.shape
    if set(strides) != {1}:
        return _gather_shifts(x, tuple(sides), strides) @ kernel.reshape(-1, outputs)
    return _convolve_by_xla(x, kernel, strides) if len(sides) == 2 else _convolve_slices(x, kernel)


def _convolve_slices(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve a volume's slices as images whose channels include those of the neighbouring slices.

    The neighbours are stacked on the side with fewer channels: in the inputs, or in the outputs, where each slice
    computes its contributions to its neighbours.
    """
    neighbours, height, width, inputs, outputs = kernel.shape
    depth = x.shape[1]
    if inputs < outputs:
        kernel = jnp.moveaxis(kernel, 0, 2).reshape(height, width, neighbours * inputs, outputs)
        return _each_slice(_gather_shifts(x, (neighbours, 1, 1), (1, 1, 1)), kernel)
    kernel = jnp.moveaxis(kernel, 0, 3).reshape(height, width, inputs, neighbours * outputs)
    parts = _each_slice(x, kernel).reshape(*x.shape[:-1], neighbours, outputs)
    border = neighbours // 2
    parts = jnp.pad(parts, ((0, 0), (border, border), *((0, 0),) * 4))
    return sum(parts[:, i : i + depth, :, :, i] for i in range(neighbours))


def _slices_backward(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    grad_x = _convolve_slices(gradient, kernel[::-1, ::-1, ::-1].swapaxes(3, 4))
    neighbours, height, width, inputs, outputs = kernel.shape
    slices = _gather_shifts(x, (neighbours, 1, 1), (1, 1, 1))
    zeros = jnp.zeros((height, width, neighbours * inputs, outputs), kernel.dtype)
    grad_kernel = jax.vjp(partial(_each_slice, slices), zeros)[1](gradient)[0]
    return grad_x, jnp.moveaxis(grad_kernel.reshape(height, width, neighbours, inputs, outputs), 2, 0)


def _each_slice(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve each slice of [B, D, H, W, C] with a kernel [h, w, C, K]."""
    convolved = convolve(x.reshape(-1, *x.shape[2:]), kernel, (1, 1))
    return convolved.reshape(*x.shape[:-1], kernel.shape[-1])


def _gather_shifts(x: jax.Array, sides: tuple[int, ...], strides: tuple[int, ...]) -> jax.Array:
    """Return the pixels under a kernel of these sides as channels: [B, …, C] -> [B, …/stride, sides·C]."""
    padded = jnp.pad(x, ((0, 0), *((side // 2, side // 2) for side in sides), (0, 0)))
    counts = [-(-n // stride) for n, stride in zip(x.shape[1:-1], strides, strict=True)]
    shifts = []
    for starts in product(*map(range, sides)):
        pixels = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(starts, counts, strides, strict=True)
        ]
        shifts.append(padded[:, *pixels])
    return jnp.concatenate(shifts, axis=-1)
