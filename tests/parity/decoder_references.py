"""PyTorch modules of the three papers' decoders, with our names."""

from itertools import pairwise
from math import gcd

import torch
from torch import nn
from torch.nn import functional

from tests.parity.network_references import Double, Unit

# --- paper 1's decoder ---


class ReferenceDecoder(nn.Module):
    def __init__(self, width, widths, outputs, size):
        super().__init__()
        self.token_classifier = nn.Conv2d(width, widths[0], 1)
        self.mix = nn.Conv2d(widths[0], widths[0], 7, padding=3)
        self.stages = nn.ModuleList([Unit(i, o) for i, o in pairwise(widths)])
        self.logits = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        self.size = size

    def forward(self, x):
        x = self.mix(functional.selu(self.token_classifier(x)))
        for stage in self.stages:
            x = stage(functional.interpolate(x, scale_factor=2, mode="bilinear"))
        if x.shape[2:] != self.size:
            x = functional.interpolate(x, size=self.size, mode="bilinear")
        return self.logits(x)


# --- paper 2's decoder ---


class ReferenceStage(nn.Module):
    def __init__(self, width, inputs, outputs, stem):
        super().__init__()
        self.project = nn.Conv2d(width, inputs, 1)
        self.stem = Unit(3, stem) if stem else None
        self.convolutions = Double(inputs + stem, outputs)

    def forward(self, x, fused, images):
        size = [2 * side for side in x.shape[2:]]
        x = functional.interpolate(x, size=size, mode="bilinear")
        x = x + functional.interpolate(self.project(fused), size=size, mode="bilinear")
        if self.stem:
            images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
            x = torch.cat([x, self.stem(images)], dim=1)
        return self.convolutions(x)


class ReferenceFusion(nn.Module):
    """Weighted sums of blocks, with one row of scalars per level, one for all levels, or none for equal weights."""

    def __init__(self, levels, blocks, rows):
        super().__init__()
        self.shape = levels, blocks
        if rows:
            self.scalars = nn.Parameter(torch.zeros(rows, blocks))

    def forward(self, features):
        scalars = self.scalars if hasattr(self, "scalars") else features.new_zeros(self.shape)
        return torch.einsum("kl,blchw->kbchw", scalars.softmax(1).expand(self.shape), features)


class ReferenceFusionDecoder(nn.Module):
    """Decode features [B, blocks, C, h, w] and images [B, 3, H, W] to logits."""

    def __init__(self, width, blocks, rows, widths, outputs, stems, size):
        super().__init__()
        self.fusion = ReferenceFusion(len(widths), blocks, rows)
        self.project = nn.Conv2d(width, widths[0], 1)
        stages = zip(pairwise(widths), stems, strict=True)
        self.stages = nn.ModuleList([ReferenceStage(width, i, o, stem) for (i, o), stem in stages])
        self.logits = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        self.size = size

    def forward(self, features, images):
        first, *rest = self.fusion(features)
        x = self.project(first)
        for stage, fused in zip(self.stages, rest, strict=True):
            x = stage(x, fused, images)
        return self.logits(functional.interpolate(x, size=self.size, mode="bilinear"))


# --- paper 3's decoder, for one window ---


class ReferenceLevel(nn.Module):
    def __init__(self, width, outputs, places):
        super().__init__()
        self.project = nn.Conv2d(width, outputs, 1)  # 1×1×1
        self.depth = nn.Parameter(torch.zeros(places, outputs)) if places else None

    def forward(self, x, slices, window):
        x = convolve_voxels(self.project, x)
        if self.depth is None:
            return x
        depth = functional.interpolate(self.depth.T[None], size=slices, mode="linear", align_corners=False)
        return x + depth[:, :, window.start : window.stop, None, None]


class ReferenceWindowUnit(nn.Module):
    def __init__(self, inputs, outputs, depth):
        super().__init__()
        self.convolution = nn.Conv3d(inputs, outputs, (depth, 3, 3), padding=(depth // 2, 1, 1), bias=False)
        self.norm = nn.GroupNorm(gcd(8, outputs), outputs)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()


class ReferenceWindowDecoder(nn.Module):
    """Decode features [B, 4, C, d, h, w] of the slices in the range `window`, from a volume with `slices` slices."""

    def __init__(self, width, widths, outputs, places, depth):
        super().__init__()
        inputs = (widths[0], *widths[:-1])
        self.levels = nn.ModuleList([ReferenceLevel(width, i, places) for i in inputs])
        self.units = nn.ModuleList([ReferenceWindowUnit(i, o, depth) for i, o in zip(inputs, widths, strict=True)])
        self.logits = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, features, slices, window):
        x = None
        for level, unit, deepest in zip(self.levels, self.units, (3, 2, 1, 0), strict=True):
            projected = level(features[:, deepest], slices, window)
            if x is None:
                x = projected
            else:
                x = functional.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear")
                x = x + functional.interpolate(projected, size=x.shape[2:], mode="trilinear")
            x = unit(x)
        return convolve_voxels(self.logits, x)


def convolve_voxels(convolution, x):
    """Apply a 1×1×1 convolution to [B, C, d, h, w] as a matrix product, because Conv3d is slow on CPU."""
    return torch.einsum("oc,bcdhw->bodhw", convolution.weight[:, :, 0, 0], x) + convolution.bias[:, None, None, None]
