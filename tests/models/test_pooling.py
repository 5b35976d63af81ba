"""Max-pooling and its undoing beside PyTorch's, ties included."""

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxla.models.ops.pooling import max_pool, max_pool_overlapping, max_pool_with_places, unpool


def values(ties, seed=0, shape=(2, 6, 10, 3)):
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return np.maximum(np.round(x), 0) if ties else x  # as after a ReLU: many zeros, and equal numbers


def channels_first(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def channels_last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("ties", [False, True])
def test_pooling_takes_the_largest_and_sends_its_gradient_to_the_first_of_them(ties):
    x = values(ties)
    pooled, pull = jax.vjp(max_pool, x)
    given = channels_first(x).requires_grad_()
    theirs = functional.max_pool2d(given, 2)
    np.testing.assert_array_equal(pooled, channels_last(theirs))
    weight = np.random.default_rng(1).standard_normal(pooled.shape, dtype=np.float32)
    theirs.backward(channels_first(weight))
    np.testing.assert_array_equal(pull(weight)[0], channels_last(given.grad))


@pytest.mark.parametrize("ties", [False, True])
def test_unpooling_puts_values_where_the_largest_were(ties):
    x = values(ties)
    places = max_pool_with_places(x).places
    small = np.random.default_rng(2).standard_normal(places.shape, dtype=np.float32)
    unpooled, pull = jax.vjp(lambda small: unpool(small, places), small)
    _, where = functional.max_pool2d(channels_first(x), 2, return_indices=True)
    given = channels_first(small).requires_grad_()
    theirs = functional.max_unpool2d(given, where, 2)
    np.testing.assert_array_equal(unpooled, channels_last(theirs))
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    theirs.backward(channels_first(weight))
    np.testing.assert_array_equal(pull(weight)[0], channels_last(given.grad))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sides", [(6, 10), (7, 9), (1, 2)])
def test_pooling_of_overlapping_windows(sides, ties):
    x = values(ties, shape=(2, *sides, 3))
    pooled, pull = jax.vjp(max_pool_overlapping, x)
    given = channels_first(x).requires_grad_()
    theirs = functional.max_pool2d(given, 3, 2, 1)
    np.testing.assert_array_equal(pooled, channels_last(theirs))
    weight = np.random.default_rng(1).standard_normal(pooled.shape, dtype=np.float32)
    theirs.backward(channels_first(weight))
    # up to four windows' gradients meet in a pixel, and are added in some order; measured: 4.8e-7
    np.testing.assert_allclose(pull(weight)[0], channels_last(given.grad), rtol=0, atol=1e-6)
