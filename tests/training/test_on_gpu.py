"""Training steps traced and lowered as on an NVIDIA GPU: all of one that can be had without it. Nothing is computed."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from jaxla.experiments import METHODS
from jaxla.models.build import build_network, configuration_of, is_planned, reads_volumes
from jaxla.pipeline.sources import GRADIENTS, loss_of
from jaxla.training.losses import of_volumes
from jaxla.training.step import make_optimiser, make_step, split_network
from tests.tiny import TINY_PLAN

HOPPER = SimpleNamespace(
    platform="gpu", compute_capability="9.0", client=SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
)
CUDNN_ATTENTION = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
CLASSES = 3


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """What JAX says of its devices and of cuDNN where there are some."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [HOPPER])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 92000)


def lowered_step(method):
    """The text of the program of a step, before it is compiled."""
    model, recipe = method.model, method.training
    network = nnx.eval_shape(lambda: build_network(model, CLASSES, 0, plan=TINY_PLAN))
    split = split_network(network, train_backbone=model.backbone != "frozen")
    optimiser = make_optimiser(recipe, 100, pretrained_backbone=False)
    size = (method.preprocessing.image_size,) * 2
    if is_planned(model):
        size = configuration_of(model, TINY_PLAN).patch_size
    rows = (2, 5) if reads_volumes(model) else (2,)
    batch = {
        "input": jax.ShapeDtypeStruct((*rows, *size, 1), jnp.float32),
        "mask": jax.ShapeDtypeStruct((*rows, *size), jnp.uint8),
        "weight": jax.ShapeDtypeStruct(rows, jnp.float32),
    }
    loss = loss_of(recipe, batch_dice=True)
    loss = of_volumes(loss) if reads_volumes(model) else loss
    step = make_step(GRADIENTS[recipe.gradient](split.training, None, loss), optimiser)
    state = jax.eval_shape(optimiser.init, split.trainable)
    traced = step.trace(split.trainable, split.frozen, state, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("vit_mini8", "finetuned"),  # 145 tokens
        ("dinov2_vits14", "finetuned"),
        ("windows_dinov3_vits16", "finetuned"),  # rotary
        ("dinov2_vits14", "frozen"),
        ("fusion_vitb14", "frozen"),
        ("windows_vit_mini8", "finetuned"),
    ],
)
def test_transformers_attend_by_cudnn_in_bfloat16(name, backbone):
    method = METHODS[name]
    program = lowered_step(replace(method, model=replace(method.model, weights="random", backbone=backbone)))
    found = [target in program for target in (f"@{call}(" for call in CUDNN_ATTENTION)]
    assert found == [True, backbone == "finetuned"]


@pytest.mark.parametrize("name", ["unet", "attention_unet", "resnet50_unet", "segnet", "nnunet_2d", "nnunet_3d"])
def test_convolutions_are_xlas_own_in_bfloat16(name):
    """Not in the forms that are fast on a CPU, of which that of a kernel's gradient is a loop."""
    method = METHODS[name]
    program = lowered_step(replace(method, model=replace(method.model, weights="random")))
    results = re.findall(r"stablehlo\.convolution.*-> tensor<\w+x(\w+)>", program)
    assert results.count("bf16") > results.count("f32")  # logits are float32
    assert ("stablehlo.while" in program) == ("resnet" in name)  # whose blocks are scanned
