"""The whole pipeline in two minutes on a laptop: small phantoms, a small transformer trained from random weights."""

from jaxla.config import Data, Method, Model, Preprocessing, Training, experiment_of

METHODS = {
    "vit_mini8": Method(
        "vit_mini8",
        "3 M transformer trained from random weights, paper 1's decoder made small",
        Model("vit_mini8", weights="random", backbone="finetuned", decoder_widths=(96, 64, 32, 16)),
        Preprocessing(112),
        Training(epochs=20, batch_size=16, learning_rate=1e-3, backbone_learning_rate=1e-3, schedule="cosine"),
    )
}

EXPERIMENTS = {
    "quickstart": experiment_of("quickstart", "small phantoms", Data(root="phantom"), METHODS["vit_mini8"]),
}
