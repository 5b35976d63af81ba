"""Gradients of nnU-Net's network against those of a PyTorch module in float64, and the network's initial parameters.

tests/convert_weights/test_nnunet.py compares logits with those of nnU-Net's code.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxla
from jaxla.nnunet.network import NNUNet
from jaxla.nnunet.plan import Configuration
from jaxla.training.losses import deep_supervision, dice_cross_entropy
from tests.parity.nnunet_reference import make_nnunet_reference, nnunet_to_torch
from tests.tiny import randomise

PLAN = Path(__file__).parents[1] / "golden" / "nnunet_plans" / "Hippocampus.json"

# 2D: 3×3 kernels; 3D: a coarse axis that the first stages neither convolve nor halve
TINY = {
    "2d": Configuration(
        2, (16, 24), (16, 24), (1, 1), True, 3, (4, 6, 8), ((3, 3),) * 3, ((1, 1), (2, 2), (1, 2)), (2, 1, 2), (2, 1)
    ),
    "3d": Configuration(
        2, (8, 16, 12), (8, 16, 12), (3, 1, 1), False, 3, (4, 6, 8), ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        ((1, 1, 1), (1, 2, 2), (2, 2, 2)), (2, 2, 1), (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("outputs", [1, 3])
def test_gradients_of_the_loss_equal_the_reference(name, outputs):
    """The loss is Dice and cross-entropy with deep supervision.

    If our network has one output, the reference has two, as nnU-Net does.
    """
    with jax.enable_x64():
        configuration, rng = TINY[name], np.random.default_rng(0)
        network = randomise(nnx.eval_shape(lambda: NNUNet(configuration, outputs, dtype=jnp.float64, rngs=nnx.Rngs(0))))
        for _, variable in nnx.to_flat_state(nnx.state(network)):
            variable.set_value(jnp.asarray(np.asarray(variable), jnp.float64))
        images = rng.standard_normal((2, *configuration.patch_size, 1))
        mask = rng.integers(0, max(2, outputs), images.shape[:-1])
        reference = make_nnunet_reference(configuration, network)
        network.train()
        graph, parameters = nnx.split(network)
        weight = jnp.ones(2)

        def loss(parameters):
            logits = nnx.merge(graph, parameters)(images)
            return deep_supervision(
                partial(dice_cross_entropy, batch_dice=configuration.batch_dice),
                logits,
                mask,
                weight,
            )

        value, gradients = jax.jit(jax.value_and_grad(loss))(parameters)
        theirs = their_loss(
            reference(torch.from_numpy(np.moveaxis(images, -1, 1).copy())),
            torch.from_numpy(mask),
            configuration.batch_dice,
        )
        theirs.backward()
        assert abs(float(value) - theirs.item()) <= 1e-12  # measured: 5.6e-16
        ours = nnunet_to_torch(configuration, gradients)
        # the coarsest logits do not contribute to the loss
        expected = {
            key: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for key, p in reference.named_parameters()
        }
        assert ours.keys() == expected.keys()
        difference, norm = (
            sum(np.square(array).sum() for array in arrays)
            for arrays in ((ours[key] - expected[key] for key in ours), expected.values())
        )
        assert np.sqrt(difference / norm) <= 1e-13  # measured: 1.8e-15


def their_loss(logits, mask, batch_dice):
    """Return nnU-Net's loss: cross-entropy minus soft Dice of the structures, with nearest-neighbour targets."""
    total, weights = 0.0, [0.5**level for level in range(len(logits) - 1)]
    for level_logits, weight in zip(logits, weights, strict=False):
        target = mask[:, None].to(level_logits.dtype)
        target = torch.nn.functional.interpolate(target, level_logits.shape[2:], mode="nearest-exact")[:, 0].long()
        probabilities = level_logits.softmax(1)[:, 1:]
        one_hot = (
            torch.nn.functional.one_hot(target, level_logits.shape[1]).movedim(-1, 1)[:, 1:].to(level_logits.dtype)
        )
        axes = tuple(range(2, level_logits.ndim))
        both, predicted, referenced = (x.sum(axes) for x in (probabilities * one_hot, probabilities, one_hot))
        if batch_dice:
            both, predicted, referenced = (x.sum(0) for x in (both, predicted, referenced))
        dice = ((2 * both + 1e-5) / (predicted + referenced + 1e-5)).mean()
        total = total + weight * (torch.nn.functional.cross_entropy(level_logits, target) - dice)
    return total / sum(weights)


