"""Every architecture whose weights were released: what its authors' checkpoint holds, and what ours does."""

from __future__ import annotations

from flax import nnx

from convert_weights.layout import Row
from convert_weights.resnet import resnet_rows
from convert_weights.vgg import vgg_rows
from convert_weights.vision_transformer import dinov2_rows, dinov3_rows
from jaxla.models import resnet, vgg
from jaxla.models.backbones import VARIANTS, build_backbone
from jaxla.models.weights import parameter_shapes

RELEASED = {arch: variant for arch, variant in VARIANTS.items() if variant.licence}


def rows_of(arch: str) -> list[Row]:
    """The authors' tensors, in their order."""
    variant = RELEASED[arch]
    if isinstance(variant, resnet.Variant):
        return resnet_rows(variant)
    if isinstance(variant, vgg.Variant):
        return vgg_rows(variant)
    return dinov2_rows(variant) if variant.grid else dinov3_rows(arch, variant)


def shapes_of(arch: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each of our parameters."""
    return parameter_shapes(nnx.eval_shape(lambda: build_backbone(arch, rngs=nnx.Rngs(0))))
