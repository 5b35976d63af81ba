"""BatchNorm beside PyTorch's: values, gradients, and both running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxla.models.ops.norms import BatchNorm
from tests.tiny import randomise


def both(shape=(3, 5, 7, 4), mean=0.0, seed=0):
    """-> our layer, PyTorch's with the same parameters and statistics, and values [B, H, W, C] in float32."""
    ours = randomise(BatchNorm(shape[-1]), seed)
    theirs = torch.nn.BatchNorm2d(shape[-1])
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    state = {name: torch.from_numpy(np.array(getattr(ours, here)[...])) for name, here in names.items()}
    theirs.load_state_dict(state, strict=False)
    return ours, theirs, np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) + np.float32(mean)


def channels_first(array):
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def test_training_gives_pytorchs_values_gradients_and_unbiased_statistics():
    ours, theirs, x = both()
    ours.train()
    graph, parameters, statistics = nnx.split(ours, nnx.Param, ...)
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)

    @jax.jit
    def step(parameters, x):
        def loss(parameters, x):
            layer = nnx.merge(graph, parameters, statistics, copy=True)
            return (layer(x) * weight).sum(), nnx.state(layer, nnx.BatchStat)

        return jax.grad(loss, (0, 1), has_aux=True)(parameters, x)

    (of_parameters, of_x), after = step(parameters, x)
    given = channels_first(x).requires_grad_()
    (theirs(given) * channels_first(weight)).sum().backward()
    pairs = {
        "x": (of_x, given.grad.permute(0, 2, 3, 1)),
        "scale": (of_parameters["scale"].get_value(), theirs.weight.grad),
        "bias": (of_parameters["bias"].get_value(), theirs.bias.grad),
        "mean": (after["mean"].get_value(), theirs.running_mean),
        "var": (after["var"].get_value(), theirs.running_var),
    }
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)  # measured: 7.6e-6, of values up to 29


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    ours, theirs, x = both()
    before = np.array(ours.mean[...]), np.array(ours.var[...])
    np.testing.assert_allclose(
        ours(x), theirs.eval()(channels_first(x)).detach().permute(0, 2, 3, 1), rtol=0, atol=1e-6
    )  # measured: 2.4e-7
    np.testing.assert_array_equal((ours.mean[...], ours.var[...]), before)


def test_images_that_are_not_present_do_not_count():
    x = both((5, 5, 7, 4))[2]
    layers = [both((5, 5, 7, 4))[0] for _ in range(2)]
    for layer in layers:
        layer.train()
    present = np.array([True, False, True, True, False])
    some = layers[0](x, jnp.asarray(present))[present]
    alone = layers[1](x[present])
    np.testing.assert_allclose(some, alone, rtol=0, atol=2e-6)  # measured: 4.8e-7
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            getattr(layers[0], name)[...], getattr(layers[1], name)[...], rtol=0, atol=1e-6
        )  # measured: 6.0e-8


def test_gradients_where_some_images_are_not_present():
    """They are normalised too, by the statistics of the others, and so send these a gradient."""
    ours, _, x = both((5, 5, 7, 4))
    ours.train()
    present = np.array([True, False, True, True, False])
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)

    def loss(layer, x):
        return (layer(x, jnp.asarray(present)) * weight).sum()

    of_ours, of_x = nnx.grad(loss, argnums=(0, 1))(ours, jnp.asarray(x))

    given = torch.from_numpy(x).double().requires_grad_()
    scale, bias = (torch.from_numpy(np.array(p[...])).double().requires_grad_() for p in (ours.scale, ours.bias))
    var, mean = torch.var_mean(given[torch.from_numpy(present)], (0, 1, 2), correction=0)
    ((given - mean) / torch.sqrt(var + 1e-5) * scale + bias).backward(torch.from_numpy(weight).double())
    pairs = ((of_x, given), (of_ours["scale"][...], scale), (of_ours["bias"][...], bias))
    for a, b in pairs:
        np.testing.assert_allclose(a, b.grad, rtol=0, atol=2e-5)  # measured: 5.5e-6, of values up to 25


def test_a_variance_that_is_small_beside_the_mean_keeps_its_digits():
    """As a difference of squares it would have none: 1e6 against 1, in seven digits."""
    ours, theirs, x = both(mean=1000.0)
    ours.train()
    ours(x)
    theirs(channels_first(x).double().float())
    expected = 0.9 * np.array(both()[0].var[...]) + 0.1 * x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(ours.var[...], expected, rtol=1e-5)  # measured: 1e-7


def test_bfloat16_keeps_its_statistics_in_float32():
    x = both()[2]
    half, full = BatchNorm(4, dtype=jnp.bfloat16), BatchNorm(4)
    for layer in (half, full):
        layer.train()
    assert half(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    full(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(half.var[...], full.var[...])
    assert half.var[...].dtype == np.float32


def test_gradients_of_bfloat16_are_bfloat16_and_its_parameters_float32():
    half, full = BatchNorm(4, dtype=jnp.bfloat16), BatchNorm(4)
    x = jnp.asarray(both()[2], jnp.bfloat16)
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    results = []
    for layer, given in ((half, x), (full, x.astype(jnp.float32))):
        layer.train()
        of_layer, of_x = nnx.grad(lambda layer, x: (layer(x) * weight).sum(), argnums=(0, 1))(layer, given)
        assert of_x.dtype == given.dtype
        assert of_layer["scale"][...].dtype == of_layer["bias"][...].dtype == np.float32
        results.append((of_x.astype(jnp.float32), of_layer["scale"][...], of_layer["bias"][...]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05)  # measured: 0.023, of values up to 29
