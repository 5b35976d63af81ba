"""Compute features of tiny scans in a process that tests kill or hold."""

import logging
import time
from pathlib import Path

from flax import nnx

from jaxla.data.inputs import Canvas
from jaxla.models.networks.fusion import FusionDecoder, FusionSegmenter
from jaxla.models.networks.transformer_segmenter import LinearDecoder, TransformerSegmenter
from jaxla.training.features import FeatureCache
from tests.tiny import randomise, tiny_backbone
from tests.training.scans import prepared


def network(seed=0, **options):
    decoder = nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0)))
    network = TransformerSegmenter(tiny_backbone(seed, **options), randomise(decoder, 1))
    network.eval()
    return network


def fusion():
    """Return a fusion of two blocks that reads the image, too."""
    decoder = nnx.eval_shape(lambda: FusionDecoder(32, 2, (8, 4), 1, rngs=nnx.Rngs(0)))
    network = FusionSegmenter(tiny_backbone(), (0, 2), randomise(decoder, 1))
    network.eval()
    return network


def compute(scans: Path, folder: Path, held_at: int = 0) -> None:
    """Compute the features of all scans in `folder`.

    Args:
        held_at: the call of the backbone, counted from 1, at which this process creates `<folder>/held` and waits
            forever. Each call adds a line to `<folder>/calls`.
    """
    logging.basicConfig()
    logging.getLogger("jaxla").setLevel(logging.INFO)
    cache = FeatureCache(folder, network(), "tiny", Canvas(32))
    extract, calls = cache.extract, []

    def counted(images):
        calls.append(images)
        with (folder / "calls").open("a") as file:
            file.write("call\n")
        if len(calls) == held_at:
            (folder / "held").touch()
            time.sleep(600)
        time.sleep(0.05)  # so that two processes meet
        return extract(images)

    cache.extract = counted
    assert cache.features(prepared(scans)) is not None
