"""Where a patch lies: DINOv2's learned grid as its authors resize it, DINOv3's rotation of patch tokens alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxla.models.ops.positions import position_grid, rotary_periods, rotation
from tests.golden.live import authors_resize

# --- DINOv2's grid ---

resize = jax.jit(position_grid, static_argnames=("h", "w", "antialias"))
SIZES = [(7, 7), (32, 32), (16, 45), (45, 16), (37, 36), (38, 37), (1, 60), (74, 37)]


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_positions_are_interpolated_as_the_authors_do(h, w, registers):
    grid = np.random.default_rng(0).standard_normal((37, 37, 8), dtype=np.float32)
    theirs = authors_resize(torch.from_numpy(grid).permute(2, 0, 1)[None], h, w, registers)
    expected = theirs[0].permute(1, 2, 0).numpy()
    assert expected.shape == (h, w, 8)
    ours = resize(grid, h=h, w=w, antialias=registers)
    # Measured: 1.5e-5 and 1.4e-5 at 38×37, 8e-6 and 2e-6 at most elsewhere. In float32 the authors' own
    # resizing is up to 1.1e-5 from its float64.
    np.testing.assert_allclose(ours, expected, atol=3e-5)


def test_the_two_kinds_of_models_resize_differently():
    grid = jax.random.normal(jax.random.key(0), (37, 37, 8))
    plain, antialiased = (resize(grid, h=16, w=45, antialias=antialias) for antialias in (False, True))
    assert np.abs(plain - antialiased).max() > 1


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_at_the_native_size_are_the_learned_ones(antialias):
    grid = jax.random.normal(jax.random.key(0), (37, 37, 8))
    np.testing.assert_array_equal(position_grid(grid, 37, 37, antialias=antialias), grid)


# --- DINOv3's rotation ---


def test_periods_are_the_formula_of_the_authors():
    quarter = 16
    expected = [100.0 ** (2 * k / (2 * quarter)) for k in range(quarter)]
    np.testing.assert_allclose(rotary_periods(64), expected, rtol=1e-6)  # measured: 2e-7


def rows(rotate, x):
    return rotate.rows(x)


def columns(rotate, x):
    """The same through the layout that has tokens last."""
    return rotate.columns(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("turn", [rows, columns])
def test_each_patch_is_turned_by_its_own_row_and_column(turn):
    """Every pair of channels as one complex number, turned by the angle of its place, in float64."""
    h, w, prefix, heads, width = 3, 5, 4, 2, 16
    periods = np.array([1.0, 2.5, 7.0, 30.0], np.float32)
    x = np.random.default_rng(0).standard_normal((2, prefix + h * w, heads, width), dtype=np.float32)
    turned = np.asarray(turn(rotation(jnp.asarray(periods), h, w, prefix), x))

    np.testing.assert_array_equal(turned[:, :prefix], x[:, :prefix])
    pairs = x[..., : width // 2] + 1j * x[..., width // 2 :].astype(np.float64)
    for row in range(h):
        for column in range(w):
            place = np.array([2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1])
            angles = 2 * np.pi * (place[:, None] / periods).ravel()  # first those of rows, then those of columns
            token = prefix + row * w + column
            expected = pairs[:, token] * np.exp(1j * angles)
            ours = turned[:, token, :, : width // 2] + 1j * turned[:, token, :, width // 2 :]
            np.testing.assert_allclose(ours, expected, atol=3e-6)  # measured: 6e-7


@pytest.mark.parametrize("turn", [rows, columns])
def test_rotation_is_computed_in_float32_and_keeps_the_dtype_of_the_tokens(turn):
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 8)).astype(jnp.bfloat16)
    rotate = rotation(rotary_periods(8), 2, 2, 1)
    assert rotate.sine.dtype == rotate.cosine.dtype == jnp.float32
    assert turn(rotate, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(turn(rotate, x), turn(rotate, x.astype(jnp.float32)).astype(jnp.bfloat16))
