"""Training steps lowered for an NVIDIA GPU, on a machine that may have none; nothing is computed."""

import re
from dataclasses import replace

import jax
import pytest
from jaxla.experiments import METHODS

from tests.gpu import HOPPER, TURING, lowered_step, pretend_gpu, task_without_data
from tests.tiny import TINY_PLAN

CUDNN_ATTENTION = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


@pytest.fixture
def program(monkeypatch):
    """A function that returns the text of a method's training step, lowered for a compute capability."""

    def program(method, capability=HOPPER):
        pretend_gpu(monkeypatch, capability)
        method = replace(method, training=replace(method.training, batch_size=2))
        return lowered_step(task_without_data(method, outputs=3, plan=TINY_PLAN), slices=5).as_text()

    jax.clear_caches()  # otherwise JAX reuses what it traced for the other platform
    yield program
    jax.clear_caches()


def with_backbone(name, backbone):
    method = METHODS[name]
    return replace(method, model=replace(method.model, backbone=backbone))


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("vit_mini8", "finetuned"),  # 145 tokens
        ("windows_dinov3_vits16", "finetuned"),  # rotary
        ("fusion_vitb14", "frozen"),
    ],
)
def test_transformers_use_cudnn_attention(program, name, backbone):
    text = program(with_backbone(name, backbone))
    found = [f"@{call}(" in text for call in CUDNN_ATTENTION]
    assert found == [True, backbone == "finetuned"]


@pytest.mark.parametrize("name", ["unet", "attention_unet", "resnet50_unet", "segnet", "nnunet_2d", "nnunet_3d"])
def test_convolutions_run_in_bfloat16_and_are_not_rewritten(program, name):
    """The forms that are fast on a CPU, which include a loop for a kernel's gradient, are not used."""
    text = program(METHODS[name])
    results = re.findall(r"stablehlo\.convolution.*-> tensor<\w+x(\w+)>", text)
    # in float32: the convolution that gives the logits and its two gradients, unless it is a matrix product
    assert results.count("bf16") > 25
    assert results.count("f32") in (0, 3)
    assert ("stablehlo.while" in text) == ("resnet" in name)  # a ResNet's blocks are scanned


def test_gpu_before_ampere_computes_in_float32_without_cudnn_attention(program):
    text = program(with_backbone("vit_mini8", "finetuned"), TURING)
    assert "stablehlo.convolution" in text  # in the decoder
    assert "stablehlo.dot_general" in text
    assert "bf16" not in text
    assert "fmha" not in text
