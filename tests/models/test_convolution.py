"""Convolutions and their gradients against JAX's and PyTorch's, and the form that XLA compiles on CPU."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.hardware import on_cpu
from jaxla.models.ops.convolution import _block_size, _convolve_by_xla, _cpu_form, convolve, same_convolution
from jaxla.models.ops.layers import convolution


def jax_convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def random_arrays(side, *leading, channels=5):
    draw = np.random.default_rng(0).standard_normal
    return draw((2, 9, 12, 4), np.float32), draw((*leading, side, side, 4, channels), np.float32)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_values_and_gradients_equal_jax(side):
    x, kernel = random_arrays(side)
    ours, gradients = jax.vjp(jax.jit(same_convolution), x, kernel)
    theirs, expected = jax.vjp(jax_convolution, x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if side > 1 else 2e-6)  # measured: 4.8e-7
    weight = np.random.default_rng(1).standard_normal(ours.shape, np.float32)
    for gradient, reference in zip(gradients(weight), expected(weight), strict=True):
        np.testing.assert_allclose(gradient, reference, atol=3e-5)  # measured: 1.9e-5, for values up to 42


@pytest.mark.parametrize(
    ("shape", "outputs", "side"),
    [
        ((3, 37, 61, 4), 5, 3),  # odd sides
        ((3, 37, 61, 6), 5, 3),  # more inputs than outputs: the gradient is shifted, not the images
        ((5, 12, 10, 200), 210, 3),  # several images in a block, the last block padded
        ((5, 12, 10, 210), 200, 3),
        ((1, 149, 90, 40), 40, 5),  # blocks of rows, the last one padded
        ((1, 149, 90, 41), 40, 5),
        ((2, 64, 64, 16), 300, 1),
    ],
)
def test_kernel_gradient_equals_float64_up_to_rounding(shape, outputs, side):
    images, rows = _block_size(np.empty((*shape[:3], min(shape[3], outputs)), np.float32), side)
    assert (shape[0] > images or shape[1] > rows) == (shape[1] in (12, 149))  # only these need several blocks
    draw = np.random.default_rng(0).standard_normal
    x, kernel = draw(shape, np.float32), draw((side, side, shape[-1], outputs), np.float32)
    weight = draw((*shape[:3], outputs), np.float32)
    ours = jax.jit(lambda kernel: jax.vjp(lambda kernel: same_convolution(x, kernel), kernel)[1](weight)[0])(kernel)
    weight, x = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()).double() for a in (weight, x))
    exact = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).double().requires_grad_()
    torch.nn.functional.conv2d(x, exact, padding=side // 2).backward(weight)
    theirs = exact.grad.permute(2, 3, 1, 0).numpy()
    assert (
        np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) <= 2e-6
    )  # measured: 1.6e-6; JAX's gradient: up to 4e-6


def test_one_pixel_kernel_with_stride_equals_pytorch():
    rng = np.random.default_rng(0)
    layer = convolution(4, 6, 1, stride=2, dtype=np.float32, rngs=nnx.Rngs(0))
    theirs = torch.nn.Conv2d(4, 6, 1, stride=2, bias=False)
    theirs.weight = torch.nn.Parameter(torch.from_numpy(np.array(layer.kernel[...]).transpose(3, 2, 0, 1).copy()))
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((2, 9, 12, 4), (2, 5, 6, 6)))
    graph, parameters = nnx.split(layer)
    values, vjp = jax.vjp(lambda parameters, x: nnx.merge(graph, parameters)(x), parameters, x)
    grad_layer, grad_x = vjp(weight)
    their_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = theirs(their_x)
    expected.backward(torch.from_numpy(weight.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(values, expected.detach().permute(0, 2, 3, 1), rtol=0, atol=1e-6)  # measured: 2.4e-7
    np.testing.assert_allclose(grad_x, their_x.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-6)  # measured: 3.0e-7
    grad_kernel = grad_layer["kernel"][...][0, 0].T
    np.testing.assert_allclose(grad_kernel, theirs.weight.grad[..., 0, 0], rtol=0, atol=1e-5)  # measured: 2.9e-6


def test_gradients_in_float64_and_bfloat16():
    x, kernel = random_arrays(3)
    with jax.enable_x64():
        double = jax.vjp(same_convolution, *(np.float64(a) for a in (x, kernel)))[1](np.ones((2, 9, 12, 5)))[1]
    assert double.dtype == np.float64
    values, vjp = jax.vjp(same_convolution, *(jax.numpy.asarray(a, jax.numpy.bfloat16) for a in (x, kernel)))
    half = vjp(jax.numpy.ones_like(values))[1]
    assert half.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(np.float64(half), double, atol=0.5)  # sums of 200 numbers near 1, in 8 bits


@pytest.mark.skipif(not on_cpu(), reason="other devices use JAX's gradients")
def test_gradients_in_a_loop_compile_to_the_fast_form():
    def loss(x, kernels):
        return jax.lax.scan(lambda x, kernel: (same_convolution(x, kernel), None), x, kernels)[0].sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*random_arrays(3, 3, channels=4)).compile()
    forms = re.findall(r" convolution\(.*dim_labels=([^, ]+)", compiled.as_text())
    # the forward pass and the image's gradient; JAX's gradients have one more convolution, and two more forms
    assert (len(forms), set(forms)) == (2, {"b01f_01io->b01f"})


# --- any number of axes, any strides ---


@pytest.mark.parametrize(
    ("size", "kernel", "strides"),
    [
        ((9, 12), (3, 3), (2, 2)),
        ((9, 12), (1, 3), (1, 2)),
        ((6, 9, 8), (3, 3, 3), (1, 1, 1)),
        ((6, 9, 8), (1, 3, 3), (1, 1, 1)),
        ((7, 9, 8), (3, 3, 3), (1, 2, 2)),
        ((6, 9, 8), (1, 1, 1), (1, 1, 1)),
        ((6, 9, 8), (5, 3, 3), (1, 1, 1)),
    ],
)
def test_any_axes_and_strides_equal_pytorch(size, kernel, strides):
    """Values and gradients are compared in float64."""
    with jax.enable_x64():
        draw = np.random.default_rng(0).standard_normal
        x, k = draw((2, *size, 4)), draw((*kernel, 4, 5))
        ours, vjp = jax.vjp(jax.jit(lambda x, k: convolve(x, k, strides)), x, k)
        weight = draw(ours.shape)
        grad_x, grad_k = vjp(weight)
        theirs_x, theirs_k = (
            torch.from_numpy(a.copy()).requires_grad_() for a in (np.moveaxis(x, -1, 1), channels_first(k))
        )
        torch_convolution = torch.nn.functional.conv2d if len(size) == 2 else torch.nn.functional.conv3d
        expected = torch_convolution(theirs_x, theirs_k, stride=strides, padding=[side // 2 for side in kernel])
        expected.backward(torch.from_numpy(np.moveaxis(weight, -1, 1).copy()))
        for array, reference in (
            (ours, expected.detach().movedim(1, -1)),
            (grad_x, theirs_x.grad.movedim(1, -1)),
            (channels_first(np.asarray(grad_k)), theirs_k.grad),
        ):
            np.testing.assert_allclose(array, reference, atol=1e-12)  # measured: 1.3e-13, for values up to 60


def channels_first(kernel):
    return np.moveaxis(kernel, (-2, -1), (1, 0))


def test_cpu_form_equals_xlas_convolution():
    draw = np.random.default_rng(0).standard_normal
    for strides in ((1, 1, 1), (2, 2, 2)):
        x, kernel = draw((2, 6, 10, 8, 16), np.float32), draw((3, 3, 3, 16, 12), np.float32)
        ours, theirs = (form(x, kernel, strides) for form in (_cpu_form, _convolve_by_xla))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # measured: 2.7e-5, for values up to 90
