"""The figures of a study: Dice over training patients (Figure 2), overlays (Figure 3), cost, agreement of volumes.

A method has one colour, marker and line style in all of them, and the colours differ in brightness too, so that a grey
print can be read.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import count, product
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jaxla.reporting.agreement import FEWEST_FOR_LIMITS, Agreement, volume_agreement
from jaxla.reporting.overlays import PREDICTION, REFERENCE, Panel, draw_slice, grey_window
from jaxla.studies.results import Results
from jaxla.studies.tables import cost_of, largest_protocol

# Okabe and Ito's colours, which the colour-blind tell apart, in an order in which neighbours differ in brightness
COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#8C8C00", "#5E3C99", "#999999")
MARKERS = "os^Dv<P>X"  # one fewer than colours, so that a colour that comes again has another one
DASHES = ("-", "--", "-.", ":")
TITLE_LETTERS = 24  # as many as stand above a column of Figure 3


class Style(NamedTuple):
    """How a method looks in every figure."""

    colour: str
    marker: str
    dashes: str


Styles = Mapping[str, Style]  # by method


def styles_of(methods: Mapping[str, str], known: Sequence[str]) -> dict[str, Style]:
    """A look for each method of a study: that of its place among all known ones, or the next that is free.

    The order of the methods does not change it.

    Args:
        methods: by what they are called in the study.
    """
    styles: dict[str, Style] = {}
    for called, method in sorted(methods.items(), key=lambda both: (known.index(both[1]), both[0])):
        colours = {style.colour for style in styles.values()}
        all_colours_taken = len(colours) == len(COLOURS)
        styles[called] = next(
            look
            for look in map(_look, count(known.index(method)))
            if (look not in styles.values() if all_colours_taken else look.colour not in colours)
        )
    return styles


def _look(place: int) -> Style:
    return Style(*(of[place % len(of)] for of in (COLOURS, MARKERS, DASHES)))


class Series(NamedTuple):
    """One panel of Figure 2.

    Attributes:
        title: of its x axis.
        ticks: label of each protocol.
        protocols: in order of their training patients.
    """

    title: str
    ticks: list[str]
    protocols: list[str]


def series_of(results: Results) -> list[Series]:
    """The panels of Figure 2 that these protocols make: by share and by number of the training patients."""
    shares, counts = {}, {}
    for protocol in results.protocols:
        run = results.of(protocol, results.methods[0])[0]
        data, patients = run.record.experiment.data, len(run.split["train"])
        if data.train_percent < 100:
            shares[protocol] = (patients, f"{data.train_percent:g} %")
        elif data.train_patients:
            counts[protocol] = (patients, str(patients))
        else:
            shares[protocol], counts[protocol] = (patients, "100 %"), (patients, f"all ({patients})")
    found = []
    for title, of_panel in (("share of the training patients", shares), ("training patients", counts)):
        if len(of_panel) > 1:
            ordered = sorted(of_panel, key=lambda protocol: of_panel[protocol][0])
            found.append(Series(title, [of_panel[protocol][1] for protocol in ordered], ordered))
    return found


def draw_series(axes: Axes, results: Results, styles: Styles, series: Series) -> None:
    """Mean Dice per volume of every method, with the spread over seeds, above the atlas."""
    places = np.arange(len(series.protocols))
    spread = 0.06 * (np.arange(len(results.methods)) - (len(results.methods) - 1) / 2)
    for offset, method in zip(spread, results.methods, strict=True):
        means = [results.mean(protocol, method, "dice") for protocol in series.protocols]
        style = styles[method]
        axes.errorbar(
            places + offset, [m.mean for m in means], yerr=[m.sd_over_seeds or 0 for m in means], color=style.colour,
            marker=style.marker, ls=style.dashes, ms=5, lw=1.4, capsize=2, elinewidth=0.9, label=method,
        )  # fmt: skip
    atlas = [results.mean(protocol, results.methods[0], "atlas_dice").mean for protocol in series.protocols]
    axes.plot(places, atlas, color="grey", lw=1, ls=(0, (1, 2)), label="atlas")
    axes.set_xticks(places, series.ticks)
    axes.set(xlabel=series.title, ylabel="test Dice (mean per volume)")
    axes.grid(alpha=0.3)


def draw_figure2(results: Results, styles: Styles, panels: Sequence[Series]) -> Figure:
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, series in zip(grid, panels, strict=True):
        draw_series(axes, results, styles, series)
        axes.label_outer()
    handles, labels = grid[0].get_legend_handles_labels()
    _legend_below(figure, [*handles[1:], handles[0]], [*labels[1:], labels[0]])
    return figure


def draw_figure3(cases: Mapping[str, Sequence[Panel]], titles: Sequence[str]) -> Figure:
    """One row a case, one column a method: the slice with the largest reference, cut to the structure's surroundings.

    Args:
        cases: for each case, named with what is to be said of it, a panel of each method.
        titles: of the columns.
    """
    figure = Figure(figsize=(2.3 * len(titles), 2.3 * len(cases) + 0.6), layout="compressed")
    grid = figure.subplots(len(cases), len(titles), squeeze=False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(textwrap.fill(title, TITLE_LETTERS), fontsize="medium")
    for row, (name, panels) in zip(grid, cases.items(), strict=True):
        index = int(np.argmax(np.count_nonzero(panels[0].reference, axis=(1, 2))))
        rows, columns = _surroundings([p.prediction[index] for p in panels] + [panels[0].reference[index]])
        for axes, panel in zip(row, panels, strict=True):
            draw_slice(axes, panel, index, grey_window(panel), interpolation="none", reference_dashes="--")
            axes.set(xlim=columns, ylim=rows[::-1])
            shade = [withStroke(linewidth=2, foreground="black")]  # so that it can be read on white tissue too
            axes.text(
                0.03, 0.03, panel.title, transform=axes.transAxes, color="w", fontsize="small", path_effects=shade
            )
        said = name.replace(": ", "\n") + f"\nslice {index + 1}"
        row[0].text(
            -0.04, 0.5, said, transform=row[0].transAxes, rotation=90, ha="right", va="center",
            multialignment="center", fontsize="small",
        )  # fmt: skip
    handles = [
        Line2D([], [], color=PREDICTION, label="prediction"),
        Line2D([], [], color=REFERENCE, ls="--", label="reference"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_cost(results: Results, styles: Styles) -> Figure:
    """Dice over multiply-adds and over seconds of inference, under the protocol of most training patients."""
    protocol = largest_protocol(results)
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    quantities = {
        "multiply_adds": ("multiply-adds of a slice, G", 1e-9),
        "inference_seconds": ("seconds of inference a volume", 1.0),
    }
    for axes, (quantity, (label, factor)) in zip(figure.subplots(1, 2, sharey=True), quantities.items(), strict=True):
        for method in results.methods:
            cost, mean, style = (
                cost_of(results, protocol, method),
                results.mean(protocol, method, "dice"),
                styles[method],
            )
            low, high = mean.interval or (mean.mean, mean.mean)
            axes.errorbar(
                cost[quantity] * factor, mean.mean, yerr=[[mean.mean - low], [high - mean.mean]], color=style.colour,
                marker=style.marker, ls="", ms=7, capsize=2, elinewidth=0.9, label=method,
            )  # fmt: skip
        axes.set(xlabel=label, ylabel="test Dice (mean per volume)", xscale="log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 2, high * 2)  # room for a tick at 1, 2 or 5
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.label_outer()
    handles, labels = axes.get_legend_handles_labels()
    _legend_below(figure, handles, labels)
    return figure


def draw_agreement(results: Results, styles: Styles) -> Figure:
    """Bland and Altman's plot of each method, under the protocol of most training patients; of several classes a row
    of plots for each."""
    protocol, methods, classes = largest_protocol(results), results.methods, results.classes
    several = len(classes) > 1
    across = len(methods) if several else min(3, len(methods))
    down = len(classes) if several else -(-len(methods) // across)
    figure = Figure(figsize=((2.7 if several else 3.4) * across, 2.9 * down + 0.4), layout="constrained")
    shared = "row" if several else "all"
    grid = figure.subplots(down, across, squeeze=False, sharex=shared, sharey=shared)
    for axes in grid.flat[len(methods) * len(classes) :]:
        axes.set_axis_off()
    agreements = {method: volume_agreement(mean_volumes(results, protocol, method)) for method in methods}
    for axes, (of_class, method) in zip(grid.flat, product(range(len(classes)), methods), strict=False):
        agreement = agreements[method][of_class]
        mean, difference = (agreement.predicted + agreement.reference) / 2, agreement.predicted - agreement.reference
        axes.plot(mean, difference, styles[method].marker, color=styles[method].colour, ms=4)
        axes.axhline(0, color="grey", lw=0.8, ls=":")
        axes.axhline(agreement.bias, color="black", lw=1)
        for limit in agreement.limits or ():
            axes.axhline(limit, color="grey", lw=0.9, ls="--")
        axes.set_title(f"{method}\n{describe(agreement)}", fontsize="small")
        ylabel = "prediction − reference, ml"
        axes.set(xlabel="mean of both volumes, ml", ylabel=f"{agreement.name}\n{ylabel}" if several else ylabel)
        axes.grid(alpha=0.3)
        axes.label_outer(remove_inner_ticks=False)
        axes.margins(y=0.12)
        if several:
            axes.tick_params(labelbottom=True)
    return figure


def describe(agreement: Agreement) -> str:
    """`bias −0.12 ml, limits −0.60 to +0.36 ml`."""
    values = [f"{value:+.2f}".replace("-", "−") for value in (agreement.bias, *(agreement.limits or ()))]
    return f"bias {values[0]}" + (f", limits {' to '.join(values[1:])}" if agreement.limits else "") + " ml"


def describe_agreement(results: Results) -> str:
    """The caption of Bland and Altman's plots."""
    n = results.mean(results.protocols[0], results.methods[0], "dice").n
    lines = "Full line: bias" + (
        "; dashed: limits of agreement, bias ± 1.96 sd" if n >= FEWEST_FOR_LIMITS
        else f"; limits of agreement are given from {FEWEST_FOR_LIMITS} cases on"
    )  # fmt: skip
    return f"Protocol {largest_protocol(results)}, n = {n} test volumes, each averaged over seeds. {lines}."


