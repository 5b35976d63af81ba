"""Training steps lowered as for an NVIDIA GPU: all of one that can be had without it. Nothing is computed."""

import re
from dataclasses import replace

import pytest

from jaxla.experiments import METHODS
from tests.hopper import ANSWERS, lowered_step
from tests.tiny import TINY_PLAN

CUDNN_ATTENTION = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    for answer in ANSWERS:
        monkeypatch.setattr(*answer)


def program(method):
    return lowered_step(method, classes=3, plan=TINY_PLAN, batch_size=2, slices=5).as_text()


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
def test_transformers_attend_by_cudnn(name, backbone):
    method = METHODS[name]
    text = program(replace(method, model=replace(method.model, backbone=backbone)))
    found = [f"@{call}(" in text for call in CUDNN_ATTENTION]
    assert found == [True, backbone == "finetuned"]


@pytest.mark.parametrize("name", ["unet", "attention_unet", "resnet50_unet", "segnet", "nnunet_2d", "nnunet_3d"])
def test_convolutions_are_xlas_own_in_bfloat16(name):
    """Not in the forms that are fast on a CPU, of which that of a kernel's gradient is a loop."""
    text = program(METHODS[name])
    results = re.findall(r"stablehlo\.convolution.*-> tensor<\w+x(\w+)>", text)
    assert results.count("bf16") > results.count("f32")  # logits are float32
    assert ("stablehlo.while" in text) == ("resnet" in name)  # whose blocks are scanned
