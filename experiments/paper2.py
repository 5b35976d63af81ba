"""Paper 2: multi-scale feature fusion with image-driven spatial integration (arXiv 2502.06615), and its ablations.

Learned weights fuse the features of a frozen DINOv2's blocks, and a U-Net-like decoder also reads the image. The
recipe is paper 1's, but with 50 epochs, as stated in another abstract by the same group.

Command:   python -m jaxla.train --exp=paper2 --data.root=/path/to/LAScarQS2022
           python -m jaxla.study --name=paper2_ablation --output=studies/ablation --data.root=/path/to/LAScarQS2022
Time:      not measured.
Expected:  not measured on LAScarQS 2022; the paper's own numbers are in PUBLISHED below. On 60 brain MR scans
           (Decathlon hippocampus, 42 for training), with a small transformer trained from random weights at 64 pixels,
           the fusion reaches a test Dice of 0.810 and paper 1's network 0.793 (mean over 12 volumes, each averaged over
           2 seeds; the atlas baseline: 0.716; docs/benchmarks.md has the command).
"""

from dataclasses import replace

from jaxla.config import BackboneTraining, Data, Experiment, Method, Preprocessing, Published, Study
from jaxla.models.networks.fusion import FusionOptions

RECIPE = BackboneTraining(epochs=50, batch_size=32, learning_rate=1e-3, backbone_learning_rate=1e-5, patience=10)

_FUSION = {
    name: Method(
        f"fusion_{name}",
        f"frozen {family} {size}, all blocks fused, the decoder reads the image",
        FusionOptions(arch),
        Preprocessing(448),
        RECIPE,
    )
    for name, arch, family, size in (
        ("vitb14", "dinov2_vitb14", "DINOv2", "ViT-B/14"),
        ("vitl14", "dinov2_vitl14", "DINOv2", "ViT-L/14"),
        ("vitg14", "dinov2_vitg14", "DINOv2", "ViT-g/14"),
        ("dinov3_vitb16", "dinov3_vitb16", "DINOv3", "ViT-B/16"),
        ("dinov3_vitl16", "dinov3_vitl16", "DINOv3", "ViT-L/16"),
    )
}

_ABLATIONS = {
    "last_block": ("the last block only, so no weighting", {"blocks": (-1,)}),
    "uniform": ("equal weights, not learned", {"block_weights": "uniform"}),
    "last4": ("the last four blocks only", {"blocks": (-4, -3, -2, -1)}),
    "no_image": ("without the image", {"image_stages": "none"}),
    "image_last": ("the image at the last stage only", {"image_stages": "last"}),
}
_FULL = _FUSION["vitb14"]

_ABLATED = [
    replace(
        _FULL, name=f"{_FULL.name}_{name}", summary=f"{_FULL.name}, {summary}", model=replace(_FULL.model, **options)
    )
    for name, (summary, options) in _ABLATIONS.items()
]
METHODS = [_FULL, *_ABLATED, *(method for method in _FUSION.values() if method is not _FULL)]

EXPERIMENTS = [Experiment("paper2", "all training patients", Data(), _FULL)]

STUDIES = [
    Study(
        "paper2",
        "paper 2's fusion against paper 1's network and the convolutional networks",
        ("paper2",),
        (
            "unet",
            "attention_unet",
            "resnet50_unet",
            "resnet152_unet",
            "segnet",
            "dinov2_vitb14",
            "dinov2_vitg14",
            "fusion_vitb14",
            "fusion_vitl14",
            "fusion_vitg14",
        ),
    ),
    Study(
        "paper2_ablation",
        "paper 2's network with one part removed at a time: blocks, their weights, the image",
        ("paper2",),
        (*(method.name for method in _ABLATED), _FULL.name),
    ),
]

# The abstract's numbers. They cannot be means over the same volumes or slices: a mean Dice of 92.3 % implies a mean IoU
# of at least 85.7 %.
PUBLISHED = {
    ("fusion_vitg14", "paper2"): Published(
        "by paper 2, on LAScarQS 2022",
        "the paper does not state whether its means are over volumes or slices",
        92.3,
        iou=84.1,
    ),
}
