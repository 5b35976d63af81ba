"""A method's network, image in, logits out: which there are, and how each is built."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from jaxla.config import InputError, Model, lookup
from jaxla.models import dinov3, resnet, resnet_unet, segnet, vgg
from jaxla.models.attention_unet import AttentionUNet
from jaxla.models.backbones import TRANSFORMERS, Backbone, build_backbone
from jaxla.models.resnet_unet import ResNetUNet
from jaxla.models.segnet import SegNet
from jaxla.models.transformer_segmenter import ConvolutionalDecoder, LinearDecoder, TransformerSegmenter
from jaxla.models.unet import UNet
from jaxla.models.vision_transformer import VisionTransformer
from jaxla.models.weights import compute_dtype, load_into, weights_file

Network = TransformerSegmenter | UNet | AttentionUNet | ResNetUNet | SegNet


class Family(NamedTuple):
    """Networks that are built alike.

    Attributes:
        of: what their architectures are, for messages.
        options: of `Model`, those that it reads.
        multiple: of which the sides of an image must be; or, where `pads`, what they must be at least.
        stages: how many `decoder_widths` it takes; 0 where any number will do.
        build: from a backbone with its weights (None where it has none), the options and K.
    """

    of: str
    architectures: Collection[str]
    options: tuple[str, ...]
    multiple: Callable[[Model], int]
    pads: bool
    stages: int
    build: Callable[[Backbone | None, Model, int, nnx.Rngs], Network]


def build_network(model: Model, classes: int, seed: int, cache_dir: Path | None = None) -> Network:
    """The network of a method, in evaluation mode; its random parameters follow from `seed`.

    Args:
        classes: K, channels of the logits: 1 for one structure (sigmoid), else background and structures (softmax).
        cache_dir: where `weights/<arch>.safetensors` is looked for if the model names no file.

    Raises:
        InputError: the backbone's weights are missing or do not fit; see `weights.load_into`.
    """
    family = family_of(model.arch)
    backbone_key, rest_key = jax.random.split(jax.random.key(seed))

    def untrained() -> Backbone:
        remat = model.backbone == "finetuned"
        return build_backbone(model.arch, dtype=compute_dtype(), remat=remat, rngs=nnx.Rngs(backbone_key))

    require_fitting(model)
    if "weights" not in family.options:
        backbone = None
    elif model.weights == "random":
        backbone = nnx.jit(untrained)()
    else:
        path = weights_file(model.arch, model.weights, cache_dir)
        backbone = load_into(nnx.eval_shape(untrained), path, model.arch)
    network = family.build(backbone, model, classes, nnx.Rngs(rest_key))
    network.eval()
    return network


def parameter_count(model: Model, classes: int = 1) -> int:
    """Of a method's network, without making its arrays."""
    network = nnx.eval_shape(lambda: build_network(replace(model, weights="random"), classes, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def family_of(arch: str) -> Family:
    """The networks that are built on an architecture.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    return lookup("--model.arch", arch, ARCHITECTURES)


def checked_model(model: Model, own: Model, method: str) -> Model:
    """The options of a network, its architecture in this package's spelling.

    Args:
        own: the options as the method has them.

    Raises:
        InputError: an architecture that the method cannot be built on, or an option that it does not read.
    """
    family = family_of(own.arch)
    arch = dinov3.HUB_SPELLINGS.get(model.arch, model.arch)
    if arch not in family.architectures:
        lookup("--model.arch", arch, dict.fromkeys([*family.architectures, *ARCHITECTURES]))
        known = ", ".join(family.architectures)
        raise InputError(f"--model.arch={arch} is no {family.of}, on which method {method} is built. Known: {known}")
    model = replace(model, arch=arch)
    require_fitting(model)
    for field in fields(Model):
        if field.name not in ("arch", *family.options) and getattr(model, field.name) != getattr(own, field.name):
            raise InputError(f"option --model.{field.name} is not one of method {method}; leave it out")
    return model


def require_fitting(model: Model) -> None:
    """Raise an InputError if options have values that the network cannot have."""
    family = family_of(model.arch)
    if "weights" not in family.options and model.weights != "random":
        raise InputError(f"--model.weights={model.weights}: {model.arch} has no pretrained weights; leave it out")
    if family.stages and len(model.decoder_widths) != family.stages:
        raise InputError(
            f"option --model.decoder_widths={list(model.decoder_widths)}: a U-Net on {model.arch} has {family.stages} "
            "stages; give as many widths"
        )


def require_size(model: Model, option: str, size: int) -> None:
    """Raise an InputError unless a network takes images of that side."""
    family = family_of(model.arch)
    multiple = family.multiple(model)
    if family.pads and size < multiple:
        raise InputError(f"{option}={size}: {model.arch} needs at least {multiple} pixels, one of its smallest map")
    if not family.pads and size % multiple:
        raise InputError(
            f"{option}={size} must be a multiple of the patch size {multiple}, such as "
            f"{max(1, round(size / multiple)) * multiple}"
        )


# --- families --------------------------------------------------------------------------------------------------------


def _transformer(backbone: VisionTransformer, model: Model, classes: int, rngs: nnx.Rngs) -> TransformerSegmenter:
    dtype, width = compute_dtype(), backbone.variant.width
    if model.decoder == "linear":
        decoder = LinearDecoder(width, classes, dtype=dtype, rngs=rngs)
    else:
        decoder = ConvolutionalDecoder(width, model.decoder_widths, classes, dtype=dtype, rngs=rngs)
    return TransformerSegmenter(backbone, decoder)


def _unet(backbone: None, model: Model, classes: int, rngs: nnx.Rngs) -> UNet | AttentionUNet:
    network = {"unet": UNet, "attention_unet": AttentionUNet}[model.arch]
    build = nnx.jit(lambda rngs: network(model.widths, classes, dtype=compute_dtype(), rngs=rngs))
    return build(rngs)


def _resnet_unet(backbone: resnet.ResNet, model: Model, classes: int, rngs: nnx.Rngs) -> ResNetUNet:
    return ResNetUNet(backbone, model.decoder_widths, classes, dtype=compute_dtype(), rngs=rngs)


def _segnet(backbone: vgg.VGG, model: Model, classes: int, rngs: nnx.Rngs) -> SegNet:
    return SegNet(backbone, classes, dtype=compute_dtype(), rngs=rngs)


FAMILIES = (
    Family(
        "vision transformer", TRANSFORMERS, ("weights", "backbone", "decoder", "decoder_widths"),
        lambda model: TRANSFORMERS[model.arch].patch, pads=False, stages=0, build=_transformer,
    ),
    Family(
        "U-Net", ("unet", "attention_unet"), ("widths",),
        lambda model: 2 ** (len(model.widths) - 1), pads=True, stages=0, build=_unet,
    ),
    Family(
        "ResNet", resnet.VARIANTS, ("weights", "backbone", "decoder_widths"),
        lambda model: resnet_unet.MULTIPLE, pads=True, stages=len(resnet_unet.SKIPS), build=_resnet_unet,
    ),
    Family(
        "VGG", vgg.VARIANTS, ("weights", "backbone"),
        lambda model: segnet.MULTIPLE, pads=True, stages=0, build=_segnet,
    ),
)  # fmt: skip
ARCHITECTURES = {name: family for family in FAMILIES for name in family.architectures}
