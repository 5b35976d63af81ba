"""One training step: which parameters it changes, by how much, and parity with PyTorch."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from jaxla.config import BackboneTraining, Training
from jaxla.models.backbones.vgg import VGG, Variant
from jaxla.models.networks.segnet import SegNet
from jaxla.models.networks.transformer_segmenter import ConvolutionalDecoder, TransformerSegmenter
from jaxla.training.losses import cross_entropy
from jaxla.training.optimisers import make_optimiser, make_rates
from jaxla.training.step import count_parameters, make_evaluation, make_gradient, split_network
from jaxla.training.trainer import Trainer
from tests.tiny import flat_arrays, randomise, tiny_backbone

CONSTANT = BackboneTraining(learning_rate=1e-2, backbone_learning_rate=1e-4, schedule="constant")
KEY = jax.random.key(0)

# Comparisons with PyTorch come first: once used, `fast_compilation` stays active for the rest of the module.
fast = pytest.mark.usefixtures("fast_compilation")


def tiny_network():
    decoder = nnx.eval_shape(lambda: ConvolutionalDecoder(32, (8, 4), 1, rngs=nnx.Rngs(0)))
    return TransformerSegmenter(tiny_backbone(), randomise(decoder, 1))


def make_batch(size=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input": rng.random((size, 24, 40, 1), dtype=np.float32),
        "mask": (rng.random((size, 24, 40)) < 0.3).astype(np.uint8),
        "volume": np.zeros(size, np.int32),
        "weight": np.ones(size, np.float32),
    }


def arrays_by_name(state):
    """Return copies of a state's arrays by name; a step donates the memory of its arguments."""
    return {".".join(map(str, path)): np.array(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


@cache
def states_around_steps(train_backbone):
    """Return trainable parameters, frozen parameters and statistics before each of three steps, and after the last."""
    trainer = Trainer(tiny_network(), CONSTANT, 10, train_backbone=train_backbone, has_pretrained_backbone=True)
    states = []
    for i in range(4):
        frozen = trainer.frozen
        states.append(
            (arrays_by_name(trainer.trainable), arrays_by_name(frozen.parameters), arrays_by_name(frozen.statistics))
        )
        assert np.isfinite(trainer.step(make_batch(seed=i), i))
    return states


def split_names(train_backbone):
    parts = split_network(tiny_network(), train_backbone)
    return (
        set(arrays_by_name(parts.trainable)),
        set(arrays_by_name(parts.frozen.parameters)),
        set(arrays_by_name(parts.frozen.statistics)),
    )


# --- learning rates ---


@pytest.mark.parametrize(("pretrained", "backbone_rate"), [(True, 1e-4), (False, 1e-2)])
def test_only_a_pretrained_backbone_has_its_own_learning_rate(pretrained, backbone_rate):
    """Adam's first step has the size of the learning rate."""
    optimiser = make_optimiser(CONSTANT, has_pretrained_backbone=pretrained)
    parameters = nnx.State({part: {"x": nnx.Param(jnp.zeros(1))} for part in ("backbone", "decoder")})
    gradients, rates = jax.tree.map(jnp.ones_like, parameters), make_rates(CONSTANT, 10)(0)
    updates, _ = optimiser.update(gradients, optimiser.init(parameters), parameters, rates=rates)
    sizes = {part: -float(updates[part]["x"][...][0]) for part in ("backbone", "decoder")}
    assert sizes == pytest.approx({"backbone": backbone_rate, "decoder": 1e-2}, rel=1e-4)


def learning_rates(recipe, steps):
    """Return Adam's learning rates: the sizes of its steps when the gradient is always 1."""
    optimiser, rates = make_optimiser(recipe, has_pretrained_backbone=False), make_rates(recipe, steps)
    parameters = nnx.State({"decoder": {"x": nnx.Param(jnp.zeros(1))}})

    def step(state, rates):
        updates, state = optimiser.update(jax.tree.map(jnp.ones_like, parameters), state, parameters, rates=rates)
        return state, -jax.tree.leaves(updates)[0][0]

    every_rate = jax.tree.map(lambda *values: jnp.stack(values), *map(rates, range(steps)))
    return np.asarray(jax.lax.scan(step, optimiser.init(parameters), every_rate)[1])


def test_constant_schedule_is_constant():
    np.testing.assert_allclose(learning_rates(CONSTANT, 20), 1e-2, rtol=1e-4)


def test_cosine_schedule_warms_up_and_ends_near_zero():
    rates = learning_rates(Training(learning_rate=1e-2, schedule="cosine"), 200)
    np.testing.assert_allclose(rates[:4], 1e-2 * np.array([0.25, 0.5, 0.75, 1]), rtol=1e-4, atol=1e-9)
    falling = 1e-2 * (1 + np.cos(np.pi * np.arange(197) / 197)) / 2  # the rate reaches 0 one step later
    np.testing.assert_allclose(rates[3:], falling, rtol=1e-3, atol=1e-8)
    assert 0 < rates[-1] < 1e-5


def test_cosine_schedule_trains_in_a_single_step():
    assert learning_rates(Training(learning_rate=1e-2, schedule="cosine"), 1).sum() > 0


def test_poly_schedule_falls_after_each_epoch():
    recipe = Training(epochs=4, optimiser="adam", learning_rate=1e-2, schedule="poly")
    expected = np.repeat(1e-2 * (1 - np.arange(4) / 4) ** 0.9, 5)
    np.testing.assert_allclose(learning_rates(recipe, 20), expected, rtol=1e-4)


# --- parity with PyTorch ---


class TwoConvolutions(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 4, (3, 3), padding=1, rngs=rngs)
        self.second = nnx.Conv(4, 1, (3, 3), padding=1, rngs=rngs)

    def __call__(self, x, present=None):
        return self.second(jax.nn.silu(self.first(x)))


def test_twenty_steps_of_adam_equal_pytorch():
    network = randomise(TwoConvolutions(nnx.Rngs(0)))
    start = flat_arrays(network)
    trainer = Trainer(network, CONSTANT, 20)
    losses = [float(trainer.step(make_batch(seed=i), i)) for i in range(20)]

    first, second = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
    for name, layer in (("first", first), ("second", second)):
        layer.weight.data = torch.from_numpy(start[f"{name}.kernel"].transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.from_numpy(start[f"{name}.bias"].copy())
    theirs = torch.nn.Sequential(first, torch.nn.SiLU(), second)
    adam, their_losses = torch.optim.Adam(theirs.parameters(), lr=1e-2), []
    for i in range(20):
        batch = make_batch(seed=i)
        logits = theirs(torch.from_numpy(batch["input"].transpose(0, 3, 1, 2).copy()))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0], torch.from_numpy(batch["mask"]).float()
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        their_losses.append(loss.item())

    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, their_losses, atol=1e-6)  # measured: 4e-7
    ours = arrays_by_name(trainer.trainable)
    for name, layer in (("first", first), ("second", second)):
        kernel = layer.weight.detach().permute(2, 3, 1, 0)
        assert np.abs(ours[f"{name}.kernel"] - start[f"{name}.kernel"]).max() > 0.05
        np.testing.assert_allclose(ours[f"{name}.kernel"], kernel, atol=4e-6)  # measured: 1.2e-6
        np.testing.assert_allclose(ours[f"{name}.bias"], layer.bias.detach(), atol=4e-6)  # measured: 1.2e-6


def test_sgd_with_decay_clipping_and_schedule_equals_pytorch():
    """nnU-Net's recipe: two epochs of five steps; some gradients are clipped."""
    recipe = Training(epochs=2, optimiser="sgd", learning_rate=1e-2, schedule="poly")
    optimiser = make_optimiser(recipe, has_pretrained_backbone=False)
    rates = make_rates(recipe, 10)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((5, 6), np.float32)
    gradients = rng.standard_normal((10, 5, 6), np.float32) * np.linspace(0.5, 8, 10, dtype=np.float32)[:, None, None]
    ours = nnx.State({"decoder": {"x": nnx.Param(jnp.asarray(start))}})
    state = optimiser.init(ours)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    sgd = torch.optim.SGD([theirs], 1e-2, momentum=0.99, weight_decay=3e-5, nesterov=True)
    for i, gradient in enumerate(gradients):
        wrapped = nnx.State({"decoder": {"x": nnx.Param(jnp.asarray(gradient))}})
        updates, state = optimiser.update(wrapped, state, ours, rates=rates(i))
        ours = optax.apply_updates(ours, updates)
        for group in sgd.param_groups:
            group["lr"] = 1e-2 * (1 - (i // 5) / 2) ** 0.9
        theirs.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_([theirs], 12)
        sgd.step()
    assert np.linalg.norm(gradients[0]) < 12 < np.linalg.norm(gradients[-1])
    np.testing.assert_allclose(jax.tree.leaves(ours)[0], theirs.detach(), atol=5e-6)  # measured: 9.5e-7


# --- which parameters change ---


def test_a_frozen_backbone_is_not_differentiated():
    network = tiny_network()
    backbone_names = {f"backbone.{name}" for name in flat_arrays(network.backbone)}
    decoder_names = {f"decoder.{name}" for name in flat_arrays(network.decoder)}
    trainable, parameters, statistics = split_names(train_backbone=False)
    assert (trainable, parameters) == (decoder_names, backbone_names)
    assert statistics == {"decoder.stages.0.norm.mean", "decoder.stages.0.norm.var"}

    parts = split_network(tiny_network(), train_backbone=False)
    gradient = make_gradient(parts.training)
    _, gradients, _ = jax.eval_shape(gradient, parts.trainable, parts.frozen, make_batch(), KEY)
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(gradients)} == decoder_names
    assert count_parameters(parts.trainable) == sum(a.size for a in flat_arrays(network.decoder).values())


@fast
def test_a_frozen_backbone_keeps_every_bit_while_every_decoder_parameter_changes():
    (trainable, parameters, _), *_, (new_trainable, new_parameters, _) = states_around_steps(train_backbone=False)
    for name, value in parameters.items():
        np.testing.assert_array_equal(new_parameters[name], value)
    assert not [name for name, value in trainable.items() if np.array_equal(new_trainable[name], value)]


@fast
def test_every_parameter_of_a_finetuned_backbone_changes():
    (trainable, parameters, _), _, (new_trainable, _, _), _ = states_around_steps(train_backbone=True)
    assert parameters == {}
    assert any(name.startswith("backbone.blocks") for name in trainable)
    assert not [name for name, value in trainable.items() if np.array_equal(new_trainable[name], value)]


@fast
def test_statistics_are_updated_from_the_batch_and_used_in_evaluation():
    (_, _, before), (_, _, after), *_ = states_around_steps(train_backbone=False)
    network = tiny_network()
    tokens = network.backbone((make_batch()["input"] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).patches
    decoder = network.decoder
    x = decoder.mix(jax.nn.selu(decoder.token_classifier(tokens)))
    stage = decoder.stages[0]
    x = np.asarray(stage.convolution(jax.image.resize(x, (4, 6, 10, 8), "linear", antialias=False)))
    for name, batch_value in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2), ddof=1))):
        name = f"decoder.stages.0.norm.{name}"
        assert not np.array_equal(after[name], before[name])
        np.testing.assert_allclose(after[name], 0.9 * before[name] + 0.1 * batch_value, atol=1e-7)  # measured: 1e-9

    parts = split_network(tiny_network(), train_backbone=False)
    evaluate = make_evaluation(parts.evaluation)
    old = evaluate(parts.trainable, parts.frozen, make_batch()).loss
    changed = jax.tree.map(lambda x: x + 1, parts.frozen.statistics)
    new = evaluate(parts.trainable, parts.frozen._replace(statistics=changed), make_batch()).loss
    assert abs(float(new - old)) > 1e-3