def mean_volumes(results: Results, protocol: str, method: str) -> list[dict[str, object]]:
    """Rows of case and class with predicted and reference volume in ml, averaged over seeds."""
    runs = results.of(protocol, method)
    return [
        {
            "case": rows[0]["case"],
            "class": rows[0]["class"],
            **{key: float(np.mean([row[key] for row in rows])) for key in ("volume_ml", "reference_volume_ml")},
        }
        for rows in zip(*(run.rows for run in runs), strict=True)
    ]


def _legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """In as few rows as the figure's width allows, of equal length."""
    widest = 0.65 + 0.09 * max(map(len, labels))  # inches: the line and the gap, and so much a letter
    rows = -(-len(labels) // max(1, int(figure.get_figwidth() / widest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // rows), frameon=False)


def _surroundings(masks: Sequence[np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rows and columns, as limits of axes, of a square twice as wide as the masks together, within the slice."""
    any_of = np.any([mask > 0 for mask in masks], axis=0)
    height, width = any_of.shape
    if not any_of.any():
        return (-0.5, height - 0.5), (-0.5, width - 0.5)
    spans = [np.flatnonzero(any_of.any(axis=axis)) for axis in (1, 0)]
    half = max(span[-1] - span[0] + 1 for span in spans)
    limits = []
    for span, size in zip(spans, (height, width), strict=True):
        middle = (span[0] + span[-1]) / 2
        limits.append((max(-0.5, middle - half), min(size - 0.5, middle + half)))
    return limits[0], limits[1]
