"""PyTorch modules of the convolutional networks, written from their papers.

Encoders have torchvision's names, everything else has ours.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

# --- U-Net: Ronneberger et al. 2015, figure 1, padded, with BatchNorm ---


class Unit(nn.Module):
    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()


class Double(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.second = Unit(inputs, outputs), Unit(outputs, outputs)

    def forward(self, x):
        return self.second(self.first(x))


class ReferenceUNet(nn.Module):
    def __init__(self, widths, outputs):
        super().__init__()
        self.down = nn.ModuleList([Double(i, o) for i, o in pairwise((1, *widths))])
        self.up = nn.ModuleList([nn.ConvTranspose2d(o, i, 2, 2) for i, o in pairwise(widths)])
        self.join = nn.ModuleList([Double(2 * width, width) for width in widths[:-1]])
        self.logits = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, x):
        levels = []
        for convolutions in self.down:
            x = convolutions(functional.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([self.skip(i, levels[i], x), self.up[i](x)], dim=1))
        return self.logits(x)

    def skip(self, level, x, below):
        return x


# --- Attention U-Net: Oktay et al. 2018, equation 1 and figure 2, a gate on every skip ---


class ReferenceGate(nn.Module):
    def __init__(self, skip, gating):
        super().__init__()
        self.project_skip = nn.Conv2d(skip, skip, 2, 2, bias=False)
        self.project_gating = nn.Conv2d(gating, skip, 1)
        self.psi = nn.Conv2d(skip, 1, 1)

    def forward(self, x, g):
        weight = self.psi((self.project_skip(x) + self.project_gating(g)).relu()).sigmoid()
        return x * functional.interpolate(weight, scale_factor=2, mode="bilinear", align_corners=False)


class ReferenceAttentionUNet(ReferenceUNet):
    def __init__(self, widths, outputs):
        super().__init__(widths, outputs)
        self.gates = nn.ModuleList([ReferenceGate(i, o) for i, o in pairwise(widths)])

    def skip(self, level, x, below):
        return self.gates[level](x, below)


# --- ResNet: He et al. 2016, table 1 and figure 5; the stride on the 3×3 convolution ---


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        if inputs != 4 * width or stride > 1:
            projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ReferenceResNet(nn.Module):
    """An encoder that returns the features of the stem, those after its max-pool, and those of each stage."""

    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for i, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
            first = Bottleneck(inputs, width, 1 if i == 1 else 2)
            rest = (Bottleneck(4 * width, width, 1) for _ in range(count - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
            inputs = 4 * width

    def forward(self, x):
        stem = self.bn1(self.conv1(x)).relu()
        features = [stem, functional.max_pool2d(stem, 3, 2, padding=1)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(stage(features[-1]))
        return features


# --- U-Net on a ResNet: the decoder of segmentation_models_pytorch ---


class ReferenceResNetUNet(nn.Module):
    def __init__(self, blocks, widths, outputs):
        super().__init__()
        self.backbone = ReferenceResNet(blocks)
        below = (2048, *widths[:-1])
        skips = (1024, 512, 256, 64, 0)
        self.up = nn.ModuleList([Double(i + s, o) for i, s, o in zip(below, skips, widths, strict=True)])
        self.logits = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x):
        stem, _, *stages = self.backbone(x)
        *skips, x = [stem, *stages]
        for stage in self.up:
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = stage(torch.cat([x, skips.pop()], dim=1) if skips else x)
        return self.logits(x)


# --- VGG-16: Simonyan and Zisserman 2015, table 1, column D, with BatchNorm; SegNet: Badrinarayanan et al. 2017 ---


class ReferenceVGG(nn.Module):
    """An encoder that returns the features after each max-pool, and the indices of the maxima."""

    def __init__(self, stages):
        super().__init__()
        layers, inputs = [], 3
        for widths in stages:
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2, return_indices=True))
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        pooled, indices = [], []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                x, index = x
                pooled.append(x)
                indices.append(index)
        return pooled, indices


class ReferenceSegNet(nn.Module):
    def __init__(self, stages, outputs):
        super().__init__()
        self.backbone = ReferenceVGG(stages)
        # mirrored; for VGG-16: 64 64, 128 128 64, 256 256 256 128, 512 512 512 256, 512 512 512 512
        widths = [stages[0], *([*stage, above[-1]] for above, stage in pairwise(stages))]
        self.up = nn.ModuleList(
            [nn.ModuleList([Unit(i, o, bias=True) for i, o in pairwise(stage)]) for stage in widths]
        )
        self.logits = nn.Conv2d(stages[0][0], outputs, 3, padding=1)

    def forward(self, x):
        pooled, indices = self.backbone(x)
        x = pooled[-1]
        for stage, index in zip(reversed(self.up), reversed(indices), strict=True):
            x = functional.max_unpool2d(x, index, 2)
            for unit in stage:
                x = unit(x)
        return self.logits(x)