def test_sigmoid_of_one_output_equals_softmax_of_nnunets_two_outputs():
    configuration = TINY["3d"]
    two = randomise(nnx.eval_shape(lambda: NNUNet(configuration, 2, rngs=nnx.Rngs(0))))
    graph = nnx.split(nnx.eval_shape(lambda: NNUNet(configuration, 1, rngs=nnx.Rngs(0))))[0]
    one = nnx.merge(graph, nnx.state(two))
    images = np.random.default_rng(1).standard_normal((1, *configuration.patch_size, 1), np.float32)
    logits, finest, single = nnx.jit(lambda two, one: (two(images), two.multiscale_logits(images)[0], one(images)))(
        two, one
    )
    np.testing.assert_array_equal(logits, finest)
    structure = jax.nn.softmax(logits)[..., 1:]
    np.testing.assert_allclose(jax.nn.sigmoid(single), structure, atol=1e-6)  # measured: 6e-8


def test_training_refuses_sides_that_evaluation_pads():
    network = randomise(nnx.eval_shape(lambda: NNUNet(TINY["3d"], 3, rngs=nnx.Rngs(0))))
    images = np.random.default_rng(1).standard_normal((1, 9, 17, 13, 1), np.float32)
    assert jax.eval_shape(network, images).shape == (1, 9, 17, 13, 3)
    network.train()
    with pytest.raises(
        ValueError, match=r"images of 9×17×13 pixels: sides must be multiples of 2×4×4, such as 8×16×12"
    ):
        network(images)
    network.eval()
    for wrong, message in (
        (images[0], r"expected \[B, D, H, W, 1\]"),
        (np.moveaxis(images, -1, 1), "channels must come last"),
        (images[:, :1], "at least 2×4×4 are needed"),
        (images.astype(int), "expected floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            network(wrong)


def test_initial_parameters_are_distributed_as_in_nnunet():
    """He initialisation: normal, scaled by the fan-in for LeakyReLU with slope 0.01; biases are zero."""
    two_stages = {"n_stages": 2, "features_per_stage": (64, 128), "strides": ((1, 1, 1), (2, 2, 2))}
    configuration = TINY["3d"]._replace(
        **two_stages, kernel_sizes=((3, 3, 3),) * 2, n_conv_per_stage=(1, 1), n_conv_per_stage_decoder=(1,)
    )
    network = NNUNet(configuration, 1, rngs=nnx.Rngs(1))
    gain = 2 / (1 + 0.01**2)
    convolution = network.down[1][0].convolution
    np.testing.assert_allclose(np.std(convolution.kernel[...]), np.sqrt(gain / (27 * 64)), rtol=0.01)
    up = network.up[0].kernel[...]  # PyTorch's fan-in of a transposed convolution counts outputs
    np.testing.assert_allclose(np.std(up), np.sqrt(gain / (8 * 64)), rtol=0.01)
    assert not np.asarray(convolution.bias[...]).any()


def test_plan_is_required_by_nnunet_and_refused_by_other_methods():
    for plan in (PLAN, json.loads(PLAN.read_text())):
        network = nnx.eval_shape(lambda plan=plan: jaxla.build_network("nnunet_2d", classes=3, plan=plan))
        assert network.logits[0].out_features == 3
    with pytest.raises(jaxla.InputError, match="plan: nnunet_2d needs a plan"):
        jaxla.build_network("nnunet_2d")
    with pytest.raises(jaxla.InputError, match="plan: unet needs no plan"):
        jaxla.build_network("unet", plan=PLAN)
    with pytest.raises(jaxla.InputError, match="plan: not a plan"):
        jaxla.build_network("nnunet_2d", plan={"configurations": []})
