"""Paper 3: from 2D DINOv3 features to 3D segmentation (Usman, Khan, Qasim Syed; arXiv 2602.23962), and its ablations.

A frozen DINOv3, a depth embedding, a light 3D decoder that runs window by window, and one loss on the whole volume,
whose gradient is computed in two passes. The paper segments the hippocampus of neonatal brains (ALBERT). The recipe
and the details of the decoder, which it leaves open, are this package's choice (docs/paper3.md).

Command:   python -m jaxla.train --exp=paper3_hippocampus --method=windows_vit_mini8 --data.root=Task04_Hippocampus
Time:      13 minutes on two busy CPU cores. Methods on a frozen DINOv3 or DINOv2: not measured.
Expected:  test Dice 0.864 ± 0.027 (both parts together; mean per volume, n = 12; the atlas baseline: 0.737; 60 cases,
           42 for training, one seed). Methods on a frozen DINOv3 or DINOv2: not measured; the paper's own number is in
           PUBLISHED below.
"""

from dataclasses import replace

from jaxla.config import Data, Experiment, Method, Preprocessing, Published, Study, VolumeTraining
from jaxla.models.networks.windows import WindowOptions

RECIPE = VolumeTraining(
    epochs=60,
    batch_size=1,
    learning_rate=1e-3,
    backbone_learning_rate=1e-5,
    schedule="cosine",
    loss="dice_cross_entropy",
    gradient="two_pass",
    patience=15,
)
WIDTHS = (128, 64, 32, 16)

_WINDOWS = {
    name: Method(
        f"windows_{name}",
        f"frozen {family} {size}, a 3D decoder on whole volumes, two-pass training",
        WindowOptions(name, decoder_widths=WIDTHS),
        Preprocessing(224),
        RECIPE,
    )
    for name, family, size in (
        ("dinov3_vits16", "DINOv3", "ViT-S/16"),
        ("dinov3_vitb16", "DINOv3", "ViT-B/16"),
        ("dinov3_vitl16", "DINOv3", "ViT-L/16"),
        ("dinov2_vitb14", "DINOv2", "ViT-B/14"),
    )
}
_SMALL = Method(
    "windows_vit_mini8",
    "1M-parameter transformer trained from random weights, with a small version of paper 3's decoder",
    WindowOptions("vit_mini8", weights="random", backbone="finetuned", decoder_widths=(64, 32, 16, 16)),
    Preprocessing(64),
    replace(RECIPE, epochs=30),
)

_FULL = _WINDOWS["dinov3_vits16"]
_ABLATIONS = {
    "2windows": ("two windows along the slices", {"windows": "2"}),
    "8windows": ("2×2×2 windows", {"windows": "2x2x2"}),
    "no_depth": ("without depth embedding", {"depth_places": 0}),
    "2d": ("slice by slice, without depth embedding", {"convolutions": "2d", "depth_places": 0}),
}
_ABLATED = [
    replace(
        _FULL, name=f"{_FULL.name}_{name}", summary=f"{_FULL.name}, {summary}", model=replace(_FULL.model, **options)
    )
    for name, (summary, options) in _ABLATIONS.items()
]
_ONE_GRAPH = replace(
    _FULL,
    name=f"{_FULL.name}_one_graph",
    summary=f"{_FULL.name}, with its gradient in one pass, which needs the memory of all windows",
    training=replace(RECIPE, gradient="whole"),
)
METHODS = [_FULL, *_ABLATED, _ONE_GRAPH, *(method for method in _WINDOWS.values() if method is not _FULL), _SMALL]

_HIPPOCAMPUS = Data(labels="hippocampus:1,2")
EXPERIMENTS = [
    Experiment(
        "paper3_hippocampus", "Decathlon hippocampus, both parts together", _HIPPOCAMPUS, _WINDOWS["dinov3_vitb16"]
    ),
    Experiment(
        "paper3_albert",
        "neonatal brains (ALBERT): the hippocampus, all other labels are background",
        replace(_HIPPOCAMPUS, other_labels="background"),
        _WINDOWS["dinov3_vitb16"],
    ),
    Experiment("paper3_left_atrium", "left atrium (LAScarQS 2022)", Data(), _WINDOWS["dinov3_vitb16"]),
]

STUDIES = [
    Study(
        "paper3_ablation",
        "paper 3's network with one part varied at a time: windows, depth embedding, 3D convolutions",
        ("paper3_hippocampus",),
        (*(method.name for method in _ABLATED), _FULL.name),
    ),
]

PUBLISHED = {
    ("windows_dinov3_vitb16", "paper3_albert"): Published(
        "by paper 3, for the hippocampus in ALBERT, with a single window",
        "the paper does not state the size of its transformer, or whether its mean is over volumes or slices",
        65.0,
    ),
}
