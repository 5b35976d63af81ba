"""The whole pipeline in two minutes on a laptop: small phantoms, a small transformer trained from random weights."""

from jaxla.config import BackboneTraining, Data, Experiment, Method, Preprocessing
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions

_VIT_MINI8 = Method(
    "vit_mini8",
    "1 M transformer trained from random weights, paper 1's decoder made small",
    TransformerSegmenterOptions("vit_mini8", weights="random", backbone="finetuned", decoder_widths=(64, 32, 16)),
    Preprocessing(96),
    BackboneTraining(epochs=4, batch_size=8, learning_rate=1e-3, schedule="cosine"),
)

METHODS = [_VIT_MINI8]

EXPERIMENTS = [
    Experiment(
        "quickstart",
        "synthetic scans, or your own: see that all of it works",
        Data(root="phantom", phantom_size="small", phantom_cases=32),
        _VIT_MINI8,
    )
]
