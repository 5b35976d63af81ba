"""Code that all networks share: options of a network with a backbone, and building a network from its options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, NetworkOptions, lookup, option
from jaxla.hardware import compute_dtype, on_cpu
from jaxla.models.backbones import TRANSFORMERS, VARIANTS, Backbone, build_backbone
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.ops.images import crop, pad_to_multiple, require_images, three_channels
from jaxla.models.weights import load_parameters, weights_file

M = TypeVar("M", bound=nnx.Module)
# Compiler options for CPU.
FAST_COMPILATION = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class BackboneOptions(NetworkOptions):
    """Options of a network with a backbone.

    Args:
        arch: Architecture of the backbone; `python -m convert_weights --arch=list` lists those with released weights.
        weights: A converted `.safetensors` file, or `random`. Default: `<cache>/weights/<arch>.safetensors`.
        backbone: Keep the backbone `frozen` as loaded, or train it too (`finetuned`).
    """

    ARCHITECTURES: ClassVar[Collection[str]] = TRANSFORMERS  # names of the backbones that the network can be built on
    KIND: ClassVar[str] = "vision transformer"  # their common name in messages

    arch: str = "dinov2_vitb14"
    weights: str = ""
    backbone: Literal["frozen", "finetuned"] = "frozen"

    def resolve(self) -> Self:
        arch = HUB_SPELLINGS.get(self.arch, self.arch)
        if arch not in self.ARCHITECTURES:
            lookup(option("model.arch"), arch, dict.fromkeys([*self.ARCHITECTURES, *VARIANTS]))
            known = ", ".join(self.ARCHITECTURES)
            problem = f"not a {self.KIND}, which this network needs"
            raise InputError(option("model.arch", arch), problem, f"Use {known}.")
        return replace(self, arch=arch)

    def with_weights(self, weights: str) -> Self:
        return replace(self, weights=weights)

    def prerequisites(self, key: jax.Array, dtype: jnp.dtype, cache_dir: Path | None, plan: object) -> dict[str, Any]:
        def random_backbone(key: jax.Array) -> Backbone:
            return build_backbone(self.arch, dtype=dtype, remat=self.backbone == "finetuned", rngs=nnx.Rngs(key))

        if self.weights == "random":
            return {"backbone": initialise(random_backbone, key)}
        path = weights_file(self.arch, self.weights, cache_dir)
        return {"backbone": load_parameters(nnx.eval_shape(random_backbone, key), path, self.arch)}


@dataclass(frozen=True)
class TransformerOptions(BackboneOptions):
    """Options of a network with a vision transformer, whose images must consist of whole patches."""

    def check_size(self, option_name: str, size: int) -> None:
        patch = TRANSFORMERS[self.arch].patch
        if size % patch:
            nearest = max(1, round(size / patch)) * patch
            problem = f"not a multiple of the patch size {patch} of {self.arch}"
            raise InputError(f"{option_name}={size}", problem, f"Use {nearest}, for example.")


def build_network(
    model: NetworkOptions, outputs: int, seed: int, *, cache_dir: Path | None = None, plan: Any = None
) -> nnx.Module:
    """Build a network from its options, in evaluation mode; its random parameters follow from `seed`.

    Args:
        outputs: K, channels of the logits: 1 for one structure (sigmoid), else background and structures (softmax).
        cache_dir: folder with `weights/<arch>.safetensors`, if the options name no file.
        plan: nnU-Net's plan, if the network needs one and its options name no file.

    Raises:
        InputError: an option has an invalid value, weights are missing or do not fit, or the plan is missing.
    """
    model = model.resolve()
    dtype = compute_dtype()
    backbone_key, rest_key = jax.random.split(jax.random.key(seed))
    prerequisites = model.prerequisites(backbone_key, dtype, cache_dir, plan)
    backbone = prerequisites.get("backbone")
    network = initialise(lambda key: model.build(outputs, dtype, nnx.Rngs(key), **prerequisites), rest_key, backbone)
    network.eval()
    return network


def initialise(make: Callable[[jax.Array], M], key: jax.Array, backbone: nnx.Module | None = None) -> M:
    """Return `make(key)`, whose random parameters are drawn by one program; a `backbone` is already initialised.

    The program runs only once, so it is compiled with little optimisation, which is four times as fast.
    """
    if isinstance(key, jax.core.Tracer):  # within `nnx.eval_shape`
        return make(key)
    network = nnx.eval_shape(make, key)
    options = FAST_COMPILATION if on_cpu() else None
    draw = jax.jit(lambda key: nnx.state(make(key), nnx.Not(nnx.PathContains("backbone"))), compiler_options=options)
    nnx.update(network, draw(key))
    if backbone is not None:
        network.backbone = backbone
    return network


def parameter_count(model: NetworkOptions) -> int:
    """Return the number of a network's parameters for one structure, without creating them."""
    network = nnx.eval_shape(lambda: build_network(model.with_weights("random"), 1, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


class PaddedNetwork(nnx.Module):
    """A network that pads images to multiples of `multiple` pixels and crops its logits.

    A derived class computes `padded_logits(images, present)` of padded images. Parameters, statistics and
    logits are float32 for every dtype of the computation.
    """

    multiple: int
    CHANNELS: ClassVar[tuple[int, ...]] = (1, 3)  # channels that images may have; with 3, grey images become colour

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Return logits [B, H, W, K] float32; H and W are at least `multiple`.

        Args:
            images: [B, H, W, 1] grey values in 0..1, or [B, H, W, 3] ImageNet-normalised unless CHANNELS excludes it.
            present: [B] bool, the images that BatchNorm's training statistics are computed from. Default: all.

        Raises:
            ValueError: `images` has another shape, is not floating point, or is too small.
        """
        require_images(images, min_size=self.multiple, channels=self.CHANNELS)
        padded = three_channels(images) if self.CHANNELS == PaddedNetwork.CHANNELS else images
        logits = self.padded_logits(pad_to_multiple(padded, self.multiple), present)
        return crop(logits, images.shape[1:3], self.multiple)


def check_widths(option_name: str, widths: Sequence[int], count: int | None = None, meaning: str = "") -> None:
    """Raise an InputError unless all widths are positive and there are `count` of them (default: at least one).

    Args:
        meaning: what each width is for, as the end of the advice, such as ", one for each stage".
    """
    where = f"{option_name}={list(widths)}"
    if count is not None and len(widths) != count:
        problem = f"{len(widths)} widths, but the network needs {count}"
        raise InputError(where, problem, f"Set {count} widths{meaning}.")
    if not widths or min(widths) < 1:
        raise InputError(where, "expected one or more positive widths", "Use [64,32], for example.")


def check_smallest_size(option_name: str, size: int, smallest: int, arch: str) -> None:
    """Raise an InputError if images have fewer than `smallest` pixels per side."""
    if size < smallest:
        problem = f"{arch} needs at least {smallest} pixels"
        raise InputError(f"{option_name}={size}", problem, f"Use {smallest} or more.")
