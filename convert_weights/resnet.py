"""Map the tensors of torchvision's ResNet checkpoints, in torchvision's order, to our parameters.

Reference code: torchvision 0.29, `models/resnet.py`.
"""

from __future__ import annotations

from convert_weights.layout import Row, batch_norm, convolution, unused
from jaxla.models.backbones.resnet import EXPANSION, WIDTH, Variant

IMAGENET_CLASSES = 1000  # outputs of the classifier, which the encoder does not use


def resnet_rows(variant: Variant) -> list[Row]:
    rows = [*convolution("conv1", "conv1", 3, WIDTH, (7, 7)), *batch_norm("bn1", "bn1", WIDTH)]
    width = WIDTH
    for i, blocks in enumerate(variant.blocks):
        bottleneck_width = WIDTH * 2**i
        stage = f"layer{i + 1}"
        rows += _bottleneck(f"{stage}.0", f"{stage}.first", width, bottleneck_width, first=True)
        width = EXPANSION * bottleneck_width
        for j in range(1, blocks):  # the blocks after the first are stacked
            rows += [  # num_batches_tracked has no parameter of ours, so it is not stacked
                row if row.optional else row._replace(block=j - 1)
                for row in _bottleneck(f"{stage}.{j}", f"{stage}.rest", width, bottleneck_width, first=False)
            ]
    return [*rows, unused("fc.weight", (IMAGENET_CLASSES, width)), unused("fc.bias", (IMAGENET_CLASSES,))]


def _bottleneck(theirs: str, ours: str, inputs: int, bottleneck_width: int, *, first: bool) -> list[Row]:
    outputs = EXPANSION * bottleneck_width
    rows = [
        *convolution(f"{theirs}.conv1", f"{ours}.conv1", inputs, bottleneck_width, (1, 1)),
        *batch_norm(f"{theirs}.bn1", f"{ours}.bn1", bottleneck_width),
        *convolution(f"{theirs}.conv2", f"{ours}.conv2", bottleneck_width, bottleneck_width, (3, 3)),
        *batch_norm(f"{theirs}.bn2", f"{ours}.bn2", bottleneck_width),
        *convolution(f"{theirs}.conv3", f"{ours}.conv3", bottleneck_width, outputs, (1, 1)),
        *batch_norm(f"{theirs}.bn3", f"{ours}.bn3", outputs),
    ]
    if first:
        rows += convolution(f"{theirs}.downsample.0", f"{ours}.downsample_conv", inputs, outputs, (1, 1))
        rows += batch_norm(f"{theirs}.downsample.1", f"{ours}.downsample_bn", outputs)
    return rows
