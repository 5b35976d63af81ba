"""The plan file: spacing, patches, network and batch size, which nnU-Net chooses from the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import msgspec

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.json_files import BYTE_ORDER_MARK, describe_damage
from jaxla.config import InputError

T = TypeVar("T")

# Exceptions that damaged content may raise, such as a NaN that nnU-Net wrote in place of an integer.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)

TRAINABLE = ("2d", "3d_fullres")  # configurations that this package trains
ARCH_CONFIGURATIONS = {"nnunet_2d": "2d", "nnunet_3d_fullres": "3d_fullres"}  # arch of `NNUNetOptions` -> configuration
DEFAULT_MEMORY_GB = 8.0
Z_SCORE = "ZScoreNormalization"
CASCADE = {"3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}}

# Settings in nnU-Net's own plan files for which our network and resampling support only these values; the first is the
# default.
SUPPORTED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "conv_bias": (True,),
    "norm_op": tuple(f"torch.nn.modules.instancenorm.InstanceNorm{axes}d" for axes in (2, 3)),
    "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
    "dropout_op": (None,),
    "nonlin": ("torch.nn.LeakyReLU",),
    "nonlin_kwargs": ({"inplace": True}, {"inplace": True, "negative_slope": 0.01}, {}),
    "resampling_fn_data": ("resample_data_or_seg_to_shape",),
    "resampling_fn_data_kwargs": ({"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},),
    "resampling_fn_seg_kwargs": ({"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},),
}


class Fingerprint(NamedTuple):
    """Spacing in mm and shape of every case after zeros around the scan are cropped, from which nnU-Net plans."""

    spacings: tuple[tuple[float, ...], ...]
    shapes_after_crop: tuple[tuple[int, ...], ...]
    median_relative_size_after_cropping: float = 1.0  # fraction of a scan's voxels that remains


class Configuration(NamedTuple):
    """Patches, batch size and network of one configuration, under nnU-Net's names. Stages run from fine to coarse."""

    batch_size: int
    patch_size: tuple[int, ...]
    median_image_size_in_voxels: tuple[float, ...]
    spacing: tuple[float, ...]  # mm, along the axes of a patch
    batch_dice: bool  # compute Dice over the whole batch, instead of averaging it over patches
    n_stages: int
    features_per_stage: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]  # strides of each stage's first convolution, along each axis
    n_conv_per_stage: tuple[int, ...]
    n_conv_per_stage_decoder: tuple[int, ...]


class Plan(NamedTuple):
    """All configurations for a data set, by name."""

    fingerprint: Fingerprint | None  # None if the file does not contain it
    median_spacing: tuple[float, ...]
    median_shape: tuple[int, ...]
    transpose_forward: tuple[int, ...]  # the scan's axes in the order of the plan, coarsest first
    configurations: dict[str, Configuration]
    use_mask_for_norm: bool = False  # normalise grey values within the nonzero region only, and keep zeros
    normalisation: str = Z_SCORE  # nnU-Net's name of the normalisation

    def configuration(self, name: str, where: str = "the plan") -> Configuration:
        """Return a trainable configuration.

        Raises:
            InputError: about `where`: the plan lacks the configuration, or no network can be built from it.
        """
        if name not in TRAINABLE:
            raise InputError(where, f"configuration {name!r} is not supported", f"Use {' or '.join(TRAINABLE)}.")
        if name not in self.configurations:
            known = ", ".join(self.configurations)
            raise InputError(where, f"no configuration {name}, only {known}", "Use one of these, or another plan.")
        if fault := _find_fault(self.configurations[name]):
            problem = f"configuration {name} cannot be built: {fault}"
            raise InputError(where, problem, "Use another configuration or plan.")
        return self.configurations[name]


def describe_configuration(configuration: Configuration) -> str:
    """Return a one-line description of a configuration."""
    c = configuration
    patch, spacing = ("×".join(f"{n:g}" for n in numbers) for numbers in (c.patch_size, c.spacing))
    return (
        f"patches of {patch} at {spacing} mm, {c.batch_size} per batch; {c.n_stages} stages, "
        f"{c.features_per_stage[0]} to {c.features_per_stage[-1]} features"
    )


