"""What the pages of runs and of studies share: numbers of metrics, figures as data, templates."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from jaxla.cli.terminal import plural
from jaxla.evaluation.metrics import COLUMNS
from jaxla.runs.machine import describe_device


class Pair(NamedTuple):
    """A mean Dice and a mean IoU that are printed side by side."""

    name: str
    dice: float
    iou: float

    @property
    def floor(self) -> float:
        """The least mean IoU that such a mean Dice allows: IoU is D/(2 − D) of a mask, which is convex (Jensen)."""
        return self.dice / (2 - self.dice)

    @property
    def passes(self) -> bool:
        return self.iou >= self.floor - 1e-6  # counts may have been divided in single precision


def templates() -> jinja2.Environment:
    """The pages, and the filters that they print numbers with."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(f"jaxla.{name}", ".") for name in ("reporting", "studies")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "mean_sd": mean_sd, "device": describe_device, "count_of": plural}
    return environment


def number(value: float | None, metric: str, sign: bool = False) -> str:
    """`0.855`, `4.89`, `−1.20`; a dash for None."""
    if value is None:
        return "–"
    return format(value, f"{'+' if sign else ''}.{COLUMNS[metric].digits}f").replace("-", "−")


def mean_sd(summary: Mapping[str, Any], metric: str) -> str:
    """`0.855 ± 0.046`, of what `summary` says of a metric; a dash where it says nothing."""
    if metric not in summary:
        return "–"
    return f"{number(summary[metric]['mean'], metric)} ± {number(summary[metric]['sd'], metric)}"


def chart(draw: Callable[[Axes], None], inches: tuple[float, float] = (4.6, 3.5)) -> str:
    figure = Figure(figsize=inches, layout="constrained")
    draw(figure.add_subplot())
    return data_uri(figure)


def data_uri(figure: Figure) -> str:
    """A figure as SVG inside a data URI, for an <img>; the same figure gives the same text."""
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "jaxla", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"(?<=data:image/png;base64,)\s*([^\"]+)", _grey_png, drawn.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _grey_png(found: re.Match[str]) -> str:
    """The PNG of a grey image with one channel in place of four: the same pixels in little more than half the bytes."""
    image, smaller = Image.open(io.BytesIO(base64.b64decode(found[1]))), io.BytesIO()
    image.getchannel("R").save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()