@fast
def test_first_step_of_adam_has_the_size_of_the_learning_rate():
    (before, _, _), (after, _, _), *_ = states_around_steps(train_backbone=True)
    for part, rate in (("backbone", 1e-4), ("decoder", 1e-2)):
        sizes = np.concatenate([np.abs(after[n] - before[n]).ravel() for n in before if n.startswith(part)])
        # Float32 parameters up to 3 resolve a step to 2e-7. Gradients near Adam's epsilon of 1e-8 make it shorter.
        assert sizes.max() <= rate + 3e-7
        assert abs(np.median(sizes) - rate) < 0.01 * rate


@fast
def test_gradient_is_the_slope_of_the_loss():
    """Finite differences are computed for one element of each of three parameters."""
    parts, batch = split_network(tiny_network(), train_backbone=True), make_batch()
    _, gradients, _ = jax.jit(make_gradient(parts.training))(parts.trainable, parts.frozen, batch, KEY)

    @jax.jit
    def loss(trainable):
        network = nnx.merge(parts.training, trainable, *parts.frozen, copy=True)
        return cross_entropy(network(batch["input"]), batch["mask"], batch["weight"])

    for name in ("backbone.blocks.mlp.expand.kernel", "backbone.pos_grid", "decoder.mix.kernel"):
        gradient = arrays_by_name(gradients)[name]
        index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)

        def move(shift, path, x, name=name, index=index):
            is_named = jax.tree_util.keystr(path, simple=True, separator=".").startswith(name)
            return x.at[index].add(shift) if is_named else x

        up, down = (
            loss(jax.tree_util.tree_map_with_path(partial(move, shift), parts.trainable)) for shift in (0.01, -0.01)
        )
        assert abs(gradient[index]) > 5e-4
        np.testing.assert_allclose(gradient[index], (up - down) / 0.02, rtol=0.01, err_msg=name)  # measured: 3e-3


