"""Compute features of tiny scans in a process that tests pause and kill."""

import logging
import time
from pathlib import Path

from flax import nnx

from jaxla.data.inputs import Canvas
from jaxla.models.networks.fusion import FusionDecoder, FusionSegmenter
from jaxla.models.networks.transformer_segmenter import LinearDecoder, TransformerSegmenter
from jaxla.training.features import FeatureCache
from tests.tiny import randomise, tiny_backbone
from tests.training.scans import prepare_scans


def make_network(seed=0, **options):
    decoder = nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0)))
    network = TransformerSegmenter(tiny_backbone(seed, **options), randomise(decoder, 1))
    network.eval()
    return network


def make_fusion():
    """Return a fusion of two blocks that also reads the image."""
    decoder = nnx.eval_shape(lambda: FusionDecoder(32, 2, (8, 4), 1, rngs=nnx.Rngs(0)))
    network = FusionSegmenter(tiny_backbone(), (0, 2), randomise(decoder, 1))
    network.eval()
    return network


def compute_features(scans: Path, folder: Path, pause_at: int = 0) -> None:
    """Compute the features of all scans in `folder`.

    Args:
        pause_at: the call of the backbone, counted from 1, at which this process creates `<folder>/paused` and sleeps
            until it is killed, for at most 600 s. Each call adds a line to `<folder>/calls`.
    """
    logging.basicConfig()
    logging.getLogger("jaxla").setLevel(logging.INFO)
    cache = FeatureCache(folder, make_network(), "tiny", Canvas(32))
    extract, calls = cache.extract, []

    def extract_and_count(images):
        calls.append(images)
        with (folder / "calls").open("a") as file:
            file.write("call\n")
        if len(calls) == pause_at:
            (folder / "paused").touch()
            time.sleep(600)
        time.sleep(0.05)  # so that two processes overlap
        return extract(images)

    cache.extract = extract_and_count
    assert cache.features(prepare_scans(scans)) is not None
