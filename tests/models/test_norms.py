"""BatchNorm against PyTorch's: values, gradients, and both running statistics; GroupNorm without voxels."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxla.models.ops.norms import BatchNorm, GroupNorm
from tests.tiny import randomise

PRESENT = np.array([True, False, True, True, False])


def make_layers(shape=(3, 5, 7, 4), mean=0.0, seed=0):
    """Return our BatchNorm, PyTorch's with the same parameters and statistics, and float32 values [B, H, W, C]."""
    ours = randomise(BatchNorm(shape[-1]), seed)
    theirs = torch.nn.BatchNorm2d(shape[-1])
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    state = {name: torch.from_numpy(np.array(getattr(ours, our_name)[...])) for name, our_name in names.items()}
    theirs.load_state_dict(state, strict=False)
    return ours, theirs, np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) + np.float32(mean)


def channels_first(array):
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def test_training_equals_pytorch_in_values_gradients_and_running_statistics():
    ours, theirs, x = make_layers()
    ours.train()
    graph, parameters, statistics = nnx.split(ours, nnx.Param, ...)
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)

    @jax.jit
    def step(parameters, x):
        def loss(parameters, x):
            layer = nnx.merge(graph, parameters, statistics, copy=True)
            return (layer(x) * weight).sum(), nnx.state(layer, nnx.BatchStat)

        return jax.grad(loss, (0, 1), has_aux=True)(parameters, x)

    (grad_parameters, grad_x), after = step(parameters, x)
    their_x = channels_first(x).requires_grad_()
    (theirs(their_x) * channels_first(weight)).sum().backward()
    pairs = {
        "x": (grad_x, their_x.grad.permute(0, 2, 3, 1)),
        "scale": (grad_parameters["scale"].get_value(), theirs.weight.grad),
        "bias": (grad_parameters["bias"].get_value(), theirs.bias.grad),
        "mean": (after["mean"].get_value(), theirs.running_mean),
        "var": (after["var"].get_value(), theirs.running_var),
    }
    for name, (array, reference) in pairs.items():
        # measured: 7.6e-6, for values up to 29
        np.testing.assert_allclose(array, reference, rtol=0, atol=2e-5, err_msg=name)


def test_evaluation_uses_the_running_statistics_and_does_not_change_them():
    ours, theirs, x = make_layers()
    before = np.array(ours.mean[...]), np.array(ours.var[...])
    np.testing.assert_allclose(
        ours(x), theirs.eval()(channels_first(x)).detach().permute(0, 2, 3, 1), rtol=0, atol=1e-6
    )  # measured: 2.4e-7
    np.testing.assert_array_equal((ours.mean[...], ours.var[...]), before)


def test_absent_images_do_not_change_the_statistics():
    x = make_layers((5, 5, 7, 4))[2]
    layers = [make_layers((5, 5, 7, 4))[0] for _ in range(2)]
    for layer in layers:
        layer.train()
    masked = layers[0](x, jnp.asarray(PRESENT))[PRESENT]
    alone = layers[1](x[PRESENT])
    np.testing.assert_allclose(masked, alone, rtol=0, atol=2e-6)  # measured: 4.8e-7
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            getattr(layers[0], name)[...], getattr(layers[1], name)[...], rtol=0, atol=1e-6
        )  # measured: 6.0e-8


def test_gradients_with_absent_images_equal_pytorch():
    """Absent images are normalised by the statistics of the present ones, so their gradients reach the present ones."""
    ours, _, x = make_layers((5, 5, 7, 4))
    ours.train()
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)

    def loss(layer, x):
        return (layer(x, jnp.asarray(PRESENT)) * weight).sum()

    grad_layer, grad_x = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(ours, jnp.asarray(x))

    their_x = torch.from_numpy(x).double().requires_grad_()
    scale, bias = (torch.from_numpy(np.array(p[...])).double().requires_grad_() for p in (ours.scale, ours.bias))
    var, mean = torch.var_mean(their_x[torch.from_numpy(PRESENT)], (0, 1, 2), correction=0)
    ((their_x - mean) / torch.sqrt(var + 1e-5) * scale + bias).backward(torch.from_numpy(weight).double())
    pairs = ((grad_x, their_x), (grad_layer["scale"][...], scale), (grad_layer["bias"][...], bias))
    for gradient, leaf in pairs:
        np.testing.assert_allclose(gradient, leaf.grad, rtol=0, atol=2e-5)  # measured: 5.5e-6, for values up to 25


def test_variance_much_smaller_than_the_mean_keeps_its_digits():
    """As the difference of two squares near 1e6, a variance of 1 would lose its digits in float32."""
    ours, theirs, x = make_layers(mean=1000.0)
    ours.train()
    ours(x)
    theirs(channels_first(x).double().float())
    expected = 0.9 * np.array(make_layers()[0].var[...]) + 0.1 * x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(ours.var[...], expected, rtol=1e-5)  # measured: 1e-7


def test_bfloat16_has_gradients_in_bfloat16_and_parameters_and_statistics_in_float32():
    half, full = BatchNorm(4, dtype=jnp.bfloat16), BatchNorm(4)
    x = jnp.asarray(make_layers()[2], jnp.bfloat16)
    weight = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    results = []
    for layer, inputs in ((half, x), (full, x.astype(jnp.float32))):
        layer.train()
        gradient = nnx.jit(nnx.grad(lambda layer, x: (layer(x) * weight).sum(), argnums=(0, 1)))
        grad_layer, grad_x = gradient(layer, inputs)
        assert grad_x.dtype == inputs.dtype
        assert grad_layer["scale"][...].dtype == grad_layer["bias"][...].dtype == np.float32
        results.append((grad_x.astype(jnp.float32), grad_layer["scale"][...], grad_layer["bias"][...]))
    for half_gradient, full_gradient in zip(*results, strict=True):
        # measured: 0.023, for values up to 29
        np.testing.assert_allclose(half_gradient, full_gradient, rtol=0, atol=0.05)
    np.testing.assert_array_equal(half.var[...], full.var[...])
    assert half.var[...].dtype == np.float32


def test_group_norm_of_a_volume_without_voxels_is_finite():
    """A volume that only pads a batch has no voxels; NaN times its weight of 0 would be NaN."""
    layer, x = GroupNorm(8), np.ones((2, 3, 2, 2, 8), np.float32)
    present = np.array([[True] * 3, [False] * 3])[:, :, None, None]

    def loss(layer, x):
        return layer(x, jnp.asarray(present)).sum()

    value, gradients = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(layer, jnp.asarray(x))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
