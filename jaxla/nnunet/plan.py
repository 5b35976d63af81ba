"""A plan: what nnU-Net decides from the data, as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.config import InputError

TRAINED = ("2d", "3d_fullres")  # the configurations that this package trains
OF_ARCHITECTURE = {"nnunet_2d": "2d", "nnunet_3d_fullres": "3d_fullres"}  # as an experiment names them
Z_SCORE = "ZScoreNormalization"
CASCADE = {"3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}}


# What a plan of nnU-Net's may say of its network and resampling beside its shapes, as the default planner has it
OF_PLAIN: dict[str, tuple[Any, ...]] = {
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
    """What is planned from: of each case its spacing in mm, and its shape once the zeros around it are cut away.

    Attributes:
        median_relative_size_after_cropping: the share of a scan's voxels that this leaves.
    """

    spacings: tuple[tuple[float, ...], ...]
    shapes_after_crop: tuple[tuple[int, ...], ...]
    median_relative_size_after_cropping: float = 1.0


class Configuration(NamedTuple):
    """A network, its patches and its batches; what a file of nnU-Net's calls them. Stages are finest first.

    Attributes:
        batch_dice: whether Dice is of a batch as a whole, not the mean of its patches'.
        strides: of each stage's first convolution, along each axis.
    """

    batch_size: int
    patch_size: tuple[int, ...]
    median_image_size_in_voxels: tuple[float, ...]
    spacing: tuple[float, ...]
    batch_dice: bool
    n_stages: int
    features_per_stage: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    n_conv_per_stage: tuple[int, ...]
    n_conv_per_stage_decoder: tuple[int, ...]


class Plan(NamedTuple):
    """All configurations for a data set, by name.

    Attributes:
        fingerprint: what it was planned from; None where the file does not say.
        transpose_forward: which axis of a scan comes first, second, third: the coarsest is the first.
        use_mask_for_norm: whether grey values are normalised within what is not zero, and zeros stay zero.
        normalisation: as nnU-Net calls it.
    """

    fingerprint: Fingerprint | None
    median_spacing: tuple[float, ...]
    median_shape: tuple[int, ...]
    transpose_forward: tuple[int, ...]
    configurations: dict[str, Configuration]
    use_mask_for_norm: bool = False
    normalisation: str = Z_SCORE

    def configuration(self, name: str, where: str = "the plan") -> Configuration:
        """One of TRAINED.

        Args:
            where: what to call the plan in a message.

        Raises:
            InputError: it was not planned, or no network can be built by it.
        """
        if name not in TRAINED:
            raise InputError(f"configuration {name!r}: none that is built here; give one of {', '.join(TRAINED)}")
        if name not in self.configurations:
            has = ", ".join(self.configurations)
            raise InputError(f"{where}: has no configuration {name}; take {has}, which it has, or another plan")
        if fault := _fault(self.configurations[name]):
            raise InputError(
                f"{where}: its configuration {name} cannot be built: {fault}; take another configuration or plan"
            )
        return self.configurations[name]


def describe(c: Configuration) -> str:
    """A configuration in a line."""
    patch, spacing = ("×".join(f"{n:g}" for n in numbers) for numbers in (c.patch_size, c.spacing))
    return (
        f"patches of {patch} at {spacing} mm, {c.batch_size} in a batch; {c.n_stages} stages, "
        f"{c.features_per_stage[0]} to {c.features_per_stage[-1]} features"
    )


def read_plan(path: Path) -> Plan:
    """A plan that this package wrote, or nnU-Net's own `nnUNetPlans.json`.

    Raises:
        InputError: no such file, no plan, or one of a network that this package does not have.
    """
    return plan_from_json(_read_json(path), str(path))


def write_plan(path: Path, plan: Plan) -> None:
    """Write it whole. Raises OSError where that is not possible."""
    write_atomically(path, json.dumps(plan_to_json(plan), indent=1) + "\n")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan as it stands in a file."""
    content: dict[str, Any] = {}
    if plan.fingerprint:
        content["fingerprint"] = plan.fingerprint._asdict()
        if plan.fingerprint.median_relative_size_after_cropping == 1:
            del content["fingerprint"]["median_relative_size_after_cropping"]
    content |= {name: getattr(plan, name) for name in ("median_spacing", "median_shape", "transpose_forward")}
    content["configurations"] = {name: of_name._asdict() for name, of_name in plan.configurations.items()}
    if "3d_lowres" in plan.configurations:
        content["configurations"] |= CASCADE
    return content | ({"use_mask_for_norm": True} if plan.use_mask_for_norm else {})


