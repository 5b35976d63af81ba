"""Quickstart: the whole pipeline on small phantoms, with a small transformer trained from random weights.

With --data.root=/path/to/scans it trains laptop.py's small U-Net instead, for ten minutes.

Command:   python -m jaxla.train --exp=quickstart
Time:      about two minutes and 1 GB of memory on two CPU cores.
Expected:  test Dice 0.851, IoU 0.742 (mean per volume, n = 6 phantoms; the atlas baseline: Dice 0.515).
"""

from jaxla.experiments.laptop import UNET_SMALL

from jaxla.config import BackboneTraining, Data, Experiment, Method, Preprocessing
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions

_VIT_MINI8 = Method(
    "vit_mini8",
    "1M-parameter transformer trained from random weights, with a small version of paper 1's decoder",
    TransformerSegmenterOptions("vit_mini8", weights="random", backbone="finetuned", decoder_widths=(64, 32, 16)),
    Preprocessing(96),
    BackboneTraining(epochs=4, batch_size=8, learning_rate=1e-3, schedule="cosine"),
)

METHODS = [_VIT_MINI8]

EXPERIMENTS = [
    Experiment(
        "quickstart",
        "synthetic scans: a check that everything works; with --data.root your own scans, as in laptop",
        Data(root="phantom", phantom_size="small", phantom_cases=32),
        _VIT_MINI8,
        own_scans_method=UNET_SMALL,
    )
]
