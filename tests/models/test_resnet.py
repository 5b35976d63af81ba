"""The ResNet encoder against its PyTorch reference (parity/references.py): features, gradients, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla import InputError
from jaxla.models.backbones import build_backbone
from jaxla.models.backbones.resnet import ResNet, Variant
from jaxla.models.networks.base import TransformerOptions
from tests.parity.references import make_reference, network_to_torch
from tests.tiny import flat_arrays, randomise

SMALL = Variant(blocks=(2, 3, 2, 2))


def small_resnet(dtype=jnp.float32):
    return randomise(nnx.eval_shape(lambda: ResNet(SMALL, dtype=dtype, rngs=nnx.Rngs(0))))


def random_images(batch, height, width, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, height, width, 3), dtype=np.float32)


def channels_first(array):
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def relative_l2(ours, theirs):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# --- features ---


def test_features_equal_the_reference():
    resnet, images = small_resnet(), random_images(2, 65, 97)  # odd sides; tests/parity has even ones
    features = resnet.intermediate(images)
    for ours, theirs in zip(features, make_reference(resnet)(channels_first(images))[1:], strict=True):
        assert relative_l2(ours, channels_last(theirs)) <= 1e-6  # measured: 5.2e-7
    np.testing.assert_array_equal(resnet(images), features[-1])
    assert [x.shape[-1] for x in features] == [64, 256, 512, 1024, 2048]


def test_bfloat16_keeps_the_direction_of_all_features():
    images, full, half = random_images(2, 65, 97), small_resnet(), small_resnet(jnp.bfloat16)
    assert {str(x.dtype) for x in flat_arrays(half, nnx.Variable).values()} == {"float32"}
    for x, y in zip(full.intermediate(images), half.intermediate(images), strict=True):
        assert y.dtype == jnp.bfloat16
        y = y.astype(jnp.float32)
        cosine = (x * y).sum(-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
        assert cosine.min() >= 0.999  # measured: 0.99995


def test_program_does_not_grow_with_the_depth():
    def convolutions(arch):
        resnet = nnx.eval_shape(lambda: build_backbone(arch, rngs=nnx.Rngs(0)))
        program = str(jax.make_jaxpr(resnet.intermediate)(random_images(1, 64, 64)))
        # 1×1 convolutions are matrix products
        return program.count("conv_general_dilated[") + program.count("dot_general[")

    # the stem; in each of four stages, the first block with its projection, and the body of a loop over the others
    assert convolutions("resnet152") == convolutions("resnet50") == 1 + 4 * (4 + 3)


# --- training ---


def test_training_equals_the_reference():
    """Compared in float64: in float32, rounding moves activations across a ReLU's zero, and gradients by 0.3 %."""
    with jax.enable_x64():
        resnet, images = small_resnet(jnp.float64), random_images(2, 33, 49).astype(np.float64)
        for _, variable in nnx.to_flat_state(nnx.state(resnet)):
            variable.set_value(jnp.asarray(np.asarray(variable), jnp.float64))
        reference = make_reference(resnet).train()
        their_features = reference(channels_first(images))[1:]
        draw = np.random.default_rng(1).standard_normal
        weights = [draw(channels_last(x).shape) for x in their_features]

        @jax.jit
        def step(parameters, statistics):
            def loss(parameters):
                network = nnx.merge(graph, parameters, statistics, copy=True)  # its statistics change
                features = network.intermediate(images)
                value = sum((x * weight).mean() for x, weight in zip(features, weights, strict=True))
                return value, (features, nnx.state(network, nnx.BatchStat))

            return jax.grad(loss, has_aux=True)(parameters)

        resnet.train()
        graph, parameters, statistics = nnx.split(resnet, nnx.Param, ...)
        gradients, (features, statistics) = step(parameters, statistics)

    sum((x * channels_first(weight)).mean() for x, weight in zip(their_features, weights, strict=True)).backward()
    errors = [relative_l2(x, channels_last(y)) for x, y in zip(features, their_features, strict=True)]
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()} | dict(
        reference.named_buffers()
    )
    for state in (gradients, statistics):
        errors += [relative_l2(array, theirs[name].numpy()) for name, array in network_to_torch(resnet, state).items()]
    assert len(errors) == 5 + 5 * 32  # features; weight, scale, bias, mean and variance of each convolution
    assert max(errors) <= 1e-12  # measured: 7.6e-14


# --- bad input ---


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 32, 32), ["(1, 3, 32, 32)", "[B, H, W, 3]", "channels must come last"]),
        ((1, 32, 32, 1), ["(1, 32, 32, 1)", "[B, H, W, 3]"]),
        ((32, 32, 3), ["(32, 32, 3)", "[B, H, W, 3]"]),
        ((1, 0, 32, 3), ["(1, 0, 32, 3)", "no pixel"]),
        ((0, 32, 32, 3), ["(0, 32, 32, 3)", "no pixel"]),
    ],
)
def test_images_with_a_wrong_shape_are_refused(shape, words):
    resnet = nnx.eval_shape(lambda: ResNet(SMALL, rngs=nnx.Rngs(0)))
    for call in (resnet, resnet.intermediate):
        with pytest.raises(ValueError, match="images of") as error:
            call(np.zeros(shape, np.float32))
        assert all(word in str(error.value) for word in words)


def test_a_resnet_in_place_of_a_transformer_is_refused():
    line = r"^model.arch=resnet50: not a vision transformer, which this network needs\. Use dinov2_vits14, "
    with pytest.raises(InputError, match=line):
        TransformerOptions(arch="resnet50").resolve()
