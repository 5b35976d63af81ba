"""What all networks share: options of those on a backbone, and how a network is built from its options."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, NetworkOptions, lookup, option
from jaxla.hardware import compute_dtype
from jaxla.models.backbones import TRANSFORMERS, VARIANTS, Backbone, build_backbone
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.weights import load_into, weights_file


@dataclass(frozen=True)
class BackboneOptions(NetworkOptions):
    """Options of a network on a backbone.

    Args:
        arch: Architecture of the backbone; `python -m convert_weights --arch=list` lists those with released weights.
        weights: A converted `.safetensors` file, or `random`. Default: `<cache>/weights/<arch>.safetensors`.
        backbone: Keep the backbone `frozen` as loaded, or train it too (`finetuned`).

    Attributes:
        ARCHITECTURES: names of the backbones that the network can be built on.
        KIND: what these are, for messages.
    """

    ARCHITECTURES: ClassVar[Collection[str]] = TRANSFORMERS
    KIND: ClassVar[str] = "vision transformer"

    arch: str = "dinov2_vitb14"
    weights: str = ""
    backbone: Literal["frozen", "finetuned"] = "frozen"

    def resolve(self) -> Self:
        arch = HUB_SPELLINGS.get(self.arch, self.arch)
        if arch not in self.ARCHITECTURES:
            lookup(option("model.arch"), arch, dict.fromkeys([*self.ARCHITECTURES, *VARIANTS]))
            known = ", ".join(self.ARCHITECTURES)
            raise InputError(
                option("model.arch", arch), f"not a {self.KIND}, which this network needs", f"Use {known}."
            )
        return replace(self, arch=arch)

    def with_weights(self, weights: str) -> Self:
        return replace(self, weights=weights)

    def prerequisites(self, key: jax.Array, dtype: jnp.dtype, cache_dir: Path | None, plan: object) -> dict[str, Any]:
        def random_backbone() -> Backbone:
            return build_backbone(self.arch, dtype=dtype, remat=self.backbone == "finetuned", rngs=nnx.Rngs(key))

        if self.weights == "random":
            return {"backbone": nnx.jit(random_backbone)()}
        path = weights_file(self.arch, self.weights, cache_dir)
        return {"backbone": load_into(nnx.eval_shape(random_backbone), path, self.arch)}


@dataclass(frozen=True)
class TransformerOptions(BackboneOptions):
    """Options of a network on a vision transformer, whose images must consist of whole patches."""

    def check_size(self, option_name: str, size: int) -> None:
        patch = TRANSFORMERS[self.arch].patch
        if size % patch:
            nearest = max(1, round(size / patch)) * patch
            raise InputError(
                f"{option_name}={size}", f"not a multiple of the patch size {patch}", f"Use {nearest}, for example."
            )


def build_network(
    model: NetworkOptions, outputs: int, seed: int, *, cache_dir: Path | None = None, plan: Any = None
) -> nnx.Module:
    """Build a network from its options, in evaluation mode; its random parameters follow from `seed`.

    Args:
        outputs: K, channels of the logits: 1 for one structure (sigmoid), else background and structures (softmax).
        cache_dir: folder with `weights/<arch>.safetensors`, if the options name no file.
        plan: nnU-Net's plan, if the network needs one and its options name no file.

    Raises:
        InputError: values that the network cannot have; weights that are missing or do not fit; no plan.
    """
    model, dtype = model.resolve(), compute_dtype()
    backbone_key, rest_key = jax.random.split(jax.random.key(seed))
    prerequisites = model.prerequisites(backbone_key, dtype, cache_dir, plan)
    network = model.build(outputs, dtype, nnx.Rngs(rest_key), **prerequisites)
    network.eval()
    return network


def parameter_count(model: NetworkOptions, outputs: int = 1) -> int:
    """Return the number of a network's parameters, without creating them."""
    network = nnx.eval_shape(lambda: build_network(model.with_weights("random"), outputs, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def check_widths(option_name: str, widths: Sequence[int], count: int | None = None, meaning: str = "") -> None:
    """Raise an InputError unless all widths are positive and there are `count` of them (at least one by default).

    Args:
        meaning: what each width is for, as part of the advice.
    """
    where = f"{option_name}={list(widths)}"
    if count is not None and len(widths) != count:
        raise InputError(
            where, f"{len(widths)} widths, but the network needs {count}", f"Give {count} widths{meaning}."
        )
    if not widths or min(widths) < 1:
        raise InputError(where, "needs positive widths", "Give at least one, such as [64,32].")


def check_smallest_size(option_name: str, size: int, smallest: int, arch: str) -> None:
    """Raise an InputError if images are smaller than the network's coarsest pixel."""
    if size < smallest:
        raise InputError(
            f"{option_name}={size}", f"{arch} needs at least {smallest} pixels", f"Use {smallest} or more."
        )
