"""nnU-Net's planner, which chooses patches, networks and batch sizes from the shapes and spacings of the scans.

Reference: Isensee, Jaeger et al., Nature Methods 18 (2021); code nnunetv2 2.8.1, `default_experiment_planner` and
`network_topology`. The memory of a configuration, which limits its patches, is nnU-Net's estimate, not a measurement.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxla.cli.terminal import track
from jaxla.config import InputError
from jaxla.data.dataset_json import channel_name
from jaxla.data.prepared import PreparedVolume
from jaxla.nnunet.plan import DEFAULT_MEMORY_GB, Z_SCORE, Configuration, Fingerprint, Plan
from jaxla.nnunet.preprocessing import axis_order, nonzero_box, resampled_spacing
from jaxla.nnunet.resampling import ANISOTROPY_THRESHOLD, resampled_shape

log = logging.getLogger(__name__)

# Channels that nnU-Net does not normalise by z-scores.
NON_MRI_CHANNELS = ("ct", "nonorm", "rescale_0_1", "rescale_to_0_1", "rgb_to_0_1")

# The limits below hold for a GPU with DEFAULT_MEMORY_GB, by the number of axes.
MAX_ACTIVATIONS = {2: 85_000_000, 3: 560_000_000}  # values per batch of REFERENCE_BATCH_SIZE patches
INITIAL_PATCH_VOXELS, REFERENCE_BATCH_SIZE = {2: 2048**2, 3: 256**3}, {2: 12, 3: 2}
MIN_BATCH_SIZE = 2
MAX_BATCH_FRACTION = 0.05  # fraction of the data set's voxels in a batch

BASE_FEATURES, MAX_FEATURES = 32, {2: 512, 3: 320}
CONVOLUTIONS_PER_STAGE = 2  # both in the encoder and in the decoder
MIN_MAP_SIDE = 4  # voxels on each side of the coarsest feature map
SIMILAR_SPACING_RATIO = 2  # axes whose spacings differ by less are halved, and convolved, together

SPACING_STEP = 1.03  # factor by which the low resolution is made coarser
MIN_PATCH_FRACTION = 0.25  # fraction of a scan; if a patch covers less, a low resolution is planned
MIN_REDUCTION = 2  # factor by which a low resolution must reduce the scan's voxels


def plan_from_data(volumes: Iterable[PreparedVolume], class_count: int, memory_gb: float = DEFAULT_MEMORY_GB) -> Plan:
    """Plan for the given scans (see `make_plan`)."""
    return make_plan(collect_fingerprint(track(volumes, "planning")), class_count, memory_gb)


def check_plan(plan: Plan, name: str, volumes: Iterable[PreparedVolume], where: str) -> None:
    """Raise an InputError unless the plan's configuration `name` can be trained on the scans.

    The median shape of the scans must not differ from the plan's by more than a factor of 2 along any axis.
    """
    if plan.normalisation != Z_SCORE:
        problem = f"normalises by {plan.normalisation}, but jaxla supports only {Z_SCORE}"
        raise InputError(where, problem, "Use a plan for MRI.")
    configuration = plan.configuration(name, where)
    shapes = []
    fingerprint = collect_fingerprint(volumes)
    for case in zip(fingerprint.spacings, fingerprint.shapes_after_crop, strict=True):
        spacing, shape = ([values[axis] for axis in plan.transpose_forward] for values in case)
        shapes.append(resampled_shape(shape, spacing, resampled_spacing(spacing, configuration)))
    expected = np.array(configuration.median_image_size_in_voxels)
    found = np.median(shapes, 0)[-len(expected) :]
    if (np.maximum(found / expected, expected / found) > 2).any():
        found, expected = ("×".join(f"{side:g}" for side in sides) for sides in (found, expected))
        problem = f"the scans have {found} voxels (median) at the plan's spacing, but the plan was made for {expected}"
        raise InputError(where, problem, "Use a plan made for these scans, or remove the option to make a new plan.")


def warn_unless_mri(root: Path) -> None:
    """Log a warning if `dataset.json` names a channel that nnU-Net would not normalise as MRI."""
    if (name := channel_name(root)).casefold() in NON_MRI_CHANNELS:
        path = root / "dataset.json"
        log.warning("%s: nnU-Net does not normalise channel %s by mean and standard deviation; jaxla does", path, name)


def collect_fingerprint(volumes: Iterable[PreparedVolume]) -> Fingerprint:
    """Return the fingerprint that nnU-Net plans from; reads one scan at a time."""
    spacings, shapes, fractions = [], [], []
    for volume in volumes:
        order = axis_order(volume.slice_axis)
        box = nonzero_box(volume.image.transpose(order))
        shapes.append(tuple(side.stop - side.start for side in box))
        spacings.append(tuple(volume.spacing[axis] for axis in order))
        fractions.append(math.prod(shapes[-1]) / math.prod(volume.shape))
    return Fingerprint(tuple(spacings), tuple(shapes), float(np.median(fractions)))


def make_plan(fingerprint: Fingerprint, class_count: int, memory_gb: float = DEFAULT_MEMORY_GB) -> Plan:
    """Plan all configurations: `2d` always, 3D ones unless the scans are single slices.

    Args:
        class_count: number of classes, including the background.
        memory_gb: memory of the GPU to plan for; less memory gives smaller patches.
    """
    spacings, shapes = np.array(fingerprint.spacings), np.array(fingerprint.shapes_after_crop)
    spacing = choose_spacing(spacings, shapes)
    coarsest = int(np.argmax(spacing))
    axes = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
    resampled = [resampled_shape(shape, old, spacing) for shape, old in zip(shapes, spacings, strict=True)]
    size = np.median(resampled, 0)[axes]
    spacing = spacing[axes]

    def configure(spacing: np.ndarray, size: Sequence[float], batch_dice: bool, voxels: float) -> Configuration:
        return _configure(spacing, size, batch_dice, voxels * len(shapes), class_count, memory_gb)

    voxels = float(np.prod(size))
    configurations = {"2d": configure(spacing[1:], size[1:].tolist(), True, voxels)}
    if size[0] != 1:
        full = configure(spacing, size.tolist(), False, voxels)
        low = _plan_low_resolution(full, spacing, size, configure)
        if low:
            configurations["3d_lowres"] = low
        configurations["3d_fullres"] = full._replace(batch_dice=low is not None)
    return Plan(
        fingerprint=fingerprint,
        median_spacing=tuple(np.median(spacings, 0)[axes].tolist()),
        median_shape=tuple(round(n) for n in np.median(shapes, 0)[axes].tolist()),
        transpose_forward=tuple(axes),
        configurations=configurations,
        use_mask_for_norm=fingerprint.median_relative_size_after_cropping < 3 / 4,
    )


def choose_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Return the spacing in mm to resample to: the median, but finer along a coarse axis with few slices.

    Along such an axis it is the 10th percentile, or just above the other axes' spacing if that is larger.

    Args:
        spacings, shapes: [cases, 3] each.
    """
    spacing, size = np.percentile(spacings, 50, 0), np.percentile(shapes, 50, 0)
    coarsest = int(np.argmax(spacing))
    in_plane = np.arange(3) != coarsest
    is_coarse = spacing[coarsest] > ANISOTROPY_THRESHOLD * spacing[in_plane].max()
    has_few_slices = size[coarsest] * ANISOTROPY_THRESHOLD < size[in_plane].min()
    if is_coarse and has_few_slices:
        fine, longest = np.percentile(spacings[:, coarsest], 10), spacing[in_plane].max()
        spacing[coarsest] = fine if fine >= longest else longest + 1e-5
    return spacing


