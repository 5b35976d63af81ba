"""Paper 1: DINOv2 for left-atrium segmentation (Kundu, Khanal, Simon, Linte; arXiv 2411.09598).

A frozen DINOv2 backbone, a convolutional decoder, slices at 448×448, Adam at 1e-3, 35 epochs of batches of 32, binary
cross-entropy, early stopping. Protocols: all training patients, and the first 1 and 10 of them.
"""

from jaxla.config import Data, Method, Model, Preprocessing, Training, experiment_of

RECIPE = Training(epochs=35, batch_size=32, learning_rate=1e-3, backbone_learning_rate=1e-5, patience=10)

METHODS = {
    arch: Method(arch, f"frozen DINOv2 {size}/14, paper 1's decoder", Model(arch=arch), Preprocessing(448), RECIPE)
    for arch, size in {f"dinov2_vit{letter}14": f"ViT-{letter}" for letter in "sblg"}.items()
}

_PROTOCOLS = {
    "fewshot_1patient": ("one training patient", Data(train_patients=1)),
    "fewshot_10patients": ("ten training patients", Data(train_patients=10)),
    "paper1": ("all training patients", Data()),
}

EXPERIMENTS = {
    name: experiment_of(name, summary, data, METHODS["dinov2_vitb14"]) for name, (summary, data) in _PROTOCOLS.items()
}
