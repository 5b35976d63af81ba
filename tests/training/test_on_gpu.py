"""Training steps lowered for an NVIDIA GPU, on a machine without one. Nothing is computed."""

import re
from dataclasses import replace

import jax
import pytest
from jaxla.experiments import METHODS

from tests.gpu import HOPPER, TURING, lowered_step, pretend_gpu
from tests.tiny import TINY_PLAN

CUDNN_ATTENTION = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


@pytest.fixture
def program(monkeypatch):
    """A function that returns the program of a method's step, as text."""

    def program(method, capability=HOPPER):
        pretend_gpu(monkeypatch, capability)
        return lowered_step(method, classes=3, plan=TINY_PLAN, batch_size=2, slices=5).as_text()

    jax.clear_caches()  # traces for the CPU must not be used for the GPU, or the other way round
    yield program
    jax.clear_caches()


def with_backbone(name, backbone):
    method = METHODS[name]
    return replace(method, model=replace(method.model, backbone=backbone))


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
def test_transformers_use_cudnn_attention(program, name, backbone):
    text = program(with_backbone(name, backbone))
    found = [f"@{call}(" in text for call in CUDNN_ATTENTION]
    assert found == [True, backbone == "finetuned"]


@pytest.mark.parametrize("name", ["unet", "attention_unet", "resnet50_unet", "segnet", "nnunet_2d", "nnunet_3d"])
def test_convolutions_are_xlas_in_bfloat16(program, name):
    """The variants for the CPU are not used; their gradient of a kernel is a loop."""
    text = program(METHODS[name])
    results = re.findall(r"stablehlo\.convolution.*-> tensor<\w+x(\w+)>", text)
    # float32 only for the convolution of the logits and its two gradients, unless that is a matrix product
    assert results.count("bf16") > 25
    assert results.count("f32") in (0, 3)
    assert ("stablehlo.while" in text) == ("resnet" in name)  # its blocks are scanned


def test_a_gpu_before_ampere_uses_float32_without_cudnn_attention(program):
    text = program(with_backbone("vit_mini8", "finetuned"), TURING)
    assert "stablehlo.convolution" in text  # the decoder's
    assert "stablehlo.dot_general" in text
    assert "bf16" not in text
    assert "fmha" not in text
