"""Helpers for the pages of runs and studies: templates, number formats, figures as data URIs."""

import base64
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from jaxla.cli.files import write_atomically
from jaxla.cli.terminal import plural
from jaxla.evaluation.metrics import COLUMNS
from jaxla.runs.machine import describe_device


class Pair(NamedTuple):
    """A Dice and an IoU, or means of them, that are printed side by side."""

    name: str
    dice: float
    iou: float

    @property
    def min_iou(self) -> float:
        """The lowest mean IoU that is possible with this mean Dice.

        The IoU of a mask is D/(2 − D), which is convex in D, so Jensen's inequality bounds the mean.
        """
        return self.dice / (2 - self.dice)

    @property
    def passes(self) -> bool:
        return self.iou >= self.min_iou - 1e-6  # the means may have been computed in float32


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template with these values, and write the page atomically.

    Raises:
        KeyError, jinja2.UndefinedError: the values lack something that the page shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(f"jaxla.{name}", ".") for name in ("reporting", "studies")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_metric, "mean_sd": mean_sd, "device": describe_device, "plural": plural}
    environment.filters |= {"keep_options": keep_options}
    write_atomically(path, environment.get_template(template).render(values))


def keep_options(text: object) -> Markup:
    """Return text as HTML without line breaks within option names such as `--data.root`."""
    return Markup(re.sub(r"(?<![\w-])(--[a-z][\w.-]*)", r'<span class="option">\1</span>', str(escape(text))))


def link(text: str, path: str) -> Markup:
    """Return a link to a file beside the page."""
    return Markup('<a href="{}">{}</a>').format(quote(path), text)


def format_metric(value: float | None, metric: str, sign: bool = False) -> str:
    """Format a metric's value: `0.855`, `4.89`, `−1.20`, or a dash for None."""
    if value is None:
        return "–"
    return format(value, f"{'+' if sign else ''}.{COLUMNS[metric].digits}f").replace("-", "−")


def mean_sd(summary: Mapping[str, Any], metric: str) -> str:
    """Format a metric of a summary as `0.855 ± 0.046`, or a dash if the summary does not have it."""
    if metric not in summary:
        return "–"
    return f"{format_metric(summary[metric]['mean'], metric)} ± {format_metric(summary[metric]['sd'], metric)}"


def chart(draw: Callable[[Axes], None], inches: tuple[float, float] = (4.6, 3.5)) -> str:
    """Return a figure with one set of axes as a data URI."""
    figure = Figure(figsize=inches, layout="constrained")
    draw(figure.add_subplot())
    return data_uri(figure)


def data_uri(figure: Figure) -> str:
    """Return a figure as SVG in a data URI, for an <img>. The same figure gives the same text."""
    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "jaxla", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=no_metadata)
    svg = re.sub(r"(?<=data:image/png;base64,)\s*([^\"]+)", _to_grey_png, drawn.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _to_grey_png(match: re.Match[str]) -> str:
    """Return a grey RGBA image's PNG with a single channel: the same pixels in little more than half the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(match[1])))
    compressed = io.BytesIO()
    image.getchannel("R").save(compressed, "PNG", optimize=True)
    return base64.b64encode(compressed.getvalue()).decode()
