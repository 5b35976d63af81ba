"""Curves and overlays as PNG: the figures that a run leaves beside its report."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from jaxla.reporting.curves import draw_curves
from jaxla.reporting.overlays import PREDICTION, REFERENCE, draw_overlays, slice_figures
from tests.reporting.pages import SHAPE, outcome


def pixels_of(path, colour):
    """How many pixels of a PNG are within a few grey levels of a colour."""
    image = np.asarray(Image.open(path).convert("RGB"), float)
    return int((np.abs(image - 255 * np.array(to_rgb(colour))).max(axis=-1) < 30).sum())


@pytest.fixture
def panel():
    return outcome({"a1": (6, 16)})["panels"][0]


def test_overlays_outline_prediction_and_reference(panel, tmp_path):
    draw_overlays([panel, panel], tmp_path / "both.png")
    nothing = np.zeros(SHAPE, np.uint8)
    draw_overlays([panel._replace(prediction=nothing, reference=nothing)] * 2, tmp_path / "none.png")
    for colour in (PREDICTION, REFERENCE):  # the legend alone, against outlines in six slices
        assert pixels_of(tmp_path / "both.png", colour) > 20 * pixels_of(tmp_path / "none.png", colour) > 0


def test_no_slice_is_shown_twice(panel):
    thin = panel.reference.copy()
    thin[3:] = 0
    thin[1] = 0
    assert [index for index, _ in slice_figures(panel._replace(reference=thin), 4)] == [2]
    empty = panel._replace(reference=np.zeros(SHAPE, np.uint8))
    assert len({index for index, _ in slice_figures(empty, 4)}) == 4


def test_curves_replace_the_older_ones(tmp_path):
    history = outcome({"a1": (6, 16)})["history"]
    path = tmp_path / "progress.png"
    draw_curves(history[:1], "tiny", path)
    first = np.asarray(Image.open(path))
    draw_curves(history, "tiny", path)
    second = np.asarray(Image.open(path))
    assert first.shape == second.shape
    assert (first != second).any()
    assert list(tmp_path.iterdir()) == [path]
