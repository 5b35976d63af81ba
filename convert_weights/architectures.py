"""Describe every architecture that can be converted: the authors' tensors and our parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from convert_weights.checkpoint import Checkpoint
from convert_weights.layout import Row
from convert_weights.nnunet import nnunet_rows, read_output_count
from convert_weights.resnet import resnet_rows
from convert_weights.vgg import vgg_rows
from convert_weights.vision_transformer import dinov2_rows, dinov3_rows
from jaxla.models.backbones import VARIANTS, build_backbone, resnet, vgg
from jaxla.models.weights import parameter_shapes
from jaxla.nnunet.converted import NNUNET, build_from_plan, parse_metadata
from jaxla.nnunet.plan import Plan, plan_to_json

RELEASED = {arch: variant for arch, variant in VARIANTS.items() if variant.licence}


class Architecture(NamedTuple):
    """The authors' tensors and our parameters of one architecture."""

    name: str
    rows: list[Row]  # the authors' tensors, in their order
    shapes: dict[str, tuple[int, ...]]  # the shape of each of our parameters
    metadata: dict[str, str]  # further entries of the converted file's metadata


def released_architecture(arch: str) -> Architecture:
    """Return the architecture with this name in `RELEASED`."""
    metadata = {"licence": RELEASED[arch].licence}
    return Architecture(arch, architecture_rows(arch), architecture_shapes(arch), metadata)


def architecture_rows(arch: str) -> list[Row]:
    """Return the authors' tensors of one of `RELEASED`, in their order."""
    variant = RELEASED[arch]
    if isinstance(variant, resnet.Variant):
        return resnet_rows(variant)
    if isinstance(variant, vgg.Variant):
        return vgg_rows(variant)
    return dinov2_rows(variant) if variant.grid else dinov3_rows(arch, variant)


def architecture_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our parameters by name, for one of `RELEASED`."""
    return parameter_shapes(nnx.eval_shape(lambda: build_backbone(arch, rngs=nnx.Rngs(0))))


def nnunet_architecture(plan: Plan, configuration: str, checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a network that nnU-Net trained; its number of classes is read from the checkpoint."""
    outputs = read_output_count(checkpoint.tensors, checkpoint.path)
    plan_text = json.dumps(plan_to_json(plan._replace(fingerprint=None)))
    metadata = {"licence": "", "plan": plan_text, "configuration": configuration, "outputs": str(outputs)}
    return _nnunet_architecture(plan, configuration, outputs, metadata)


def converted_architecture(path: Path, metadata: dict[str, str]) -> Architecture | None:
    """Return the architecture of a converted file; None if it was never released in a PyTorch format."""
    if metadata["arch"] == NNUNET:
        return _nnunet_architecture(*parse_metadata(metadata, path), metadata)
    return released_architecture(metadata["arch"]) if metadata["arch"] in RELEASED else None


def _nnunet_architecture(plan: Plan, configuration: str, outputs: int, metadata: dict[str, str]) -> Architecture:
    shapes = parameter_shapes(nnx.eval_shape(lambda: build_from_plan(plan, configuration, outputs)))
    return Architecture(NNUNET, nnunet_rows(plan.configuration(configuration), outputs), shapes, metadata)
