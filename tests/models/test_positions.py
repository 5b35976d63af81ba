"""DINOv2's learned position grid, resized as in its authors' code, and DINOv3's rotation of patch tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxla.models.ops.positions import resize_grid, rotary_periods, rotary_rotation
from tests.golden.live import authors_resize

# --- DINOv2's grid ---

resize = jax.jit(resize_grid, static_argnames=("h", "w", "antialias"))
SIZES = [(7, 7), (16, 45), (38, 37), (1, 60), (74, 37)]


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_grid_is_resized_as_the_authors_do(h, w, registers):
    grid = np.random.default_rng(0).standard_normal((37, 37, 8), dtype=np.float32)
    theirs = authors_resize(torch.from_numpy(grid).permute(2, 0, 1)[None], h, w, registers)
    expected = theirs[0].permute(1, 2, 0).numpy()
    assert expected.shape == (h, w, 8)
    ours = resize(grid, h=h, w=w, antialias=registers)
    # measured: up to 1.5e-5 at 38×37, 8e-6 elsewhere; the authors' code in float32 differs from float64 by 1.1e-5
    np.testing.assert_allclose(ours, expected, atol=3e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_grid_at_its_own_size_is_unchanged(antialias):
    grid = jax.random.normal(jax.random.key(0), (37, 37, 8))
    np.testing.assert_array_equal(resize_grid(grid, 37, 37, antialias=antialias), grid)


# --- DINOv3's rotation ---


def test_periods_follow_the_authors_formula():
    quarter = 16
    expected = [100.0 ** (2 * k / (2 * quarter)) for k in range(quarter)]
    np.testing.assert_allclose(rotary_periods(64), expected, rtol=1e-6)  # measured: 2e-7


def test_each_patch_is_rotated_by_its_row_and_column():
    """In float64, each pair of channels is a complex number, which is rotated by the angle of its position."""
    h, w, prefix, heads, width = 3, 5, 4, 2, 16
    periods = np.array([1.0, 2.5, 7.0, 30.0], np.float32)
    x = np.random.default_rng(0).standard_normal((2, prefix + h * w, heads, width), dtype=np.float32)
    rotated = np.asarray(rotary_rotation(jnp.asarray(periods), h, w, prefix).rotate(x))

    np.testing.assert_array_equal(rotated[:, :prefix], x[:, :prefix])
    pairs = x[..., : width // 2] + 1j * x[..., width // 2 :].astype(np.float64)
    for row in range(h):
        for column in range(w):
            position = np.array([2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1])
            angles = 2 * np.pi * (position[:, None] / periods).ravel()  # angles of the row, then of the column
            token = prefix + row * w + column
            expected = pairs[:, token] * np.exp(1j * angles)
            ours = rotated[:, token, :, : width // 2] + 1j * rotated[:, token, :, width // 2 :]
            np.testing.assert_allclose(ours, expected, atol=3e-6)  # measured: 6e-7


def test_rotation_computes_in_float32_and_returns_the_dtype_of_the_tokens():
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 8)).astype(jnp.bfloat16)
    rotation = rotary_rotation(rotary_periods(8), 2, 2, 1)
    assert rotation.sine.dtype == rotation.cosine.dtype == jnp.float32
    assert rotation.rotate(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotation.rotate(x), rotation.rotate(x.astype(jnp.float32)).astype(jnp.bfloat16))
