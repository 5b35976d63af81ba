"""The figures of a run: overlays, curves and block weights."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from jaxla.reporting.charts import draw_block_weights, draw_curves
from jaxla.reporting.overlays import PREDICTION, REFERENCE, draw_overlays, slice_figures
from tests.reporting.pages import SHAPE, make_outcome


def count_pixels(path, colour):
    """Return how many pixels of a PNG are close to a colour."""
    image = np.asarray(Image.open(path).convert("RGB"), float)
    return int((np.abs(image - 255 * np.array(to_rgb(colour))).max(axis=-1) < 30).sum())


@pytest.fixture
def panel():
    return make_outcome({"a1": (6, 16)})["panels"][0]


def test_overlays_outline_prediction_and_reference(panel, tmp_path):
    draw_overlays([panel, panel], tmp_path / "both.png")
    empty = np.zeros(SHAPE, np.uint8)
    draw_overlays([panel._replace(prediction=empty, reference=empty)] * 2, tmp_path / "none.png")
    for colour in (PREDICTION, REFERENCE):  # without outlines, only the legend has these colours
        assert count_pixels(tmp_path / "both.png", colour) > 20 * count_pixels(tmp_path / "none.png", colour) > 0


def test_no_slice_is_repeated(panel):
    thin = panel.reference.copy()
    thin[3:] = 0
    thin[1] = 0
    assert [index for index, _ in slice_figures(panel._replace(reference=thin), 4)] == [2]
    empty = panel._replace(reference=np.zeros(SHAPE, np.uint8))
    assert len({index for index, _ in slice_figures(empty, 4)}) == 4


def test_curves_replace_an_older_file(tmp_path):
    history = make_outcome({"a1": (6, 16)})["history"]
    path = tmp_path / "progress.png"
    draw_curves(history[:1], "tiny", path)
    first = np.asarray(Image.open(path))
    draw_curves(history, "tiny", path)
    second = np.asarray(Image.open(path))
    assert first.shape == second.shape
    assert (first != second).any()
    assert list(tmp_path.iterdir()) == [path]


def draw(weights):
    axes = Figure().subplots()
    draw_block_weights(axes, weights)
    return axes


def test_block_weights_are_drawn_by_block_and_level_with_the_coarsest_on_top():
    axes = draw({"blocks": [2, 5, 11], "levels": [[0.2, 0.3, 0.5], [0.0, 0.125, 0.875]]})
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0.5, 0.5): ".200", (1.5, 0.5): ".300", (2.5, 0.5): ".500",
        (0.5, 1.5): ".000", (1.5, 1.5): ".125", (2.5, 1.5): ".875",
    }  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "5", "11"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tokens", "×2"]
    assert axes.yaxis_inverted()
    np.testing.assert_array_equal(axes.collections[0].get_array(), [[0.2, 0.3, 0.5], [0.0, 0.125, 0.875]])


def test_block_weights_of_forty_blocks_are_drawn_without_numbers():
    axes = draw({"blocks": list(range(40)), "levels": np.full((5, 40), 1 / 40).tolist()})
    assert not axes.texts
    assert axes.collections[0].get_array().shape == (5, 40)
    assert draw({"blocks": [11], "levels": [[1.0]]}).texts[0].get_text() == "1.000"
