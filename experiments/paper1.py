"""Paper 1: DINOv2 for left-atrium segmentation (Kundu, Khanal, Simon, Linte; arXiv 2411.09598).

DINOv2 methods: frozen backbone, convolutional decoder, 448×448 pixels, Adam 1e-3, at most 35 epochs, batches of 32.
Convolutional methods: 320×320 pixels, Adam 1e-4, at most 75 epochs, batches of 24, binary opening, then closing, of the
masks. All use binary cross-entropy and early stopping. Protocols: 1, 2, 5, 10, 20 or all training patients (2, 5 and
20 are not in the paper), or 25, 50 or 75 % of them.

Command:   python -m jaxla.train --exp=paper1 --data.root=/path/to/LAScarQS2022
           python -m jaxla.study --name=paper1 --output=studies/paper1 --data.root=/path/to/LAScarQS2022
Time:      not measured.
Expected:  not measured on LAScarQS 2022; the paper's own numbers are in PUBLISHED below. On 60 brain MR scans
           (Decathlon hippocampus, 42 for training) `unet` at 64 pixels reaches a test Dice of 0.853 in 4 epochs and
           20 minutes on two busy CPU cores (mean per volume, n = 12; the atlas baseline: 0.716; docs/benchmarks.md has
           the command).
"""

from dataclasses import asdict

from jaxla.config import (
    BackboneTraining,
    Data,
    Experiment,
    Method,
    Postprocessing,
    Preprocessing,
    Published,
    Study,
    Training,
)
from jaxla.models.networks.attention_unet import AttentionUNetOptions
from jaxla.models.networks.resnet_unet import ResNetUNetOptions
from jaxla.models.networks.segnet import SegNetOptions
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.models.networks.unet import UNetOptions

RECIPE = BackboneTraining(epochs=35, batch_size=32, learning_rate=1e-3, backbone_learning_rate=1e-5, patience=10)
UNET_RECIPE = Training(epochs=75, batch_size=24, learning_rate=1e-4, patience=10)
ENCODER_RECIPE = BackboneTraining(**asdict(UNET_RECIPE), backbone_learning_rate=1e-4)

_CONVOLUTIONAL = {
    "unet": ("U-Net (2015) with BatchNorm", UNetOptions(), UNET_RECIPE),
    "attention_unet": (
        "Attention U-Net (2018): a U-Net with a gate on every skip connection", AttentionUNetOptions(), UNET_RECIPE,
    ),
    "resnet50_unet": (
        "U-Net on an ImageNet-trained ResNet-50", ResNetUNetOptions("resnet50", backbone="finetuned"), ENCODER_RECIPE,
    ),
    "resnet152_unet": (
        "U-Net on an ImageNet-trained ResNet-152", ResNetUNetOptions("resnet152", backbone="finetuned"), ENCODER_RECIPE,
    ),
    "segnet": (
        "SegNet (2017) on an ImageNet-trained VGG-16", SegNetOptions(backbone="finetuned"), ENCODER_RECIPE,
    ),
}  # fmt: skip

_DINOV2 = {
    letter: Method(
        f"dinov2_vit{letter}14",
        f"frozen DINOv2 ViT-{size}/14, paper 1's decoder",
        TransformerSegmenterOptions(f"dinov2_vit{letter}14"),
        Preprocessing(448),
        RECIPE,
    )
    for letter, size in zip("sblg", "SBLg", strict=True)
}

METHODS = [
    *_DINOV2.values(),
    *(
        Method(name, summary, model, Preprocessing(320, "largest"), recipe, Postprocessing(3, 3))
        for name, (summary, model, recipe) in _CONVOLUTIONAL.items()
    ),
]

_PROTOCOLS = (
    {"fewshot_1patient": ("one training patient", Data(train_patients=1))}
    | {f"fewshot_{n}patients": (f"{n} training patients", Data(train_patients=n)) for n in (2, 5, 10, 20)}
    | {f"data_{p}percent": (f"{p} % of the training patients", Data(train_percent=p)) for p in (25, 50, 75)}
    | {"paper1": ("all training patients", Data())}
)

EXPERIMENTS = [Experiment(name, summary, data, _DINOV2["b"]) for name, (summary, data) in _PROTOCOLS.items()]

_TABLE1_METHODS = (
    "attention_unet", "unet", "resnet50_unet", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14",
)  # fmt: skip
_FEWSHOT = ("fewshot_1patient", "fewshot_2patients", "fewshot_5patients", "fewshot_10patients", "fewshot_20patients")
_PERCENT = ("data_25percent", "data_50percent", "data_75percent")

STUDIES = [
    Study(
        "paper1",
        "paper 1's Table 1 and Figures 2 and 3",
        ("fewshot_1patient", "fewshot_10patients", *_PERCENT, "paper1"),
        _TABLE1_METHODS,
    ),
    Study("fewshot_patients", "from one training patient to all", (*_FEWSHOT, "paper1"), _TABLE1_METHODS),
    Study("fewshot_data", "from 25 % of the training patients to all", (*_PERCENT, "paper1"), _TABLE1_METHODS),
]

# All training patients: Table 1. Other protocols: read off Figure 2, to 0.1 %.
_SOURCE = "by paper 1, on LAScarQS 2022"
_CAVEAT = (
    "the paper does not state whether its means are over volumes or slices, and its abstract mentions fine-tuning the "
    "transformers that its text calls frozen"
)
PUBLISHED = {
    ("attention_unet", "paper1"): Published(_SOURCE, _CAVEAT, 79.2, 12.3, 72.1, 13.8),
    ("unet", "paper1"): Published(_SOURCE, _CAVEAT, 84.1, 8.3, 76.4, 12.8),
    ("resnet50_unet", "paper1"): Published(_SOURCE, _CAVEAT, 84.6, 13.1, 76.2, 12.1),
    ("dinov2_vitb14", "paper1"): Published(_SOURCE, _CAVEAT, 84.9, 7.2, 75.5, 6.3),
    ("dinov2_vitl14", "paper1"): Published(_SOURCE, _CAVEAT, 85.6, 5.1, 77.0, 6.0),
    ("dinov2_vitg14", "paper1"): Published(_SOURCE, _CAVEAT, 87.1, 4.8, 79.2, 5.2),
} | {
    (method, experiment): Published(f"{_SOURCE}, read off its Figure 2", _CAVEAT, dice)
    for method, values in {
        "dinov2_vitg14": (83.7, 85.0, 85.8, 66.8, 74.2),
        "dinov2_vitl14": (82.1, 83.4, 84.8, 61.2, 73.0),
        "dinov2_vitb14": (81.4, 82.8, 84.0, 59.9, 71.2),
        "resnet50_unet": (72.4, 82.7, 84.0, 31.1, 66.8),
        "unet": (78.8, 80.3, 83.1, 26.3, 58.6),
        "attention_unet": (75.5, 76.9, 78.7, 24.5, 54.8),
    }.items()
    for experiment, dice in zip((*_PERCENT, "fewshot_1patient", "fewshot_10patients"), values, strict=True)
}
