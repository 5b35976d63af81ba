"""Weight decay and gradient clipping against PyTorch's, and the running mean of the parameters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.config import Training
from jaxla.models.networks.unet import UNet
from jaxla.training.optimisers import average_parameters, make_optimiser, make_rates
from jaxla.training.trainer import Trainer
from tests.tiny import flat_arrays, randomise

AVERAGED = nnx.Any(nnx.Param, nnx.BatchStat)
RECIPE = Training(learning_rate=0.01, schedule="constant", epochs=1)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("decay", "clip"), [(0.1, 0.0), (0.0, 0.5), (0.1, 0.5)])
def test_weight_decay_and_clipping_equal_pytorch(decay, clip):
    ours, theirs = {"w": jnp.asarray(draw(5, 3))}, torch.nn.Parameter(torch.from_numpy(draw(5, 3)))
    recipe = replace(RECIPE, weight_decay=decay, max_gradient_norm=clip)
    optimiser, rates = make_optimiser(recipe, has_pretrained_backbone=False), make_rates(recipe, 10)
    reference, state = torch.optim.AdamW([theirs], lr=0.01, weight_decay=decay), optimiser.init(ours)
    for step in range(5):
        gradient = draw(5, 3, seed=step + 1)
        theirs.grad = torch.from_numpy(gradient)
        if clip:
            assert torch.nn.utils.clip_grad_norm_([theirs], clip) > clip
        reference.step()
        updates, state = optimiser.update({"w": jnp.asarray(gradient)}, state, ours, rates=rates(step))
        ours = jax.tree.map(jnp.add, ours, updates)
    np.testing.assert_allclose(ours["w"], theirs.detach(), rtol=0, atol=1e-6)  # measured: 5.4e-7
    assert np.abs(ours["w"] - draw(5, 3)).max() > 0.03


def test_accumulated_gradients_give_one_update_with_their_mean():
    """Four updates, whose learning rates follow a cosine from the first update on."""
    ours, theirs = {"w": jnp.asarray(draw(5, 3))}, torch.nn.Parameter(torch.from_numpy(draw(5, 3)))
    recipe = replace(RECIPE, accumulated_steps=3, schedule="cosine")
    optimiser = make_optimiser(recipe, has_pretrained_backbone=False)
    reference, state, rates = torch.optim.Adam([theirs]), optimiser.init(ours), make_rates(recipe, 12)
    for step in range(12):
        before, gradient = np.asarray(ours["w"]), draw(5, 3, seed=step)
        updates, state = optimiser.update({"w": jnp.asarray(gradient)}, state, ours, rates=rates(step))
        ours = jax.tree.map(jnp.add, ours, updates)
        (torch.from_numpy(gradient) * theirs).sum().div(3).backward()
        assert np.array_equal(before, ours["w"]) == (step % 3 != 2)
        if step % 3 == 2:
            reference.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * (step // 3) / 4)) / 2
            reference.step()
            reference.zero_grad()
            np.testing.assert_allclose(ours["w"], theirs.detach(), rtol=0, atol=1e-6)  # measured: 1.8e-7


def test_polynomial_decay_counts_the_accumulated_steps():
    """Adam's update for a constant gradient is the learning rate; there are 25 updates in ten epochs of five steps."""
    recipe = replace(RECIPE, epochs=10, accumulated_steps=2, schedule="poly")
    optimiser, parameter = make_optimiser(recipe, has_pretrained_backbone=False), {"w": jnp.ones(1)}
    state, make_step_rates, rates = optimiser.init(parameter), make_rates(recipe, 50), []
    for step in range(50):
        updates, state = optimiser.update({"w": jnp.ones(1)}, state, parameter, rates=make_step_rates(step))
        rates.append(-float(updates["w"][0]))
    expected = [0.01 * (1 - 2 * update // 5 / 10) ** 0.9 for update in range(25)]
    np.testing.assert_allclose(rates[1::2], expected, rtol=1e-4)  # measured: 1.0e-7, for rates up to 0.01
    assert not any(rates[::2])


def test_the_running_mean_forgets_the_initial_parameters_and_then_decays():
    """Step n keeps the fraction min(decay, (1 + n) / (10 + n)) of the mean."""
    average, parameters = average_parameters(0.15), jnp.array([8.0])
    state, expected = average.init(parameters), 8.0
    for n, kept in enumerate((1 / 10, 0.15, 0.15)):
        updates, state = average.update(jnp.array([2.0]), state, parameters)
        parameters = parameters + updates
        expected = kept * expected + (1 - kept) * (10 + 2 * n)
        assert state.average == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly"])
def test_runs_of_any_length_share_one_program(schedule):
    """A run with a time budget uses the program whose steps were timed; only the learning rates differ."""
    programs, parameters = set(), {"w": jnp.ones(3)}
    for epochs, steps in ((1, 10), (7, 700)):
        recipe = replace(RECIPE, schedule=schedule, epochs=epochs)
        optimiser, rates = make_optimiser(recipe, has_pretrained_backbone=False), make_rates(recipe, steps)
        arguments = parameters, optimiser.init(parameters), parameters
        update = jax.jit(
            lambda gradients, state, parameters, rates, update=optimiser.update: update(
                gradients, state, parameters, rates=rates
            )
        )
        programs.add(update.lower(*arguments, rates(5)).as_text())
    assert len(programs) == 1


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_running_mean_of_parameters_and_batch_statistics_is_evaluated_and_kept(norm):
    network = randomise(nnx.eval_shape(lambda: UNet((4, 8), 1, norm=norm, rngs=nnx.Rngs(0))))
    batch = {
        "input": np.abs(draw(2, 16, 16, 1)),
        "mask": (draw(2, 16, 16) > 0).astype(np.uint8),
        "volume": np.arange(2, dtype=np.int32),
        "weight": np.ones(2, np.float32),
    }
    averaged = Trainer(network, replace(RECIPE, average_decay=0.5), 10)
    steps = [flat_arrays(averaged.network(), AVERAGED)]
    graph = nnx.graphdef(averaged.network())
    for step in range(2):
        averaged.step(batch, step)
        steps.append(flat_arrays(nnx.merge(graph, averaged.trainable, *averaged.frozen, copy=True), AVERAGED))
    kept = flat_arrays(averaged.network(), AVERAGED)
    assert (len(kept) > len(flat_arrays(averaged.network()))) == (norm == "batch")
    for name, value in kept.items():  # the first step keeps 1/10 of the mean, the second 2/11
        first = 0.1 * steps[0][name] + 0.9 * steps[1][name]
        np.testing.assert_allclose(value, 2 / 11 * first + 9 / 11 * steps[2][name], rtol=0, atol=1e-6)  # measured: 6e-8
    plain = Trainer(averaged.network(), RECIPE, 10)
    assert float(averaged.evaluate(batch).loss) == float(plain.evaluate(batch).loss)
