"""Laptop: a small U-Net for a few patients of one's own, trained from random weights in minutes without a GPU.

InstanceNorm and random changes of brightness let it read scans that are darker or brighter than those it was trained
on; the running mean of its parameters is kept instead of the epoch that one or two validation patients prefer. Nothing
is decided by validation, so few patients need none.

Command:   python -m jaxla.train --exp=laptop --data.root=/path/to/scans
Time:      10 minutes of training on any processor, plus the test; --training.minutes changes it.
Expected:  mean test Dice 0.87 per volume over 27 patients, from 12 patients in 8 minutes (docs/benchmarks.md).
"""

from jaxla.config import Augmentation, Data, Experiment, Method, Postprocessing, Preprocessing, Training
from jaxla.models.networks.unet import UNetOptions

UNET_SMALL = Method(
    "unet_small",
    "2 M U-Net with InstanceNorm, augmented; for few patients and little time",
    UNetOptions(widths=(16, 32, 64, 128, 256), norm="instance", neighbours=1),
    Preprocessing(96),
    Training(
        epochs=10,
        minutes=10,
        batch_size=16,
        foreground_fraction=0.5,
        learning_rate=3e-3,
        schedule="cosine",
        loss="dice_cross_entropy",
        patience=0,
        checkpoint="last",
        average_decay=0.99,
    ),
    Postprocessing(largest="always"),
    Augmentation(rotation=15, scale=0.15, intensity=0.4),
)

METHODS = [UNET_SMALL]

EXPERIMENTS = [Experiment("laptop", "your own scans, without a GPU, in ten minutes", Data(), UNET_SMALL)]
