"""Max-pooling and unpooling against PyTorch's, including ties."""

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxla.models.ops.pooling import max_pool, max_pool_overlapping, max_pool_with_indices, unpool


def random_values(ties, seed=0, shape=(2, 6, 10, 3)):
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return np.maximum(np.round(x), 0) if ties else x  # as after a ReLU: many zeros, and equal numbers


def channels_first(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def channels_last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("ties", [False, True])
def test_pooling_and_its_gradient_equal_pytorch(ties):
    x = random_values(ties)
    pooled, vjp = jax.vjp(max_pool, x)
    their_x = channels_first(x).requires_grad_()
    theirs = functional.max_pool2d(their_x, 2)
    np.testing.assert_array_equal(pooled, channels_last(theirs))
    weight = np.random.default_rng(1).standard_normal(pooled.shape, dtype=np.float32)
    theirs.backward(channels_first(weight))
    np.testing.assert_array_equal(vjp(weight)[0], channels_last(their_x.grad))


@pytest.mark.parametrize("ties", [False, True])
def test_unpooling_and_its_gradient_equal_pytorch(ties):
    x = random_values(ties)
    indices = max_pool_with_indices(x).indices
    small = np.random.default_rng(2).standard_normal(indices.shape, dtype=np.float32)
    unpooled, vjp = jax.vjp(lambda small: unpool(small, indices), small)
    _, their_indices = functional.max_pool2d(channels_first(x), 2, return_indices=True)
    their_x = channels_first(small).requires_grad_()
    theirs = functional.max_unpool2d(their_x, their_indices, 2)
    np.testing.assert_array_equal(unpooled, channels_last(theirs))
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    theirs.backward(channels_first(weight))
    np.testing.assert_array_equal(vjp(weight)[0], channels_last(their_x.grad))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sides", [(6, 10), (7, 9), (1, 2)])
def test_overlapping_pooling_and_its_gradient_equal_pytorch(sides, ties):
    x = random_values(ties, shape=(2, *sides, 3))
    pooled, vjp = jax.vjp(max_pool_overlapping, x)
    their_x = channels_first(x).requires_grad_()
    theirs = functional.max_pool2d(their_x, 3, 2, 1)
    np.testing.assert_array_equal(pooled, channels_last(theirs))
    weight = np.random.default_rng(1).standard_normal(pooled.shape, dtype=np.float32)
    theirs.backward(channels_first(weight))
    # up to four gradients are summed in a pixel, in a different order; measured: 4.8e-7
    np.testing.assert_allclose(vjp(weight)[0], channels_last(their_x.grad), rtol=0, atol=1e-6)