def _configure(
    spacing: np.ndarray, size: Sequence[float], batch_dice: bool, voxels: float, class_count: int, memory_gb: float
) -> Configuration:
    """Plan patches and network for images of a spacing and a median size; the data set has `voxels` in total."""
    axes = len(spacing)
    budget = MAX_ACTIVATIONS[axes] * (memory_gb / DEFAULT_MEMORY_GB)
    batch_size = REFERENCE_BATCH_SIZE[axes]
    per_mm = 1 / np.array(spacing)
    side = (INITIAL_PATCH_VOXELS[axes] / np.prod(per_mm)) ** (1 / axes)
    patch = [min(round(n * side), limit) for n, limit in zip(per_mm.tolist(), size, strict=True)]
    topology = plan_topology(spacing, patch)
    while (activations := count_activations(topology, class_count)) / batch_size * MIN_BATCH_SIZE > budget:
        topology = _shrink_patch(topology, spacing, size)
    max_batch_size = round(voxels * MAX_BATCH_FRACTION / math.prod(topology.patch_size))
    stages = len(topology.strides)
    return Configuration(
        batch_size=max(min(round(budget / activations * batch_size), max_batch_size), MIN_BATCH_SIZE),
        patch_size=topology.patch_size,
        median_image_size_in_voxels=tuple(size),
        spacing=tuple(np.array(spacing).tolist()),
        batch_dice=batch_dice,
        n_stages=stages,
        features_per_stage=topology.features,
        kernel_sizes=topology.kernel_sizes,
        strides=topology.strides,
        n_conv_per_stage=(CONVOLUTIONS_PER_STAGE,) * stages,
        n_conv_per_stage_decoder=(CONVOLUTIONS_PER_STAGE,) * (stages - 1),
    )


