"""A convolution whose gradients are fast on CPU inside `jax.lax.scan` too.

XLA's CPU compiler runs one form of convolution fast: images [N, H, W, C] by a kernel [h, w, C, K]. The gradients that
JAX derives have other forms. Outside loops the compiler brings them into that one; in a loop it does not (its pass
ConvCanonicalization visits the entry computation alone), and they take many times as long. Here they are written in the
fast form.
"""

from __future__ import annotations

import jax

Gradients = tuple[jax.Array, jax.Array]


@jax.custom_vjp
def same_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, H, W, C] by a kernel [k, k, C, K] with odd k, stride 1 and zeros around the image -> [B, H, W, K]."""
    return _convolve(x, kernel, kernel.shape[0] // 2)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Gradients]:
    return same_convolution(x, kernel), (x, kernel)


def _backward(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> Gradients:
    return jax.lax.platform_dependent(*inputs, gradient, cpu=_written_gradients, default=_derived_gradients)


same_convolution.defvjp(_forward, _backward)


def _written_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    padding = kernel.shape[0] // 2
    of_x = _convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3), padding)
    # [C, H, W, B] by [H, W, B, K]: each channel is an image, and the batch are its channels
    of_kernel = _convolve(x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3), padding)
    return of_x, of_kernel.transpose(1, 2, 0, 3)


def _derived_gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Gradients:
    _, gradients = jax.vjp(lambda x, kernel: _convolve(x, kernel, kernel.shape[0] // 2), x, kernel)
    return gradients(gradient)


def _convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    sides = [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))
