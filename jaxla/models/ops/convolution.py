"""Convolutions whose gradients are fast and accurate on CPU.

XLA's CPU compiler runs one form of convolution fast: images [N, H, W, C] by a small kernel [h, w, C, K]. The gradients
that JAX derives have other forms. That of the image can be written in the fast one. That of the kernel cannot: as a
convolution it has a kernel as large as the image, takes up to nine times as long as the forward pass, and sums some
hundred thousand products one after the other, which costs two digits. Here it is a sum of matrix products, each over
as many pixels as the processor's cache holds. A kernel of one pixel is a matrix product as it stands.

Of three axes no form is fast: those volumes are convolved slice by slice, or as one matrix product where strides leave
few places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp

Gradients = tuple[jax.Array, jax.Array]

# Pixels that one matrix product of the kernel's gradient runs over: their patches should stay in the cache, but below
# the lower bound the sum of the products costs more than they do.
CACHED_BYTES, FEWEST_PIXELS = 3_000_000, 512


@jax.custom_vjp
def same_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] by a kernel [k, k, C, K] with odd k, stride 1 and zeros around the image -> [B, H, W, K]."""
    return _convolve(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Gradients]:
    return same_convolution(x, kernel), (x, kernel)


def _backward(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> Gradients:
    if jax.sharding.get_abstract_mesh().size > 1:  # its blocks would not stay on the devices that hold their images
        return _derived_gradients(*inputs, gradient)
    return jax.lax.platform_dependent(*inputs, gradient, cpu=_written_gradients, default=_derived_gradients)


same_convolution.defvjp(_forward, _backward)


def _written_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    of_x = _convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return of_x, _kernel_gradient(x, gradient, kernel.shape[0])


def _kernel_gradient(x: jax.Array, gradient: jax.Array, side: int) -> jax.Array:
    """[side, side, C, K]: for each shift of the image, its channels times the gradient's, summed over all pixels."""
    batch, height, width, inputs = x.shape
    outputs = gradient.shape[-1]
    if side > 1 and outputs < inputs:  # the gradient is the cheaper one to shift
        return _kernel_gradient(gradient, x, side)[::-1, ::-1].swapaxes(2, 3)
    images, rows = _block(x, side)
    # zeros fill the last blocks up
    more_images, more_rows = -batch % images, -height % rows
    gradient = jnp.pad(gradient, ((0, more_images), (0, more_rows), (0, 0), (0, 0)))
    border = side // 2
    x = jnp.pad(x, ((0, more_images), (border, border + more_rows), (border, border), (0, 0)))
    of_image = (height + more_rows) // rows

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        start = (i // of_image * images, i % of_image * rows, 0, 0)
        part = jax.lax.dynamic_slice(x, start, (images, rows + side - 1, width + side - 1, inputs))
        shifts = [part[:, i : i + rows, j : j + width] for i in range(side) for j in range(side)]
        patches = jnp.concatenate(shifts, axis=-1).reshape(-1, side * side * inputs)
        of_block = jax.lax.dynamic_slice(gradient, start, (images, rows, width, outputs)).reshape(-1, outputs)
        return total + jax.lax.dot_general(of_block, patches, (((0,), (0,)), ((), ())))

    blocks = gradient.shape[0] // images * of_image
    total = jax.lax.fori_loop(0, blocks, add_block, jnp.zeros((outputs, side * side * inputs), x.dtype))
    return total.T.reshape(side, side, inputs, outputs)


def _block(x: jax.Array, side: int) -> tuple[int, int]:
    """How many images and rows of them make one block: several whole images, or some rows of one."""
    batch, height, width, inputs = x.shape
    pixels = max(FEWEST_PIXELS, CACHED_BYTES // (x.dtype.itemsize * side * side * inputs))
    if height * width <= pixels:
        return _fitting(batch, pixels // (height * width)), height
    return 1, _fitting(height, -(-pixels // width))


def _fitting(count: int, most: int) -> int:
    """A number near `most` that divides `count`; `most` where there is none, and the last block is filled up."""
    most = min(count, most)
    return next((size for size in range(most, most // 2, -1) if count % size == 0), most)


def _derived_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    _, gradients = jax.vjp(_convolve, x, kernel)
    return gradients(gradient)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if kernel.shape[0] == 1:
        return x @ kernel[0, 0]
    return _as_it_stands(x, kernel, (1, 1))


# --- any number of axes, any strides ---------------------------------------------------------------------------------


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> jax.Array:
    """[B, …, C] by a kernel [k, …, C, K] with odd sides, zeros around the image -> [B, …/stride, K], rounded up."""
    if kernel.ndim == 4 and set(strides) == {1} and kernel.shape[0] == kernel.shape[1]:
        return same_convolution(x, kernel)
    return _convolve_axes(x, kernel, tuple(strides))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_axes(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    cpu, default = (partial(form, strides=strides) for form in (_for_cpu, _as_it_stands))
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _forward_axes(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> tuple[jax.Array, Gradients]:
    return _convolve_axes(x, kernel, strides), (x, kernel)


def _backward_axes(strides: tuple[int, ...], inputs: Gradients, gradient: jax.Array) -> Gradients:
    # the forms are derived anew: what they make of x on the way is several times as large, and is not kept
    default = partial(_gradients_of, partial(_as_it_stands, strides=strides))
    cpu = partial(_gradients_of, partial(_for_cpu, strides=strides))
    if set(strides) == {1} and len(strides) == 3:
        cpu = _gradients_of_slices
    return jax.lax.platform_dependent(*inputs, gradient, cpu=cpu, default=default)


_convolve_axes.defvjp(_forward_axes, _backward_axes)


def _gradients_of(form: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    return jax.vjp(form, x, kernel)[1](gradient)


def _as_it_stands(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    axes = "DHW"[3 - len(strides) :]
    layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(x, kernel, strides, _borders(kernel), dimension_numbers=layout)


def _for_cpu(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """Up to ten times as fast on CPU, with the gradients, as what it stands for."""
    *sides, _, outputs = kernel.shape
    if set(strides) != {1}:
        return _shifted(x, tuple(sides), strides) @ kernel.reshape(-1, outputs)
    return _as_it_stands(x, kernel, strides) if len(sides) == 2 else _by_slices(x, kernel)


def _by_slices(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A volume's slices as images of their own; what lies above and below stands among the fewer channels.

    Those are the inputs, or the outputs: then each slice gives what it adds to its neighbours too.
    """
    neighbours, height, width, inputs, outputs = kernel.shape
    depth = x.shape[1]
    if inputs < outputs:
        of_slices = jnp.moveaxis(kernel, 0, 2).reshape(height, width, neighbours * inputs, outputs)
        return _each_slice(_shifted(x, (neighbours, 1, 1), (1, 1, 1)), of_slices)
    of_slices = jnp.moveaxis(kernel, 0, 3).reshape(height, width, inputs, neighbours * outputs)
    given = _each_slice(x, of_slices).reshape(*x.shape[:-1], neighbours, outputs)
    beyond = neighbours // 2
    given = jnp.pad(given, ((0, 0), (beyond, beyond), *((0, 0),) * 4))
    return sum(given[:, i : i + depth, :, :, i] for i in range(neighbours))


def _each_slice(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, D, H, W, C] by a kernel [h, w, C, K]."""
    convolved = convolve(x.reshape(-1, *x.shape[2:]), kernel, (1, 1))
    return convolved.reshape(*x.shape[:-1], kernel.shape[-1])


def _gradients_of_slices(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    of_x = _by_slices(gradient, kernel[::-1, ::-1, ::-1].swapaxes(3, 4))
    neighbours, height, width, inputs, outputs = kernel.shape
    slices = _shifted(x, (neighbours, 1, 1), (1, 1, 1))
    of_slices = jnp.zeros((height, width, neighbours * inputs, outputs), kernel.dtype)
    of_kernel = jax.vjp(partial(_each_slice, slices), of_slices)[1](gradient)[0]
    return of_x, jnp.moveaxis(of_kernel.reshape(height, width, neighbours, inputs, outputs), 2, 0)


def _shifted(x: jax.Array, sides: tuple[int, ...], strides: tuple[int, ...]) -> jax.Array:
    """For every place of a kernel of these sides the pixels it sees, among the channels: [B, …/stride, sides·C]."""
    padded = jnp.pad(x, ((0, 0), *((side // 2, side // 2) for side in sides), (0, 0)))
    places = [range(side) for side in sides]
    counts = [-(-n // stride) for n, stride in zip(x.shape[1:-1], strides, strict=True)]
    shifts = []
    for place in product(*places):
        taken = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(place, counts, strides, strict=True)
        ]
        shifts.append(padded[:, *taken])
    return jnp.concatenate(shifts, axis=-1)


def _borders(kernel: jax.Array) -> list[tuple[int, int]]:
    return [(side // 2, side // 2) for side in kernel.shape[:-2]]
