"""The figures of a study: Dice against training patients (Figure 2), overlays (Figure 3), cost, agreement of volumes.

A method has the same colour, marker and line style in all figures. The colours also differ in brightness, so that the
figures can be read in greyscale.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, product
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jaxla.data.inputs import intensity_range
from jaxla.reporting.agreement import MIN_CASES_FOR_LIMITS, Agreement, measure_agreement
from jaxla.reporting.overlays import Panel, draw_slice, outline_legend
from jaxla.reporting.page import format_metric
from jaxla.studies.results import Results
from jaxla.studies.tables import describe_devices

# Okabe and Ito's colours, safe for colour-blind readers, ordered so that neighbours differ in brightness
COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#8C8C00", "#5E3C99", "#999999")
MARKERS = "os^Dv<P>X"  # one fewer than colours, so that a repeated colour gets a different marker
DASHES = ("-", "--", "-.", ":")
MAX_TITLE_CHARACTERS = 24  # characters per line above a column of Figure 3


class StudyFigure(NamedTuple):
    """A figure with its file name, caption and text alternative."""

    name: str
    figure: Figure
    caption: str
    alt: str


class Style(NamedTuple):
    """The appearance of a method in every figure."""

    colour: str
    marker: str
    dashes: str


Styles = Mapping[str, Style]  # by method


def choose_styles(methods: Mapping[str, str], known_methods: Sequence[str]) -> dict[str, Style]:
    """Choose a style for each method: the one at its position among all known methods, or the next free one.

    The result does not depend on the order of `methods`, title in the study -> name of the method.
    """
    styles: dict[str, Style] = {}
    for title, method in sorted(methods.items(), key=lambda item: (known_methods.index(item[1]), item[0])):
        colours = {style.colour for style in styles.values()}
        for index in count(known_methods.index(method)):
            style = Style(*(values[index % len(values)] for values in (COLOURS, MARKERS, DASHES)))
            if style.colour not in colours or (len(colours) == len(COLOURS) and style not in styles.values()):
                break
        styles[title] = style
    return styles


def draw_figures(
    results: Results, cases: Mapping[str, Sequence[Panel]], case_note: str, known_methods: Sequence[str]
) -> Iterator[StudyFigure]:
    """Draw all figures of a study.

    Args:
        cases: for Figure 3: title of each case -> a panel of each method, under the largest protocol.
        case_note: a sentence on how these cases were chosen, or "".
        known_methods: all existing methods; their order determines the styles.
    """
    styles = choose_styles({run.method: run.record.experiment.method.name for run in results.runs}, known_methods)
    if series := list_series(results):
        yield patients_figure(results, styles, series)
    yield overlay_figure(results, cases, case_note)
    yield cost_figure(results, styles)
    yield agreement_figure(results, styles)


class Series(NamedTuple):
    """The protocols along one x axis of Figure 2, ordered by their number of training patients."""

    title: str
    ticks: list[str]
    protocols: list[str]


def list_series(results: Results) -> list[Series]:
    """Return the panels of Figure 2: protocols by percentage and by number of training patients."""
    percentages, counts = {}, {}
    for protocol in results.protocols:
        data = results.select(protocol)[0].record.experiment.data
        patients = results.count_training_patients(protocol)
        if data.train_percent < 100:
            percentages[protocol] = (patients, f"{data.train_percent:g} %")
        elif data.train_patients:
            counts[protocol] = (patients, str(patients))
        else:
            percentages[protocol], counts[protocol] = (patients, "100 %"), (patients, f"all ({patients})")
    panels = {"percentage of the training patients": percentages, "training patients": counts}
    return [
        Series(title, [ticks[protocol][1] for protocol in protocols], protocols)
        for title, ticks in panels.items()
        if len(protocols := sorted(ticks, key=lambda protocol, ticks=ticks: ticks[protocol][0])) > 1
    ]


def draw_series(axes: Axes, results: Results, styles: Styles, series: Series) -> None:
    """Draw the mean Dice per volume of every method and of the atlas baseline; error bars show the sd over seeds."""
    positions = np.arange(len(series.protocols))
    offsets = 0.06 * (np.arange(len(results.methods)) - (len(results.methods) - 1) / 2)
    for offset, method in zip(offsets, results.methods, strict=True):
        means = [results.mean(protocol, method, "dice") for protocol in series.protocols]
        style = styles[method]
        axes.errorbar(
            positions + offset, [m.mean for m in means], yerr=[m.sd_over_seeds or 0 for m in means],
            color=style.colour, marker=style.marker, ls=style.dashes, ms=5, lw=1.4, capsize=2, elinewidth=0.9,
            label=method,
        )  # fmt: skip
    atlas = [results.mean(protocol, results.methods[0], "atlas_dice").mean for protocol in series.protocols]
    axes.plot(positions, atlas, color="grey", lw=1, ls=(0, (1, 2)), label="atlas baseline")
    axes.set_xticks(positions, series.ticks)
    axes.set(xlabel=series.title, ylabel="test Dice (mean per volume)")
    axes.grid(alpha=0.3)


def patients_figure(results: Results, styles: Styles, series: Sequence[Series]) -> StudyFigure:
    """Draw Figure 2: Dice against the number of training patients."""
    figure = Figure(figsize=(4.6 * len(series), 3.9), layout="constrained")
    grid = figure.subplots(1, len(series), squeeze=False, sharey=True)[0]
    for axes, axis_series in zip(grid, series, strict=True):
        draw_series(axes, results, styles, axis_series)
        axes.label_outer()
    handles, labels = grid[0].get_legend_handles_labels()  # the baseline comes first, because it is a plain line
    _legend_below(figure, [*handles[1:], handles[0]], [*labels[1:], labels[0]])
    seeds = len(results.seeds)
    caption = (
        f"Test Dice against training patients, mean over {_test_volumes(results)}; "
        + (f"error bars: sd of the mean over {seeds} seeds" if seeds > 1 else "one seed")
        + ". The atlas baseline is the mean training mask; it does not use the image."
    )
    return StudyFigure("figure2", figure, caption, "Dice against training patients for each method")


def overlay_figure(results: Results, cases: Mapping[str, Sequence[Panel]], case_note: str) -> StudyFigure:
    """Draw Figure 3: a row for each case and a column for each method, cropped around the structure."""
    figure = Figure(figsize=(2.3 * len(results.methods), 2.3 * len(cases) + 0.6), layout="compressed")
    grid = figure.subplots(len(cases), len(results.methods), squeeze=False)
    for axes, title in zip(grid[0], results.methods, strict=True):
        axes.set_title(textwrap.fill(title, MAX_TITLE_CHARACTERS), fontsize="medium")
    outline = [withStroke(linewidth=2, foreground="black")]  # keeps the text readable on bright tissue
    dice_style = {"color": "w", "fontsize": "small", "path_effects": outline}
    title_style = {"rotation": 90, "ha": "right", "va": "center", "multialignment": "center", "fontsize": "small"}
    for row, (title, panels) in zip(grid, cases.items(), strict=True):
        index = int(np.argmax(np.count_nonzero(panels[0].reference, axis=(1, 2))))
        rows, columns = _crop_limits([p.prediction[index] for p in panels] + [panels[0].reference[index]])
        for axes, panel in zip(row, panels, strict=True):
            draw_slice(axes, panel, index, intensity_range(panel.image), interpolation="none")
            axes.set(xlim=columns, ylim=rows[::-1])
            axes.text(0.03, 0.03, panel.title, transform=axes.transAxes, **dice_style)
        row[0].text(-0.04, 0.5, f"{title}\nslice {index + 1}", transform=row[0].transAxes, **title_style)
    outline_legend(figure)
    caption = (
        f"Protocol {results.largest_protocol}, seed {results.seeds[0]}: the slice with the largest reference (the "
        "first slice is 1), at the scan's resolution, cropped around the structure; prediction yellow, "
        "reference blue and dashed. Dice is that of the volume"
        f"{', averaged over classes' if len(results.classes) > 1 else ''}. {case_note}"
    )
    alt = "Outlines of prediction and reference on the scan, for each method"
    return StudyFigure("figure3", figure, caption.rstrip(), alt)


def cost_figure(results: Results, styles: Styles) -> StudyFigure:
    """Draw Dice against multiply-adds and against inference time, under the largest protocol."""
    protocol = results.largest_protocol
    means = {method: results.mean(protocol, method, "dice") for method in results.methods}
    costs = {method: results.cost(protocol, method) for method in results.methods}
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    quantities = {"multiply_adds": ("multiply-adds per slice, G", 1e9), "inference_seconds": ("seconds per volume", 1)}
    for axes, (quantity, (label, scale)) in zip(figure.subplots(1, 2, sharey=True), quantities.items(), strict=True):
        for method, mean in means.items():
            low, high = (mean.mean if end is None else end for end in (mean.ci95_low, mean.ci95_high))
            axes.errorbar(
                costs[method][quantity] / scale, mean.mean, yerr=[[mean.mean - low], [high - mean.mean]],
                color=styles[method].colour, marker=styles[method].marker, ls="", ms=7, capsize=2, elinewidth=0.9,
                label=method,
            )  # fmt: skip
        axes.set(xlabel=label, ylabel="test Dice (mean per volume)", xscale="log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 2, high * 2)  # wide enough for a tick at 1, 2 or 5
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.label_outer()
    _legend_below(figure, *axes.get_legend_handles_labels())
    caption = (
        f"Protocol {protocol}: test Dice against cost, mean over {_test_volumes(results)}"
        f"{' with 95 % bootstrap interval' if len(results.test_cases) > 1 else ''}. "
        f"Device: {describe_devices(results, protocol)}."
    )
    return StudyFigure("cost", figure, caption, "Dice against cost for each method")


def agreement_figure(results: Results, styles: Styles) -> StudyFigure:
    """Draw a Bland-Altman plot of each method under the largest protocol; with several classes, a row for each."""
    protocol, methods, classes = results.largest_protocol, results.methods, results.classes
    is_multiclass = len(classes) > 1
    columns = len(methods) if is_multiclass else min(3, len(methods))
    rows = len(classes) if is_multiclass else -(-len(methods) // columns)
    figure = Figure(figsize=((2.7 if is_multiclass else 3.4) * columns, 2.9 * rows + 0.4), layout="constrained")
    shared = "row" if is_multiclass else "all"
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    for axes in grid.flat[len(methods) * len(classes) :]:
        axes.set_axis_off()
    for axes, (class_name, method) in zip(grid.flat, product(classes, methods), strict=False):
        predicted, reference = (
            results.seed_values(protocol, method, metric, class_name=class_name).mean(axis=0)
            for metric in ("volume_ml", "reference_volume_ml")
        )
        agreement = measure_agreement(class_name, predicted, reference)
        _draw_bland_altman(axes, agreement, styles[method])
        axes.set_title(f"{method}\n{_describe(agreement)}", fontsize="small")
        ylabel = "prediction − reference, ml"
        axes.set(xlabel="mean of both volumes, ml", ylabel=f"{class_name}\n{ylabel}" if is_multiclass else ylabel)
        axes.label_outer(remove_inner_ticks=False)
        if is_multiclass:
            axes.tick_params(labelbottom=True)
    lines = "dashed lines: limits of agreement (bias ± 1.96 sd)"
    n = len(results.test_cases)
    if n < MIN_CASES_FOR_LIMITS:
        lines = f"limits of agreement need at least {MIN_CASES_FOR_LIMITS} cases"
    caption = f"Protocol {protocol}, n = {n} test volumes, each averaged over seeds. Solid line: bias; {lines}."
    return StudyFigure("agreement", figure, caption, "Bland-Altman plots for each method")


def _draw_bland_altman(axes: Axes, agreement: Agreement, style: Style) -> None:
    mean, difference = (agreement.predicted + agreement.reference) / 2, agreement.predicted - agreement.reference
    axes.plot(mean, difference, style.marker, color=style.colour, ms=4)
    axes.axhline(0, color="grey", lw=0.8, ls=":")
    axes.axhline(agreement.bias, color="black", lw=1)
    for limit in agreement.limits or ():
        axes.axhline(limit, color="grey", lw=0.9, ls="--")
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)


def _describe(agreement: Agreement) -> str:
    """Return `bias −0.12 ml, limits −0.60 to +0.36 ml`."""
    values = (agreement.bias, *(agreement.limits or ()))
    bias, *limits = (format_metric(value, "volume_ml", sign=True) for value in values)
    return f"bias {bias}" + (f", limits {' to '.join(limits)}" if limits else "") + " ml"


def _test_volumes(results: Results) -> str:
    return f"{len(results.test_cases)} volumes{' and classes' if len(results.classes) > 1 else ''}"


def _legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Put a legend below the figure, in rows of equal length, as few as its width allows."""
    inches = 0.65 + 0.09 * max(map(len, labels))  # line and gap, plus the average width of each letter
    rows = -(-len(labels) // max(1, int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // rows), frameon=False)


def _crop_limits(masks: Sequence[np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the axis limits of rows and columns for a square twice as wide as the union of masks, within the slice."""
    union = np.any([mask > 0 for mask in masks], axis=0)
    if not union.any():
        union = np.ones_like(union)
    spans = [np.flatnonzero(union.any(axis=axis)) for axis in (1, 0)]
    half = max(span[-1] - span[0] + 1 for span in spans)
    centres = [(span[0] + span[-1]) / 2 for span in spans]
    rows, columns = (
        (max(-0.5, centre - half), min(size - 0.5, centre + half))
        for centre, size in zip(centres, union.shape, strict=True)
    )
    return rows, columns
