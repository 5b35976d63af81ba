"""A run's report: one HTML file that shows what was done and how good it is, and needs nothing but itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxla.cli.command_line import strip_run_options
from jaxla.cli.files import write_atomically
from jaxla.evaluation.metrics import COLUMNS
from jaxla.evaluation.summary import group_rows
from jaxla.reporting.agreement import FEWEST_FOR_LIMITS, draw_volumes, volume_agreement
from jaxla.reporting.block_weights import draw_block_weights
from jaxla.reporting.curves import draw_losses, draw_validation
from jaxla.reporting.overlays import PREDICTION, REFERENCE, SLICES_PER_CASE, Panel, slice_figures
from jaxla.reporting.page import Pair, chart, data_uri, templates
from jaxla.runs.record import format_value


def write_report(
    path: Path,
    *,
    record: Mapping[str, Any],
    split: Mapping[str, Sequence[str]],
    history: Sequence[Mapping[str, float]],
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    cost: Mapping[str, Any],
    panels: Sequence[Panel],
    unread: Collection[str] = (),
    counted: str = "per volume",
    folds: Sequence[Mapping[str, Any]] = (),
    largest: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write a run's report; it takes its name only when it is whole.

    Args:
        path: of the HTML file.
        record: the content of `experiment.json`.
        split: the content of `split.json`: case ids of train, val, test, and unused where there are any.
        history: the lines of `metrics.jsonl`.
        rows: the rows of `test/cases.csv`: one per test case and class, numbers as numbers.
        summary: the content of `test/summary.json`.
        cost: the content of `cost.json`.
        panels: the cases to show, arrays [S, H, W], spacing in mm.
        unread: options that the run did not read, and that are not listed.
        counted: what the Dice of an epoch is of.
        folds: of cross-validation, of each fold its folder's name and what is known of the epoch that was kept.
        largest: names of the structures of which the largest connected part alone was kept, in groups; None where that
            was not tried.

    Raises:
        KeyError, jinja2.UndefinedError: something that the report shows is missing from what it was given.
    """
    template = templates().get_template("run_report.html.jinja")
    cases, left_out = _cases(rows), {"name", "summary", *unread}
    best = next((line for line in history if line["epoch"] == summary.get("best_epoch")), None)
    experiment, kept = record["experiment"], record["experiment"]["training"]["checkpoint"]
    page = template.render(
        record=record,
        experiment=record["experiment"],
        method=record["label"],
        classes=list(summary["classes"]),
        split=split,
        history=history,
        best=best,
        minutes=sum(line["seconds"] for line in history) / 60,
        costs=_costs(cost, history),
        summary=summary,
        results=_results(summary),
        pairs=_pairs(summary, best, counted),
        row_pairs=_row_pairs(rows),
        cases=cases,
        above_atlas=sum(_mean(case, "dice") > _mean(case, "atlas_dice") for case in cases),
        agreement=volume_agreement(rows),
        fewest_for_limits=FEWEST_FOR_LIMITS,
        kept=kept,
        counted=counted,
        folds=folds,
        losses=chart(lambda axes: draw_losses(axes, history)) if history else "",
        validation=chart(lambda axes: draw_validation(axes, history, best, counted, kept)) if history else "",
        block_weights=_block_weights(summary),
        volumes=chart(lambda axes: draw_volumes(axes, rows), (4.2, 4)),
        panels=[(panel, [(i, data_uri(f)) for i, f in slice_figures(panel, SLICES_PER_CASE)]) for panel in panels],
        colours={"prediction": PREDICTION, "reference": REFERENCE},
        options=[(name, format_value(v)) for name, v in flatten(experiment).items() if name not in left_out],
        repeat=strip_run_options(record["command"]),
        titles={name: metric.title for name, metric in COLUMNS.items()},
        unread=unread,
        largest=largest,
        definitions=summary["definitions"] | summary["slice"]["definitions"],
    )
    write_atomically(path, page)


def _block_weights(summary: Mapping[str, Any]) -> str:
    """The figure of what a fusion's blocks weigh; empty for other networks."""
    if "block_weights" not in summary:
        return ""
    inches = (max(4.6, 1.6 + 0.42 * min(len(summary["block_weights"]["blocks"]), 20)), 3.2)
    return chart(lambda axes: draw_block_weights(axes, summary["block_weights"]), inches)


def _results(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the table of results holds: over all classes, and of each class where there are several.

    A block is a title and, in the order of the table's columns, summaries {metric: mean, sd, n, unit}.
    """
    columns = {"volume": summary, "atlas": summary["atlas"], "slice": summary["slice"]}
    blocks = [{"title": "Mean over classes", **columns}]
    if len(summary["classes"]) > 1:
        blocks += [
            {"title": name, **{column: content["classes"][name] for column, content in columns.items()}}
            for name in summary["classes"]
        ]
    return blocks


def _costs(cost: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """What the run cost, in words."""
    volumes, slices = len(cost["inference_seconds"]), sum(cost["inference_slices"])
    parameters, trained = cost["parameters"] / 1e6, cost["trained_parameters"] / 1e6
    lines = [
        ("Parameters", f"{parameters:.1f} M, of which {trained:.1f} M are trained"),
        ("Multiply-adds", f"{cost['multiply_adds'] / 1e9:.2f} G for one slice"),
        (
            "Inference",
            f"{np.mean(cost['inference_seconds']):.2f} s a volume of {slices / volumes:.0f} slices, from the scan in "
            f"memory to its mask (mean, n = {volumes} {'volume' if volumes == 1 else 'volumes'})",
        ),
    ]
    if history:
        seconds, memory = np.mean([line["seconds"] for line in history]), cost["step_bytes"] / 1e9
        lines.insert(2, ("Training", f"{seconds:.1f} s an epoch, validation included"))
        taken = f"{memory:.2f} GB, {cost['step_slices']} slices, by XLA's account"
        lines.append(("Memory of a training step", taken))
    for name, place in (("peak_host_bytes", "the process on the host"), ("peak_device_bytes", "the device")):
        if cost[name] is not None:
            lines.append((f"Peak memory of {place}", f"{cost[name] / 1e9:.2f} GB"))
    return lines


def _pairs(summary: Mapping[str, Any], best: Mapping[str, float] | None, counted: str) -> list[Pair]:
    """Every pair of mean Dice and mean IoU that the report prints."""
    names = {"volume": "Test, per volume", "atlas": "Atlas, per volume", "slice": "Test, per slice"}
    pairs = []
    for block in _results(summary):
        for column, name in names.items():
            title = name if block["title"] == "Mean over classes" else f"{name}, {block['title']}"
            pairs.append(Pair(title, block[column]["dice"]["mean"], block[column]["iou"]["mean"]))
    if best is None:
        return pairs
    return [*pairs, Pair(f"Validation, {counted}", best["val_dice"], best["val_iou"])]


def _row_pairs(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Dice and IoU of each case and class, the network's and the atlas's."""
    pairs = []
    for row in rows:
        name = f"{row['case']}, {row['class']}"
        pairs.append(Pair(name, row["dice"], row["iou"]))
        pairs.append(Pair(f"{name}, atlas", row["atlas_dice"], row["atlas_iou"]))
    return pairs


def _cases(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows of each case, the case of the lowest mean Dice first: what went wrong is read before what went well."""
    return sorted(group_rows(rows).values(), key=lambda case: _mean(case, "dice"))


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float:
    return float(np.mean([row[metric] for row in rows]))


def flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's options, from its JSON, by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
