"""The convolution with gradients of its own: JAX's numbers, in the one form that XLA runs fast on CPU."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.models.ops.convolution import _as_it_stands, _block, _for_cpu, convolve, same_convolution
from jaxla.models.ops.layers import convolution


def by_jax(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def arrays(side, *leading, channels=5):
    draw = np.random.default_rng(0).standard_normal
    return draw((2, 9, 12, 4), np.float32), draw((*leading, side, side, 4, channels), np.float32)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_values_and_gradients_are_those_of_jax(side):
    x, kernel = arrays(side)
    ours, gradients = jax.vjp(jax.jit(same_convolution), x, kernel)
    theirs, expected = jax.vjp(by_jax, x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if side > 1 else 2e-6)  # measured: 4.8e-7
    weight = np.random.default_rng(1).standard_normal(ours.shape, np.float32)
    for a, b in zip(gradients(weight), expected(weight), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)  # measured: 1.9e-5, of values up to 42


@pytest.mark.parametrize(
    ("shape", "outputs", "side"),
    [
        ((3, 37, 61, 4), 5, 3),  # odd sides
        ((3, 37, 61, 6), 5, 3),  # more channels than outputs: the gradient is shifted instead
        ((5, 12, 10, 200), 210, 3),  # several whole images to a block, the last block not full
        ((5, 12, 10, 210), 200, 3),
        ((1, 149, 90, 40), 40, 5),  # blocks of rows, the last one not full
        ((1, 149, 90, 41), 40, 5),
        ((2, 64, 64, 16), 300, 1),
    ],
)
def test_the_kernels_gradient_is_that_of_float64_to_its_last_digits(shape, outputs, side):
    images, rows = _block(np.empty((*shape[:3], min(shape[3], outputs)), np.float32), side)
    assert (shape[0] > images or shape[1] > rows) == (shape[1] in (12, 149))  # several blocks, or one
    draw = np.random.default_rng(0).standard_normal
    x, kernel = draw(shape, np.float32), draw((side, side, shape[-1], outputs), np.float32)
    weight = draw((*shape[:3], outputs), np.float32)
    ours = jax.jit(lambda kernel: jax.vjp(lambda kernel: same_convolution(x, kernel), kernel)[1](weight)[0])(kernel)
    given = [torch.from_numpy(a.transpose(0, 3, 1, 2).copy()).double() for a in (weight, x)]
    exact = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).double().requires_grad_()
    torch.nn.functional.conv2d(given[1], exact, padding=side // 2).backward(given[0])
    theirs = exact.grad.permute(2, 3, 1, 0).numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) <= 2e-6  # measured: 1.6e-6; JAX's own: up to 4e-6


def test_a_kernel_of_one_pixel_with_a_stride():
    rng = np.random.default_rng(0)
    layer = convolution(4, 6, 1, stride=2, dtype=np.float32, rngs=nnx.Rngs(0))
    theirs = torch.nn.Conv2d(4, 6, 1, stride=2, bias=False)
    theirs.weight = torch.nn.Parameter(torch.from_numpy(np.array(layer.kernel[...]).transpose(3, 2, 0, 1).copy()))
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((2, 9, 12, 4), (2, 5, 6, 6)))
    graph, parameters = nnx.split(layer)
    values, pull = jax.vjp(lambda parameters, x: nnx.merge(graph, parameters)(x), parameters, x)
    of_layer, of_x = pull(weight)
    given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = theirs(given)
    expected.backward(torch.from_numpy(weight.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(values, expected.detach().permute(0, 2, 3, 1), rtol=0, atol=1e-6)  # measured: 2.4e-7
    np.testing.assert_allclose(of_x, given.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-6)  # measured: 3.0e-7
    of_kernel = of_layer["kernel"][...][0, 0].T
    np.testing.assert_allclose(of_kernel, theirs.weight.grad[..., 0, 0], rtol=0, atol=1e-5)  # measured: 2.9e-6


def test_gradients_in_float64_and_bfloat16():
    x, kernel = arrays(3)
    with jax.enable_x64():
        of_kernel = jax.vjp(same_convolution, *(np.float64(a) for a in (x, kernel)))[1](np.ones((2, 9, 12, 5)))[1]
    assert of_kernel.dtype == np.float64
    half = [jax.numpy.asarray(a, jax.numpy.bfloat16) for a in (x, kernel)]
    values, pull = jax.vjp(same_convolution, *half)
    of_half = pull(jax.numpy.ones_like(values))[1]
    assert of_half.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(np.float64(of_half), of_kernel, atol=0.5)  # of sums of 200 numbers near 1, in 8 bits


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the gradients are JAX's own")
def test_gradients_in_a_loop_are_convolutions_of_the_fast_form():
    def last(x, kernels):
        return jax.lax.scan(lambda x, kernel: (same_convolution(x, kernel), None), x, kernels)[0].sum()

    compiled = jax.jit(jax.grad(last, (0, 1))).lower(*arrays(3, 3, channels=4)).compile()
    forms = re.findall(r" convolution\(.*dim_labels=([^, ]+)", compiled.as_text())
    # forward, and the image's gradient; JAX's own: two more forms, and one more convolution
    assert (len(forms), set(forms)) == (2, {"b01f_01io->b01f"})


# --- any number of axes, any strides ---


@pytest.mark.parametrize(
    ("size", "kernel", "strides"),
    [
        ((9, 12), (3, 3), (2, 2)),
        ((9, 12), (1, 3), (1, 1)),
        ((9, 12), (1, 3), (1, 2)),
        ((6, 9, 8), (3, 3, 3), (1, 1, 1)),
        ((6, 9, 8), (1, 3, 3), (1, 1, 1)),
        ((6, 9, 8), (3, 1, 3), (1, 1, 1)),
        ((6, 9, 8), (3, 3, 3), (2, 2, 2)),
        ((7, 9, 8), (3, 3, 3), (1, 2, 2)),
        ((6, 9, 8), (1, 1, 1), (1, 1, 1)),
        ((6, 9, 8), (5, 3, 3), (1, 1, 1)),
    ],
)
def test_convolutions_of_any_axes_and_strides_equal_pytorchs(size, kernel, strides):
    """Values and gradients, in float64."""
    with jax.enable_x64():
        draw = np.random.default_rng(0).standard_normal
        x, k = draw((2, *size, 4)), draw((*kernel, 4, 5))
        ours, pull = jax.vjp(jax.jit(lambda x, k: convolve(x, k, strides)), x, k)
        weight = draw(ours.shape)
        of_x, of_k = pull(weight)
        theirs_x, theirs_k = (
            torch.from_numpy(a.copy()).requires_grad_() for a in (np.moveaxis(x, -1, 1), channels_first(k))
        )
        run = torch.nn.functional.conv2d if len(size) == 2 else torch.nn.functional.conv3d
        expected = run(theirs_x, theirs_k, stride=strides, padding=[side // 2 for side in kernel])
        expected.backward(torch.from_numpy(np.moveaxis(weight, -1, 1).copy()))
        for mine, other in (
            (ours, expected.detach().movedim(1, -1)),
            (of_x, theirs_x.grad.movedim(1, -1)),
            (channels_first(np.asarray(of_k)), theirs_k.grad),
        ):
            np.testing.assert_allclose(mine, other, atol=1e-12)  # measured: 1.3e-13, of values up to 60


def channels_first(kernel):
    return np.moveaxis(kernel, (-2, -1), (1, 0))


def test_what_is_made_for_the_cpu_is_what_other_devices_compute():
    """The two forms, in float32: slices with their neighbours among the channels, and the convolution as it stands."""
    draw = np.random.default_rng(0).standard_normal
    for strides in ((1, 1, 1), (2, 2, 2)):
        x, kernel = draw((2, 6, 10, 8, 16), np.float32), draw((3, 3, 3, 16, 12), np.float32)
        ours, theirs = (form(x, kernel, strides) for form in (_for_cpu, _as_it_stands))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # measured: 2.7e-5, of values up to 90
