"""Laptop: a small U-Net for a few patients of your own, trained from random weights in minutes without a GPU.

InstanceNorm and random changes of brightness make it robust to scans that are darker or brighter than the training
scans. The loss gives missed pixels more weight than surplus ones, because a network trained on few patients makes masks
that are too small. Training keeps an exponential moving average of the parameters instead of the best epoch on one or
two validation patients. No decision depends on validation, so a small data set needs no validation patients.

Command:   python -m jaxla.train --exp=laptop --data.root=/path/to/scans
Time:      10 minutes of training on any processor, plus testing; --training.minutes changes it.
Expected:  mean test Dice 0.885 per volume over 27 patients, trained on 12 patients for 8 minutes (docs/benchmarks.md).
"""

from jaxla.config import Augmentation, Data, Experiment, Method, Postprocessing, Preprocessing, Training
from jaxla.models.networks.unet import UNetOptions

UNET_SMALL = Method(
    "unet_small",
    "2M-parameter U-Net with InstanceNorm and augmentation, for few patients and little time",
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
        false_negative_weight=0.7,
        patience=0,
        checkpoint="last",
        average_decay=0.99,
    ),
    Postprocessing(largest="always"),
    Augmentation(rotation=15, scale=0.15, intensity=0.4, elastic=3),
)

METHODS = [UNET_SMALL]

EXPERIMENTS = [Experiment("laptop", "your own scans, without a GPU, in ten minutes", Data(), UNET_SMALL)]
