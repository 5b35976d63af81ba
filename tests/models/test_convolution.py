"""The convolution with gradients of its own: JAX's numbers, in the one form that XLA runs fast on CPU."""

import re

import jax
import numpy as np
import pytest

from jaxla.models.convolution import same_convolution


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
    np.testing.assert_array_equal(ours, theirs)
    weight = np.random.default_rng(1).standard_normal(ours.shape, np.float32)
    for a, b in zip(gradients(weight), expected(weight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # measured: 0; 42 is the largest value, with a last digit of 4e-6


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the gradients are JAX's own")
def test_gradients_in_a_loop_are_convolutions_of_the_fast_form():
    def last(x, kernels):
        return jax.lax.scan(lambda x, kernel: (same_convolution(x, kernel), None), x, kernels)[0].sum()

    compiled = jax.jit(jax.grad(last, (0, 1))).lower(*arrays(3, 3, channels=4)).compile()
    forms = re.findall(r" convolution\(.*dim_labels=([^, ]+)", compiled.as_text())
    assert (len(forms), set(forms)) == (3, {"b01f_01io->b01f"})  # JAX's own: two more forms
