"""The convolutional networks against PyTorch modules written from their papers: logits, gradients, BatchNorm.

Our random parameters are converted to PyTorch by the conversion tables. Gradients and statistics are compared in
float64, because in float32 rounding moves a few activations across a ReLU's zero in either implementation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from jaxla.models.backbones.resnet import ResNet
from jaxla.models.backbones.resnet import Variant as ResNetVariant
from jaxla.models.backbones.vgg import VGG
from jaxla.models.backbones.vgg import Variant as VGGVariant
from jaxla.models.networks.attention_unet import AttentionUNet
from jaxla.models.networks.resnet_unet import ResNetUNet
from jaxla.models.networks.segnet import SegNet
from jaxla.models.networks.unet import UNet
from tests.parity.references import make_reference, network_to_torch
from tests.tiny import randomise

pytestmark = pytest.mark.usefixtures("fast_compilation")

SMALL_RESNET = ResNetVariant(blocks=(2, 1, 1, 1))
SMALL_VGG = VGGVariant(stages=((6, 6), (8,), (12, 12), (16,), (16,)))
SIZE = (64, 96)


def resnet_unet(outputs, *, dtype, rngs):
    return ResNetUNet(
        ResNet(SMALL_RESNET, dtype=dtype, rngs=rngs), (32, 24, 16, 16, 8), outputs, dtype=dtype, rngs=rngs
    )


def segnet(outputs, *, dtype, rngs):
    return SegNet(VGG(SMALL_VGG, dtype=dtype, rngs=rngs), outputs, dtype=dtype, rngs=rngs)


NETWORKS = {
    "unet": partial(UNet, (8, 16, 24)),
    "unet with InstanceNorm": partial(UNet, (8, 16, 24), norm="instance"),
    "attention_unet": partial(AttentionUNet, (8, 16, 24)),
    "resnet_unet": resnet_unet,
    "segnet": segnet,
}


def make_network(name, outputs=1, dtype=jnp.float32):
    network = randomise(nnx.eval_shape(lambda: NETWORKS[name](outputs, dtype=dtype, rngs=nnx.Rngs(0))))
    for _, variable in nnx.to_flat_state(nnx.state(network)):
        variable.set_value(jnp.asarray(np.asarray(variable), dtype))
    return network


def random_batch(dtype=np.float32):
    rng = np.random.default_rng(1)
    return rng.random((2, *SIZE, 1)).astype(dtype), (rng.random((2, *SIZE, 1)) > 0.7).astype(dtype)


def their_input(name, images):
    """Return images with channels first; pretrained encoders get three channels, normalised as for ImageNet."""
    if name in ("resnet_unet", "segnet"):
        images = (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_the_reference(name):
    network, images = make_network(name, outputs=3), random_batch()[0]
    logits = nnx.jit(lambda network: network(images))(network)
    with torch.no_grad():
        theirs = make_reference(network)(their_input(name, images).float()).numpy().transpose(0, 2, 3, 1)
    assert logits.dtype == np.float32
    # measured: at most 3.9e-6 with InstanceNorm and 6e-7 with other norms, for values with an SD of 0.02 to 0.6
    bound = 8e-6 if "Instance" in name else 2e-6
    assert np.abs(logits - theirs).max() <= bound


@pytest.mark.parametrize("name", NETWORKS)
def test_training_equals_the_reference(name):
    """The gradients of binary cross-entropy, and BatchNorm's statistics after five steps of Adam."""
    with jax.enable_x64():
        network = make_network(name, dtype=jnp.float64)
        images, mask = random_batch(np.float64)
        reference = make_reference(network).train()
        network.train()
        graph, parameters, statistics = nnx.split(network, nnx.Param, ...)
        adam = optax.adam(1e-4)
        state = adam.init(parameters)

        @jax.jit
        def step(parameters, statistics, state):
            def loss(parameters):
                network = nnx.merge(graph, parameters, statistics, copy=True)  # because its statistics change
                value = optax.sigmoid_binary_cross_entropy(network(images), mask).mean()
                return value, nnx.state(network, nnx.BatchStat)

            gradients, new = jax.grad(loss, has_aux=True)(parameters)
            updates, state_after = adam.update(gradients, state, parameters)
            return gradients, optax.apply_updates(parameters, updates), new, state_after

        optimiser = torch.optim.Adam(reference.parameters(), 1e-4)
        inputs, targets = their_input(name, images), torch.from_numpy(mask.transpose(0, 3, 1, 2).copy())
        for i in range(5):
            gradients, parameters, statistics, state = step(parameters, statistics, state)
            optimiser.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(reference(inputs), targets).backward()
            if i == 0:
                theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
                ours = network_to_torch(network, gradients)
                assert ours.keys() == theirs.keys()
                assert relative_l2(ours, theirs) <= 1e-12  # measured: 1.1e-13
            optimiser.step()
        ours = network_to_torch(network, statistics)
        assert len(ours) == 2 * sum(isinstance(module, torch.nn.BatchNorm2d) for module in reference.modules())
        if ours:
            assert relative_l2(ours, dict(reference.named_buffers())) <= 1e-12  # measured: 6.3e-14


def relative_l2(ours, theirs):
    """Return the relative L2 difference over all arrays; the gradient of a bias before BatchNorm is pure rounding."""
    theirs = {name: theirs[name].numpy() for name in ours}
    difference = sum(np.square(ours[name] - theirs[name]).sum() for name in ours)
    return np.sqrt(difference / sum(np.square(array).sum() for array in theirs.values()))
