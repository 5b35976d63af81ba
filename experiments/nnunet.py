"""nnU-Net (Isensee, Jaeger, Kohl, Petersen, Maier-Hein, Nature Methods 2021), in two and three dimensions.

It plans its network from the data and trains it with one recipe for all data: 1000 epochs of 250 steps. The `_short`
methods train for fewer steps, for a first look and for machines without a GPU. Their results are not nnU-Net's.

Command:   python -m jaxla.train --exp=paper1 --method=nnunet_2d_short --data.root=Task04_Hippocampus
Time:      18 minutes on two CPU cores. `nnunet_3d_short`: no whole run timed; 500 steps of 1.3 s each.
           `nnunet_2d` and `nnunet_3d`: not measured.
Expected:  `nnunet_2d_short` test Dice 0.851, `nnunet_3d_short` 0.823 (mean per volume, n = 12; the atlas baseline:
           0.716; 60 cases of the Decathlon's hippocampus, 42 for training, one seed).
           `nnunet_2d` and `nnunet_3d`: not measured.
"""

from dataclasses import replace

from jaxla.config import Method, Postprocessing, Training
from jaxla.nnunet.augmentation import PatchAugmentation
from jaxla.nnunet.network import NNUNetOptions

RECIPE = Training(
    epochs=1000,
    steps=250,
    batch_size=0,
    optimiser="sgd",
    learning_rate=1e-2,
    schedule="poly",
    loss="dice_cross_entropy",
    patience=0,
    checkpoint="last",
)

_CONFIGURATIONS = {"nnunet_2d": ("2D", "nnunet_2d"), "nnunet_3d": ("3D, full resolution", "nnunet_3d_fullres")}
_SHORT_RECIPES = {"nnunet_2d": (50, 25), "nnunet_3d": (25, 20)}  # epochs and steps per epoch, for two CPU cores

_FULL_LENGTH = [
    Method(
        name,
        f"nnU-Net {dimensions}: plans itself from the data",
        NNUNetOptions(arch),
        None,
        RECIPE,
        Postprocessing(largest="if_better"),
        PatchAugmentation(nnunet=True),
    )
    for name, (dimensions, arch) in _CONFIGURATIONS.items()
]

METHODS = [
    *_FULL_LENGTH,
    *(
        replace(
            method,
            name=f"{method.name}_short",
            summary=f"{method.summary}; only {epochs * steps} of 250000 steps, so not nnU-Net's own result",
            training=replace(method.training, epochs=epochs, steps=steps),
        )
        for method in _FULL_LENGTH
        for epochs, steps in [_SHORT_RECIPES[method.name]]
    ),
]
