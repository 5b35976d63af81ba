"""nnU-Net's planner: from the shapes and spacings of the scans to patches, networks and batches.

Reference: Isensee, Jaeger et al., Nature Methods 18 (2021); code nnunetv2 2.8.1, `default_experiment_planner`. What a
configuration takes of a GPU's memory is the method's own estimate, from which its patches follow: no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxla.nnunet.plan import Configuration, Fingerprint, Plan
from jaxla.nnunet.topology import Topology, topology

ANISOTROPIC = 3  # a scan is, where its coarsest spacing is more than so many times another
MEMORY_GB = 8.0  # of the GPU that the reference values below are for

FIRST_FEATURES, MOST_FEATURES = 32, {2: 512, 3: 320}
CONVOLUTIONS = 2  # of a stage, on the way down and on the way up
# features that a network of so many axes may hold for a batch, voxels of its largest patch, and that batch
MOST_HELD, LARGEST_PATCH, BATCH = {2: 85_000_000, 3: 560_000_000}, {2: 2048**2, 3: 256**3}, {2: 12, 3: 2}
SMALLEST_BATCH = 2
SHARE_OF_DATA = 0.05  # of all voxels, which a batch may hold at most

COARSER, COARSE_ENOUGH, WORTHWHILE = 1.03, 0.25, 2  # of the low resolution: steps of spacing; when it ends; is it kept


def make_plan(fingerprint: Fingerprint, classes: int, memory_gb: float = MEMORY_GB) -> Plan:
    """The configurations that nnU-Net plans for such scans, `2d` always, those of three dimensions where scans have.

    Args:
        classes: with the background.
        memory_gb: of the GPU that is planned for; less makes the patches smaller.
    """
    spacings, shapes = np.array(fingerprint.spacings), np.array(fingerprint.shapes_after_crop)
    spacing = target_spacing(spacings, shapes)
    coarsest = int(np.argmax(spacing))
    axes = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
    resampled = [resampled_shape(shape, mm, spacing) for shape, mm in zip(shapes, spacings, strict=True)]
    size = np.median(resampled, 0)[axes]
    spacing = spacing[axes]

    def configure(spacing: np.ndarray, size: Sequence[float], batch_dice: bool, voxels: float) -> Configuration:
        return _configuration(spacing, size, batch_dice, voxels * len(shapes), classes, memory_gb)

    voxels = float(np.prod(size))
    configurations = {"2d": configure(spacing[1:], size[1:].tolist(), True, voxels)}
    if size[0] != 1:
        whole = configure(spacing, size.tolist(), False, voxels)
        low = _low_resolution(whole, spacing, size, configure)
        if low:
            configurations["3d_lowres"] = low
        configurations["3d_fullres"] = whole._replace(batch_dice=low is not None)
    return Plan(
        fingerprint=fingerprint,
        median_spacing=tuple(np.median(spacings, 0)[axes].tolist()),
        median_shape=tuple(round(n) for n in np.median(shapes, 0)[axes].tolist()),
        transpose_forward=tuple(axes),
        configurations=configurations,
        use_mask_for_norm=fingerprint.median_relative_size_after_cropping < 3 / 4,
    )


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The spacing that scans are brought to, mm: the median; of a coarse axis with few slices the finest tenth's.

    Args:
        spacings, shapes: [cases, 3] each.
    """
    target, size = np.percentile(spacings, 50, 0), np.percentile(shapes, 50, 0)
    coarsest = int(np.argmax(target))
    others = np.arange(3) != coarsest
    coarse = target[coarsest] > ANISOTROPIC * target[others].max()
    few = size[coarsest] * ANISOTROPIC < size[others].min()
    if coarse and few:
        finest = np.percentile(spacings[:, coarsest], 10)
        longest = target[others].max()
        target[coarsest] = finest if finest >= longest else longest + 1e-5
    return target


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """The shape of a scan once its spacing is `target`."""
    return tuple(round(float(mm / to * n)) for n, mm, to in zip(shape, spacing, target, strict=True))


