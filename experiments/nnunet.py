"""nnU-Net (Isensee, Jaeger, Kohl, Petersen, Maier-Hein, Nature Methods 2021), in two and three dimensions.

It plans itself from the data and has one recipe for all: 1000 epochs of 250 steps. The short methods cut that, and are
not nnU-Net's result: they are for a first look, and for machines without a GPU.
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
_SHORT = {"nnunet_2d": (50, 25), "nnunet_3d": (25, 20)}  # epochs, and steps of each: 25 minutes of two CPU cores

_WHOLE = [
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
    *_WHOLE,
    *(
        replace(
            method,
            name=f"{method.name}_short",
            summary=f"{method.summary}; short, {epochs * steps} of 250000 steps: not nnU-Net's own result",
            training=replace(method.training, epochs=epochs, steps=steps),
        )
        for method in _WHOLE
        for epochs, steps in [_SHORT[method.name]]
    ),
]