def plan_from_json(content: Any, where: str) -> Plan:
    """A plan from what stands in a file.

    Args:
        where: what to call it in messages.

    Raises:
        InputError: it is no plan, or one of a network that this package does not have.
    """
    try:
        found = content["configurations"]
        whole = {name: _inherited(found, name) for name, of_name in found.items()}
        mine = {name: of_name for name, of_name in whole.items() if "previous_stage" not in of_name}
        configurations = {name: _configuration_of(of_name) for name, of_name in mine.items()}
        spacing = content.get("median_spacing", content.get("original_median_spacing_after_transp"))
        shape = content.get("median_shape", content.get("original_median_shape_after_transp"))
        masked = [
            content.get("use_mask_for_norm", False),
            *(bool(c.get("use_mask_for_norm", [0])[0]) for c in mine.values()),
        ]
        schemes = [c.get("normalization_schemes", [Z_SCORE])[0] for c in mine.values()]
        plan = Plan(
            fingerprint=fingerprint_from_json(content["fingerprint"]) if "fingerprint" in content else None,
            median_spacing=tuple(map(float, spacing)),
            median_shape=tuple(map(int, shape)),
            transpose_forward=tuple(map(int, content["transpose_forward"])),
            configurations=configurations,
            use_mask_for_norm=any(masked),
            normalisation=next((scheme for scheme in schemes if scheme != Z_SCORE), Z_SCORE),
        )
        if sorted(plan.transpose_forward) != [0, 1, 2] or len(plan.median_spacing) != 3 or not configurations:
            raise ValueError("it is not of three axes, or plans nothing")
        for of_name in configurations.values():
            _fault(of_name)  # raises where values are of another kind; what it says matters only of what is built
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{where}: not a plan ({error!r}); give a file that python -m jaxla.plan wrote, or nnUNetPlans.json"
        ) from error
    return plan


def read_fingerprint(path: Path) -> Fingerprint:
    """A fingerprint: the file of that name of nnU-Net, or a plan that holds one.

    Raises:
        InputError: no such file, no fingerprint, or a spacing or shape that is not above zero.
    """
    content = _read_json(path)
    try:
        found = fingerprint_from_json(content.get("fingerprint", content))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a fingerprint ({error!r}); it needs lists spacings and shapes_after_crop"
        ) from error
    for case, (spacing, shape) in enumerate(zip(found.spacings, found.shapes_after_crop, strict=True)):
        for name, values in (("spacing", spacing), ("shape", shape)):
            if not all(0 < value < math.inf for value in values):
                raise InputError(f"{path}: case {case} has the {name} {list(values)}; all must be above zero, mend it")
    return found


