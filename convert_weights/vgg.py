"""Map the tensors of torchvision's VGG-16 with BatchNorm, in torchvision's order, to our parameters.

Reference code: torchvision 0.29, `models/vgg.py`.
"""

from __future__ import annotations

from convert_weights.layout import Row, batch_norm, convolution, unused
from jaxla.models.backbones.vgg import Variant

# The classifier, which the encoder does not use: layer index -> width; pixels that the first layer reads.
CLASSIFIER_WIDTHS, CLASSIFIER_PIXELS = {0: 4096, 3: 4096, 6: 1000}, 7 * 7


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
