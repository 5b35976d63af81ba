"""How deep a U-Net goes for patches of a size and spacing, and which axes each of its stages halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMALLEST = 4  # voxels a side of the coarsest map
ALIKE = 2  # spacings that differ by less than this factor are halved, and convolved, together


class Topology(NamedTuple):
    """Stages of a U-Net, finest first.

    Attributes:
        strides: of each stage along each axis; 1 in the first.
        kernel_sizes: of each stage's convolutions: 1 along an axis whose voxels are still much longer than the others.
        patch_size: the size asked for, each side rounded up to what the strides divide.
        multiple: of which each side must be.
    """

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]
    multiple: tuple[int, ...]


def topology(spacing: Sequence[float], size: Sequence[float]) -> Topology:
    """The stages for patches of `size` voxels of `spacing` mm, along two or three axes.

    At each stage those axes are halved whose voxels are among the shortest, until none has twice SMALLEST left.
    Reference code: nnunetv2 2.8.1, `network_topology.get_pool_and_conv_props`.
    """
    mm, left = np.array(spacing, float), np.array(size, float)
    kernel, multiple = np.ones(len(mm), int), np.ones(len(mm), int)
    strides, kernels = [tuple(multiple.tolist())], []
    while (long_enough := left >= 2 * SMALLEST).any():
        halved = long_enough & (mm / mm[long_enough].min() < ALIKE)
        if halved.sum() == 1 and left[halved][0] < 3 * SMALLEST:  # one axis alone is halved only if much is left
            break
        kernel[mm / mm.min() < ALIKE] = 3
        stride = np.where(halved, 2, 1)
        mm, left, multiple = mm * stride, np.ceil(left / stride), multiple * stride
        strides.append(tuple(stride.tolist()))
        kernels.append(tuple(kernel.tolist()))
    kernels.append((3,) * len(mm))
    patch_size = np.ceil(np.array(size) / multiple).astype(int) * multiple
    return Topology(tuple(strides), tuple(kernels), tuple(patch_size.tolist()), tuple(multiple.tolist()))