def read_plan(path: Path) -> Plan:
    """Read a plan that this package wrote, or nnU-Net's own `nnUNetPlans.json`; raises as `plan_from_json`."""
    return plan_from_json(_read_json(path), str(path))


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan atomically. Raises OSError if that fails."""
    write_atomically(path, json.dumps(plan_to_json(plan), indent=1) + "\n")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return the content of a plan file."""
    content: dict[str, Any] = {}
    if plan.fingerprint:
        content["fingerprint"] = plan.fingerprint._asdict()
        if plan.fingerprint.median_relative_size_after_cropping == 1:
            del content["fingerprint"]["median_relative_size_after_cropping"]
    content |= {name: getattr(plan, name) for name in ("median_spacing", "median_shape", "transpose_forward")}
    content["configurations"] = {name: c._asdict() for name, c in plan.configurations.items()}
    if "3d_lowres" in plan.configurations:
        content["configurations"] |= CASCADE
    return content | ({"use_mask_for_norm": True} if plan.use_mask_for_norm else {})


def plan_from_json(content: Any, where: str) -> Plan:
    """Return the plan in a file's content.

    Raises:
        InputError: about `where`, if it is not a plan, or plans a network that this package does not support.
    """
    try:
        inherited = {name: _inherit(content["configurations"], name) for name in content["configurations"]}
        stages = {name: c for name, c in inherited.items() if "previous_stage" not in c}  # without the cascade
        configurations = {name: _parse_configuration(c, where) for name, c in stages.items()}
        spacing = content.get("median_spacing", content.get("original_median_spacing_after_transp"))
        shape = content.get("median_shape", content.get("original_median_shape_after_transp"))
        schemes = [c.get("normalization_schemes", [Z_SCORE])[0] for c in stages.values()]
        plan = Plan(
            fingerprint=fingerprint_from_json(content["fingerprint"]) if "fingerprint" in content else None,
            median_spacing=_convert("median_spacing", spacing, tuple[float, float, float]),
            median_shape=tuple(map(int, _convert("median_shape", shape, tuple[float, float, float]))),
            transpose_forward=_convert("transpose_forward", content["transpose_forward"], tuple[int, ...]),
            configurations=configurations,
            use_mask_for_norm=bool(content.get("use_mask_for_norm", False))
            or any(bool(c.get("use_mask_for_norm", [0])[0]) for c in stages.values()),
            normalisation=next((scheme for scheme in schemes if scheme != Z_SCORE), Z_SCORE),
        )
        if sorted(plan.transpose_forward) != [0, 1, 2] or not configurations:
            raise ValueError("it needs three axes and at least one configuration")
        for configuration in configurations.values():
            _find_fault(configuration)  # raises for wrong types; the fault itself matters only if the network is built
    except InputError:
        raise
    except DAMAGE as error:
        problem = f"not a plan ({describe_damage(error)})"
        raise InputError(where, problem, "Pass a file that python -m jaxla.plan wrote, or nnUNetPlans.json.") from error
    return plan


def read_fingerprint(path: Path) -> Fingerprint:
    """Read nnU-Net's `dataset_fingerprint.json`, or the fingerprint within a plan.

    Raises:
        InputError: the file is missing, is not a fingerprint, or has a spacing or shape that is not positive.
    """
    content = _read_json(path)
    try:
        fingerprint = fingerprint_from_json(content.get("fingerprint", content))
    except DAMAGE as error:
        problem = f"not a fingerprint ({describe_damage(error)})"
        raise InputError(path, problem, "Pass a file with the lists spacings and shapes_after_crop.") from error
    for name, cases in (("spacing", fingerprint.spacings), ("shape", fingerprint.shapes_after_crop)):
        for case, values in enumerate(cases):
            if not all(0 < value < math.inf for value in values):
                raise InputError(path, f"case {case} has the {name} {list(values)}", "Use positive numbers.")
    return fingerprint


def fingerprint_from_json(content: Mapping[str, Any]) -> Fingerprint:
    """Return the fingerprint in a file's content.

    Raises:
        One of DAMAGE: the content is not a fingerprint.
    """
    spacings = _convert("spacings", content["spacings"], tuple[tuple[float, float, float], ...])
    shapes = _convert("shapes_after_crop", content["shapes_after_crop"], tuple[tuple[int, int, int], ...])
    if not spacings or len(spacings) != len(shapes):
        raise ValueError("spacings and shapes_after_crop must have three numbers for each of the same cases")
    fraction = content.get("median_relative_size_after_cropping", 1)
    return Fingerprint(spacings, shapes, _convert("median_relative_size_after_cropping", fraction, float))


