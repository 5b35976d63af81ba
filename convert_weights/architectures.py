"""Every architecture that can be converted: what its authors' checkpoint holds, and what ours does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from convert_weights.checkpoint import Checkpoint
from convert_weights.layout import Row
from convert_weights.nnunet import heads_of, nnunet_rows
from convert_weights.resnet import resnet_rows
from convert_weights.vgg import vgg_rows
from convert_weights.vision_transformer import dinov2_rows, dinov3_rows
from jaxla.models.backbones import VARIANTS, build_backbone, resnet, vgg
from jaxla.models.weights import parameter_shapes
from jaxla.nnunet.converted import NNUNET, build_from_plan, parse_metadata
from jaxla.nnunet.plan import Plan, plan_to_json

RELEASED = {arch: variant for arch, variant in VARIANTS.items() if variant.licence}


class Architecture(NamedTuple):
    """What a conversion is between.

    Attributes:
        rows: the authors' tensors, in their order.
        shapes: name and shape of each of our parameters.
        metadata: what else the converted file says of itself.
    """

    name: str
    rows: list[Row]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def released(arch: str) -> Architecture:
    """One of `RELEASED`."""
    return Architecture(arch, rows_of(arch), shapes_of(arch), {"licence": RELEASED[arch].licence})


def rows_of(arch: str) -> list[Row]:
    """The authors' tensors of one of `RELEASED`, in their order."""
    variant = RELEASED[arch]
    if isinstance(variant, resnet.Variant):
        return resnet_rows(variant)
    if isinstance(variant, vgg.Variant):
        return vgg_rows(variant)
    return dinov2_rows(variant) if variant.grid else dinov3_rows(arch, variant)


def shapes_of(arch: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each of our parameters, of one of `RELEASED`."""
    return parameter_shapes(nnx.eval_shape(lambda: build_backbone(arch, rngs=nnx.Rngs(0))))


def nnunet(plan: Plan, configuration: str, checkpoint: Checkpoint) -> Architecture:
    """A network that nnU-Net trained, its number of classes taken from its checkpoint.

    Raises:
        InputError: the plan lacks the configuration, or the checkpoint is not of nnU-Net.
    """
    heads = heads_of(checkpoint.tensors, checkpoint.path)
    said = json.dumps(plan_to_json(plan._replace(fingerprint=None)))
    metadata = {"licence": "", "plan": said, "configuration": configuration, "outputs": str(heads)}
    return _nnunet(plan, configuration, heads, metadata)


def of_file(path: Path, metadata: dict[str, str]) -> Architecture | None:
    """The architecture of a converted file; None where its authors' format is not known."""
    if metadata["arch"] == NNUNET:
        return _nnunet(*parse_metadata(metadata, path), metadata)
    return released(metadata["arch"]) if metadata["arch"] in RELEASED else None


def _nnunet(plan: Plan, configuration: str, heads: int, metadata: dict[str, str]) -> Architecture:
    shapes = parameter_shapes(nnx.eval_shape(lambda: build_from_plan(plan, configuration, heads)))
    return Architecture(NNUNET, nnunet_rows(plan.configuration(configuration), heads), shapes, metadata)