# --- a frozen encoder with BatchNorm ---


@fast
def test_a_frozen_encoder_runs_in_evaluation_mode_and_keeps_its_statistics():
    def segnet():
        variant, rngs = Variant(stages=((4, 4), (6,), (8,), (8,), (8,))), nnx.Rngs(0)
        return SegNet(VGG(variant, rngs=rngs), 1, rngs=rngs)

    parts = split_network(randomise(nnx.eval_shape(segnet)), train_backbone=False)
    statistics_before = arrays_by_name(parts.frozen.statistics)
    assert statistics_before
    for state in (statistics_before, arrays_by_name(parts.trainable)):
        assert not [name for name in state if name.startswith("backbone")]
    images = np.random.default_rng(0).random((4, 32, 40, 1), dtype=np.float32)
    batch = {"input": images, "mask": (images[..., 0] > 0.5).astype(np.uint8), "weight": np.ones(4, np.float32)}
    loss, _, auxiliary = jax.jit(make_gradient(parts.training))(parts.trainable, parts.frozen, batch, KEY)
    assert np.isfinite(loss)
    after = arrays_by_name(auxiliary["statistics"])
    assert after.keys() == statistics_before.keys()
    assert all((after[name] != before).any() for name, before in statistics_before.items())

    @partial(jax.jit, static_argnums=0)
    def features(graph):
        return nnx.merge(graph, parts.trainable, *parts.frozen).backbone(np.repeat(images, 3, axis=-1))

    np.testing.assert_array_equal(features(parts.training), features(parts.evaluation))
