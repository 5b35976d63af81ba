"""Map the tensors of torchvision's VGG-16 with BatchNorm, in torchvision's order, to our parameters.

Reference code: torchvision 0.29, `models/vgg.py`.
"""

from __future__ import annotations

from convert_weights.layout import Row, batch_norm, convolution, unused
from jaxla.models.backbones.vgg import Variant

CLASSIFIER_WIDTHS = {0: 4096, 3: 4096, 6: 1000}  # index of each linear layer -> width; the encoder does not use them
CLASSIFIER_PIXELS = 7 * 7  # size of the map that the first of these layers reads


def vgg_rows(variant: Variant) -> list[Row]:
    rows, index, inputs = [], 0, 3
    for i, widths in enumerate(variant.stages):
        for j, width in enumerate(widths):
            ours = f"stages.{i}.{j}"
            rows += convolution(f"features.{index}", f"{ours}.convolution", inputs, width, (3, 3), bias=True)
            rows += batch_norm(f"features.{index + 1}", f"{ours}.norm", width)
            index, inputs = index + 3, width  # a convolution, its BatchNorm and its ReLU
        index += 1  # the max-pool
    inputs *= CLASSIFIER_PIXELS
    for layer, outputs in CLASSIFIER_WIDTHS.items():
        rows.append(unused(f"classifier.{layer}.weight", (outputs, inputs)))
        rows.append(unused(f"classifier.{layer}.bias", (outputs,)))
        inputs = outputs
    return rows