def _shrink_patch(topology: Topology, spacing: np.ndarray, size: Sequence[float]) -> Topology:
    """Return the topology of the next smaller patch: the side that is longest relative to the image is shortened."""
    patch = list(topology.patch_size)
    axis = int(np.argsort([n / limit for n, limit in zip(patch, size, strict=True)])[-1])
    smaller = list(patch)
    smaller[axis] -= topology.multiples[axis]
    patch[axis] -= plan_topology(spacing, smaller).multiples[axis]  # a smaller patch may have fewer stages
    return plan_topology(spacing, patch)


def _plan_low_resolution(
    full: Configuration, spacing: np.ndarray, size: np.ndarray, configure: Callable[..., Configuration]
) -> Configuration | None:
    """Plan a coarser configuration if the patch at full resolution is smaller than MIN_PATCH_FRACTION of a scan."""
    coarse = spacing.copy()
    low = None
    patch = math.prod(full.patch_size)
    voxels = float(np.prod(size))
    while patch / voxels < MIN_PATCH_FRACTION:
        is_fine = coarse.max() / coarse > 2  # these axes are made coarser first, until the spacings are similar
        coarse = np.where(is_fine, coarse * SPACING_STEP, coarse) if is_fine.any() else coarse * SPACING_STEP
        voxels = float(np.prod(spacing / coarse * size))
        low = configure(coarse, [round(n) for n in (spacing / coarse * size).tolist()], False, voxels)
        patch = math.prod(low.patch_size)
    return low if low and float(np.prod(size)) / voxels >= MIN_REDUCTION else None


class Topology(NamedTuple):
    """Stages of a U-Net, from fine to coarse. A kernel is 1 along an axis whose spacing is still much coarser."""

    strides: tuple[tuple[int, ...], ...]  # strides of each stage along each axis; 1 in the first stage
    kernel_sizes: tuple[tuple[int, ...], ...]  # sides of each stage's kernels along each axis
    patch_size: tuple[int, ...]  # the requested size, rounded up to multiples of `multiples`
    multiples: tuple[int, ...]  # the strides need sides that are multiples of these

    @property
    def features(self) -> tuple[int, ...]:
        limit = MAX_FEATURES[len(self.patch_size)]
        return tuple(min(limit, BASE_FEATURES * 2**stage) for stage in range(len(self.strides)))


def plan_topology(spacing: Sequence[float], size: Sequence[float]) -> Topology:
    """Plan the stages for patches of `size` voxels at `spacing` mm, along two or three axes.

    Each stage halves the axes of finest spacing, until no axis is as long as twice MIN_MAP_SIDE.
    """
    spacing, side = np.array(spacing, float), np.array(size, float)
    kernel, multiples = np.ones(len(spacing), int), np.ones(len(spacing), int)
    strides, kernels = [tuple(multiples.tolist())], []
    while (is_long := side >= 2 * MIN_MAP_SIDE).any():
        is_halved = is_long & (spacing / spacing[is_long].min() < SIMILAR_SPACING_RATIO)
        # a single axis is halved only if it is longer
        if is_halved.sum() == 1 and side[is_halved][0] < 3 * MIN_MAP_SIDE:
            break
        kernel[spacing / spacing.min() < SIMILAR_SPACING_RATIO] = 3
        stride = np.where(is_halved, 2, 1)
        spacing, side, multiples = spacing * stride, np.ceil(side / stride), multiples * stride
        strides.append(tuple(stride.tolist()))
        kernels.append(tuple(kernel.tolist()))
    kernels.append((3,) * len(spacing))
    patch_size = np.ceil(np.array(size) / multiples).astype(int) * multiples
    return Topology(tuple(strides), tuple(kernels), tuple(patch_size.tolist()), tuple(multiples.tolist()))


def count_activations(topology: Topology, class_count: int) -> int:
    """Return the number of values that all convolutions output for one patch: nnU-Net's estimate of memory."""
    size = np.array(topology.patch_size)
    total = 0
    for stage, (features, stride) in enumerate(zip(topology.features, topology.strides, strict=True)):
        size = size // np.array(stride)
        is_deepest = stage == len(topology.strides) - 1
        # encoder; in all other stages also the decoder and a transposed convolution
        convolutions = CONVOLUTIONS_PER_STAGE if is_deepest else 2 * CONVOLUTIONS_PER_STAGE + 1
        total += convolutions * features * math.prod(size.tolist())
    return total + class_count * math.prod(topology.patch_size)