def _configuration(
    spacing: np.ndarray, size: Sequence[float], batch_dice: bool, voxels: float, classes: int, memory_gb: float
) -> Configuration:
    """A network and its patches for images of a spacing and a median size.

    Args:
        voxels: of all images.
    """
    dimensions = len(spacing)
    most, batch = MOST_HELD[dimensions] * (memory_gb / MEMORY_GB), BATCH[dimensions]
    per_mm = 1 / np.array(spacing)
    side = (LARGEST_PATCH[dimensions] / np.prod(per_mm)) ** (1 / dimensions)
    patch = [min(round(n * side), limit) for n, limit in zip(per_mm.tolist(), size, strict=True)]
    stages = topology(spacing, patch)
    while (held := features_held(stages, classes)) / batch * SMALLEST_BATCH > most:
        stages = _smaller(stages, spacing, size)
    of_data = round(voxels * SHARE_OF_DATA / math.prod(stages.patch_size))
    return Configuration(
        batch_size=max(min(round(most / held * batch), of_data), SMALLEST_BATCH),
        patch_size=stages.patch_size,
        median_image_size_in_voxels=tuple(size),
        spacing=tuple(np.array(spacing).tolist()),
        batch_dice=batch_dice,
        n_stages=len(stages.strides),
        features_per_stage=_features(stages),
        kernel_sizes=stages.kernel_sizes,
        strides=stages.strides,
        n_conv_per_stage=(CONVOLUTIONS,) * len(stages.strides),
        n_conv_per_stage_decoder=(CONVOLUTIONS,) * (len(stages.strides) - 1),
    )


def _smaller(stages: Topology, spacing: np.ndarray, size: Sequence[float]) -> Topology:
    """The next smaller patch: that side is cut which is the longest of its image."""
    patch = list(stages.patch_size)
    axis = int(np.argsort([n / of_image for n, of_image in zip(patch, size, strict=True)])[-1])
    without = list(patch)
    without[axis] -= stages.multiple[axis]
    patch[axis] -= topology(spacing, without).multiple[axis]  # a patch that is smaller by less may do with fewer stages
    return topology(spacing, patch)


def _features(stages: Topology) -> tuple[int, ...]:
    most = MOST_FEATURES[len(stages.patch_size)]
    return tuple(min(most, FIRST_FEATURES * 2**stage) for stage in range(len(stages.strides)))


def features_held(stages: Topology, classes: int) -> int:
    """What all convolutions of the network make of one patch, in numbers: nnU-Net's measure of its memory."""
    size, total = np.array(stages.patch_size), 0
    for stage, (features, stride) in enumerate(zip(_features(stages), stages.strides, strict=True)):
        size = size // np.array(stride)
        # down; and from every stage but the deepest up again, by a transposed convolution
        convolutions = 2 * CONVOLUTIONS + 1 if stage < len(stages.strides) - 1 else CONVOLUTIONS
        total += convolutions * features * math.prod(size.tolist())
    return total + classes * math.prod(stages.patch_size)


def _low_resolution(whole: Configuration, spacing: np.ndarray, size: np.ndarray, configure) -> Configuration | None:  # noqa: ANN001
    """A coarser configuration whose patch is a quarter of a scan, where that of full resolution is less of it."""
    coarse, low, patch, voxels = spacing.copy(), None, math.prod(whole.patch_size), float(np.prod(size))
    while patch / voxels < COARSE_ENOUGH:
        fine = coarse.max() / coarse > 2  # these first, until all axes are alike
        coarse = np.where(fine, coarse * COARSER, coarse) if fine.any() else coarse * COARSER
        voxels = float(np.prod(spacing / coarse * size))
        low = configure(coarse, [round(n) for n in (spacing / coarse * size).tolist()], False, voxels)
        patch = math.prod(low.patch_size)
    return low if low and float(np.prod(size)) / voxels >= WORTHWHILE else None
