"""A method's network from its options: built, counted, and refused where the options do not fit."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import jax
from flax import nnx

from jaxla.cli.terminal import plural
from jaxla.config import InputError, Model, lookup
from jaxla.hardware import compute_dtype
from jaxla.models import networks
from jaxla.models.backbones import Backbone, build_backbone, dinov3
from jaxla.models.family import Family
from jaxla.models.weights import load_into, weights_file
from jaxla.nnunet.plan import Configuration, Plan, read_plan


def _family(name: str) -> Family:
    network = import_module(f"{networks.__name__}.{name}")
    if not hasattr(network, "FAMILY"):
        raise AttributeError(f"{network.__file__}: has no FAMILY, which says how its network is built")
    return network.FAMILY


NETWORKS = {file.name: _family(file.name) for file in pkgutil.iter_modules(networks.__path__)}  # all there are


def build_network(
    model: Model, classes: int, seed: int, cache_dir: Path | None = None, plan: Plan | None = None
) -> nnx.Module:
    """The network of a method, in evaluation mode; its random parameters follow from `seed`.

    Args:
        classes: K, channels of the logits: 1 for one structure (sigmoid), else background and structures (softmax).
        cache_dir: where `weights/<arch>.safetensors` is looked for if the model names no file.
        plan: of a network that is planned from the data, where the model names no file.

    Raises:
        InputError: the backbone's weights are missing or do not fit; see `weights.load_into`; or there is no plan.
    """
    family, dtype = family_of(model), compute_dtype()
    backbone_key, rest_key = jax.random.split(jax.random.key(seed))

    def untrained() -> Backbone:
        remat = model.backbone == "finetuned"
        return build_backbone(model.arch, dtype=dtype, remat=remat, rngs=nnx.Rngs(backbone_key))

    require_fitting(model)
    built_on: Backbone | Configuration | None = None
    if family.configuration:
        built_on = configuration_of(model, plan)
    elif "weights" in family.options and model.weights == "random":
        built_on = nnx.jit(untrained)()
    elif "weights" in family.options:
        path = weights_file(model.arch, model.weights, cache_dir)
        built_on = load_into(nnx.eval_shape(untrained), path, model.arch)
    network = family.build(built_on, model, classes, dtype, nnx.Rngs(rest_key))
    network.eval()
    return network


def parameter_count(model: Model, classes: int = 1) -> int:
    """Of a method's network, without making its arrays."""
    network = nnx.eval_shape(lambda: build_network(replace(model, weights="random"), classes, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def configuration_of(model: Model, plan: Plan | None = None, batch_size: int = 0) -> Configuration:
    """What a network that is planned from the data is built on.

    Args:
        plan: where the model names no file.
        batch_size: in place of the plan's, where it is not 0.

    Raises:
        InputError: there is no plan, or it lacks the configuration.
    """
    if plan is None and not model.plan:
        raise InputError(f"{model.arch} is planned from the data: give it the plan that python -m jaxla.plan makes")
    where = f"--model.plan={model.plan}" if model.plan else "the plan of these scans"
    planned = (plan or read_plan(Path(model.plan))).configuration(family_of(model).configuration(model), where)
    return planned._replace(batch_size=batch_size or planned.batch_size)


def is_planned(model: Model) -> bool:
    """Whether the network is planned from the data."""
    return family_of(model).configuration is not None


def reads_volumes(model: Model) -> bool:
    """Whether the network reads all slices of a volume together."""
    return family_of(model).of_volumes


def family_of(model: Model) -> Family:
    """How the network that the options name is built.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    return lookup("--model.network", model.network, NETWORKS)


def checked_model(model: Model, own: Model, method: str) -> Model:
    """The options of a network, its architecture in this package's spelling.

    Args:
        own: the options as the method has them.

    Raises:
        InputError: an architecture that the method cannot be built on, or an option that it does not read.
    """
    if model.network != own.network:
        raise InputError(f"option --model.network is the own of method {method}; leave it out")
    family = family_of(own)
    arch = dinov3.HUB_SPELLINGS.get(model.arch, model.arch)
    if arch not in family.architectures:
        others = [name for other in NETWORKS.values() for name in other.architectures]
        lookup("--model.arch", arch, dict.fromkeys([*family.architectures, *others]))
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
    family = family_of(model)
    if model.arch not in family.architectures:
        raise InputError(f"--model.arch={model.arch} is no {family.of}, on which {model.network} is built")
    if "weights" not in family.options and model.weights != "random":
        raise InputError(f"--model.weights={model.weights}: {model.arch} has no pretrained weights; leave it out")
    family.check(model)


def require_slices(model: Model, scan: str | Path, slices: int) -> None:
    """Raise an InputError unless a scan has as many slices as the network needs."""
    if slices < (least := family_of(model).least_slices(model)):
        raise InputError(
            f"{scan}: has {plural(slices, 'slice')}, fewer than the {least} windows along them that --model.windows="
            f"{model.windows} asks for; a network of fewer windows takes it, or leave the scan out"
        )


def about_depth(model: Model, slices: Collection[int]) -> str:
    """What becomes of the depth embedding for volumes of so many slices, in words; empty where nothing does."""
    if not reads_volumes(model) or not model.depth_places or set(slices) == {model.depth_places}:
        return ""
    span = " to ".join(map(str, sorted({min(slices), max(slices)})))
    slices = "slice" if span == "1" else "slices"
    return f"the depth embedding has {model.depth_places} places and is interpolated to {span} {slices}"


def require_size(model: Model, option: str, size: int) -> None:
    """Raise an InputError unless a network takes images of that side."""
    family = family_of(model)
    multiple = family.multiple(model)
    if family.pads and size < multiple:
        raise InputError(f"{option}={size}: {model.arch} needs at least {multiple} pixels, one of its smallest map")
    if not family.pads and size % multiple:
        raise InputError(
            f"{option}={size} must be a multiple of the patch size {multiple}, such as "
            f"{max(1, round(size / multiple)) * multiple}"
        )
    family.check_size(model, option, size)