def _convert(name: str, value: Any, kind: type[T]) -> T:
    """Return parsed JSON as `kind`; raise a ValueError that names it if it has a different type."""
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_json(path: Path) -> Any:
    with report_os_errors("read", path, "Make the file readable."):
        text = path.read_bytes()
    try:
        return json.loads(text.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"not JSON ({error})", "Pass a plan or a fingerprint.") from error


def _inherit(configurations: Mapping[str, Any], name: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration with the values that it inherits from others."""
    content = configurations[name]
    if "inherits_from" not in content:
        return content
    if name in heirs:
        raise ValueError(f"{name} inherits from itself")
    return _inherit(configurations, content["inherits_from"], (*heirs, name)) | content


def _parse_configuration(content: Mapping[str, Any], where: str) -> Configuration:
    """Parse a configuration in this package's layout, or in one of nnU-Net's, which describe the network separately."""
    content = dict(content)
    if "architecture" in content:
        _require_plain_network(content["architecture"]["network_class_name"].rpartition(".")[2], where)
        content |= content["architecture"]["arch_kwargs"]
        for name, supported in SUPPORTED_SETTINGS.items():
            if (value := content.get(name, supported[0])) not in supported:
                problem = f"{name} {value} is not supported, only {supported[0]}"
                raise InputError(where, problem, "Use a plan of nnU-Net's default planner.")
    elif "UNet_class_name" in content:  # nnU-Net 2.0 to 2.3
        _require_plain_network(content["UNet_class_name"], where)
        strides = content["pool_op_kernel_sizes"]
        base, maximum = content["UNet_base_num_features"], content["unet_max_num_features"]
        content |= {
            "n_stages": len(strides),
            "features_per_stage": [min(maximum, base * 2**stage) for stage in range(len(strides))],
            "kernel_sizes": content["conv_kernel_sizes"],
            "strides": strides,
            "n_conv_per_stage": content["n_conv_per_stage_encoder"],
        }
    for name, kind in get_type_hints(Configuration).items():
        _convert(name, content[name], kind)
    return Configuration(**{name: _to_tuples(content[name]) for name in Configuration._fields})


def _require_plain_network(network: str, where: str) -> None:
    if network != "PlainConvUNet":
        problem = f"network {network} is not supported, only PlainConvUNet"
        raise InputError(where, problem, "Use a plan of nnU-Net's default planner.")


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _find_fault(c: Configuration) -> str:
    """Return the reason why no network can be built from a configuration; "" if there is none."""
    axes, stages = len(c.patch_size), c.n_stages
    if len(c.median_image_size_in_voxels) != axes or not all(n > 0 for n in c.median_image_size_in_voxels):
        return f"the median image size is {list(c.median_image_size_in_voxels)}"
    per_stage = ("strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage")
    for name, length in (*((name, stages) for name in per_stage), ("n_conv_per_stage_decoder", stages - 1)):
        if len(getattr(c, name)) != length:
            return f"{name} has {len(getattr(c, name))} entries, not {length}"
    if axes not in (2, 3) or stages < 2:
        return f"the patch has {axes} axes and the network {stages} stages"
    for name in ("strides", "kernel_sizes"):
        if any(len(sides) != axes for sides in getattr(c, name)):
            return f"{name} do not have the patch's {axes} axes"
    if len(c.spacing) != axes or not all(0 < side < math.inf for side in c.spacing):
        return f"the spacing is {list(c.spacing)}"
    counts = [c.batch_size, *c.patch_size, *c.features_per_stage, *c.n_conv_per_stage, *c.n_conv_per_stage_decoder]
    counts += [side for sides in (*c.strides, *c.kernel_sizes) for side in sides]
    if not all(isinstance(n, int) and n > 0 for n in counts):
        return "batch, patch, features, convolutions, strides and kernels must be positive integers"
    if any(side % 2 == 0 for sides in c.kernel_sizes for side in sides):
        return "a kernel has an even side"
    multiples = [math.prod(strides) for strides in zip(*c.strides, strict=True)]
    if any(side % multiple for side, multiple in zip(c.patch_size, multiples, strict=True)):
        return f"the strides do not divide the patch {list(c.patch_size)}"
    return "the first stage has a stride" if any(n != 1 for n in c.strides[0]) else ""