def fingerprint_from_json(content: Mapping[str, Any]) -> Fingerprint:
    """A fingerprint from what stands in a file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    spacings = tuple(tuple(map(float, spacing)) for spacing in content["spacings"])
    shapes = tuple(tuple(map(int, shape)) for shape in content["shapes_after_crop"])
    if not spacings or len(spacings) != len(shapes) or {len(of_case) for of_case in (*spacings, *shapes)} != {3}:
        raise ValueError("spacings and shapes_after_crop must have three numbers for each of the same cases")
    return Fingerprint(spacings, shapes, float(content.get("median_relative_size_after_cropping", 1)))


def _read_json(path: Path) -> Any:
    with report_os_errors("read", path):
        written = path.read_bytes()
    try:
        return json.loads(written)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); give a plan or a fingerprint") from error


def _inherited(configurations: Mapping[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    content = configurations[name]
    if "inherits_from" not in content:
        return content
    if name in seen:
        raise ValueError(f"{name} inherits from itself")
    return _inherited(configurations, content["inherits_from"], (*seen, name)) | content


def _configuration_of(content: Mapping[str, Any]) -> Configuration:
    """From this package's file, or from nnU-Net's, in which the network stands apart."""
    content = dict(content)
    if "architecture" in content:
        network = content["architecture"]["network_class_name"]
        if not network.endswith(".PlainConvUNet"):
            raise InputError(
                f"plans the network {network}; this package has PlainConvUNet, of nnU-Net's default planner"
            )
        content |= content["architecture"]["arch_kwargs"]
        for name, expected in OF_PLAIN.items():
            if (found := content.get(name, expected[0])) not in expected:
                raise InputError(f"plans {name} {found}; this package has the default planner's, {expected[0]}")
    elif "UNet_class_name" in content:  # nnU-Net 2.0 to 2.3
        if content["UNet_class_name"] != "PlainConvUNet":
            raise InputError(f"plans the network {content['UNet_class_name']}; this package has PlainConvUNet")
        stages, first, most = (
            content[k] for k in ("pool_op_kernel_sizes", "UNet_base_num_features", "unet_max_num_features")
        )
        content |= {
            "n_stages": len(stages),
            "features_per_stage": [min(most, first * 2**stage) for stage in range(len(stages))],
            "kernel_sizes": content["conv_kernel_sizes"],
            "strides": stages,
            "n_conv_per_stage": content["n_conv_per_stage_encoder"],
        }
    return Configuration(**{name: _tuples(content[name]) for name in Configuration._fields})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fault(c: Configuration) -> str:
    """What keeps a configuration from being built, in words; empty where nothing does."""
    axes, stages = len(c.patch_size), c.n_stages
    if len(c.median_image_size_in_voxels) != axes or not all(n > 0 for n in c.median_image_size_in_voxels):
        return f"the median size of an image is {list(c.median_image_size_in_voxels)}"
    by_stage = {"strides": stages, "kernel_sizes": stages, "features_per_stage": stages, "n_conv_per_stage": stages}
    for name, length in (by_stage | {"n_conv_per_stage_decoder": stages - 1}).items():
        if len(getattr(c, name)) != length:
            return f"{name} has {len(getattr(c, name))} entries, not {length}"
    if axes not in (2, 3) or stages < 2:
        return f"a patch of {axes} axes and {stages} stages"
    for name in ("strides", "kernel_sizes"):
        if any(len(of_stage) != axes for of_stage in getattr(c, name)):
            return f"{name} are not of the patch's {axes} axes"
    if len(c.spacing) != axes or not all(0 < mm < math.inf for mm in c.spacing):
        return f"the spacing is {list(c.spacing)}"
    counts = [c.batch_size, *c.patch_size, *c.features_per_stage, *c.n_conv_per_stage, *c.n_conv_per_stage_decoder]
    counts += [n for of_stage in (*c.strides, *c.kernel_sizes) for n in of_stage]
    if not all(isinstance(n, int) and n > 0 for n in counts):
        return "batch, patch, features, convolutions, strides and kernels must be whole numbers above 0"
    if any(n % 2 == 0 for of_stage in c.kernel_sizes for n in of_stage):
        return "a kernel has an even side"
    multiple = [math.prod(strides) for strides in zip(*c.strides, strict=True)]
    if any(side % of_side for side, of_side in zip(c.patch_size, multiple, strict=True)):
        return f"the strides do not divide the patch {list(c.patch_size)}"
    if any(n != 1 for n in c.strides[0]):
        return "the first stage has a stride"
    return ""
