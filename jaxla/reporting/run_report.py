"""A run's report: one self-contained HTML file with its configuration and results."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxla.cli.command_line import strip_run_options
from jaxla.cli.terminal import plural
from jaxla.data.prepared import PreparedVolume
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.volumes import read_mask
from jaxla.evaluation.metrics import COLUMNS
from jaxla.evaluation.summary import case_means, group_rows, worst_median_best
from jaxla.reporting.agreement import MIN_CASES_FOR_LIMITS, Agreement, agreement_by_class, draw_volumes
from jaxla.reporting.charts import draw_block_weights, draw_losses, draw_validation, has_validation
from jaxla.reporting.overlays import PREDICTION, REFERENCE, SLICES_PER_CASE, Panel, slice_figures
from jaxla.reporting.page import Pair, chart, data_uri, format_metric, write_page
from jaxla.runs.machine import describe_device
from jaxla.runs.record import format_value

Json = Mapping[str, Any]  # content of a JSON file, or a row of a table

MEAN = "Mean over classes"
PARTS = {"train": "Training", "val": "Validation", "test": "Test", "unused": "Unused"}  # parts of the split


def select_panels(volumes: Mapping[str, PreparedVolume], rows: Sequence[Json], predictions: Path) -> list[Panel]:
    """Return the test cases with the lowest, median and highest Dice; `predictions` is the folder of their masks."""
    if not rows:
        return []
    dice = case_means(rows, "dice")
    panels = []
    for case_id, rank in worst_median_best(dice).items():
        volume = volumes[case_id]
        mask = read_mask(predictions / f"{case_id}.nii.gz")
        prediction = to_slices(mask.array, slice_geometry(mask.affine))
        title = f"{rank} of {len(dice)}: {case_id}, Dice {dice[case_id]:.3f}"
        panels.append(Panel(title, volume.image, prediction, volume.mask, volume.spacing))
    return panels


def write_report(
    path: Path,
    *,
    record: Json,
    split: Mapping[str, Sequence[str]],
    history: Sequence[Mapping[str, float]],
    rows: Sequence[Json],
    summary: Json,
    cost: Json,
    panels: Sequence[Panel],
    unread: Collection[str] = (),
    folds: Sequence[Json] = (),
    largest: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write a run's report atomically.

    Args:
        path: path of the HTML file.
        record, split, summary, cost: the content of `experiment.json`, `split.json`, `test/summary.json`, `cost.json`.
        history: the lines of `metrics.jsonl`; empty for all folds together.
        rows: the rows of `test/cases.csv`, one per test case and class, with parsed numbers; empty without a test.
        panels: cases to show.
        unread: options that had no effect on the run and are not listed.
        folds: for cross-validation: folder name, kept epoch and results of each fold.
        largest: groups of structures that keep only their largest connected component; None if the method keeps all.

    Raises:
        KeyError, jinja2.UndefinedError: the arguments lack something that the report shows.
    """
    averaging = record["unit"]
    kept = record["experiment"]["training"]["checkpoint"]
    best = next((line for line in history if line["epoch"] == summary.get("best_epoch")), None)
    write_page(
        path,
        "run_report.html.jinja",
        record=record,
        experiment=record["experiment"],
        summary=summary,
        split=split,
        history=history,
        method=record["label"],
        kept=kept,
        best=best,
        averaging=averaging,
        folds=folds,
        largest=largest,
        unread=unread,
        costs=_list_costs(cost, history),
        panels=[(panel, [(i, data_uri(f)) for i, f in slice_figures(panel, SLICES_PER_CASE)]) for panel in panels],
        colours={"prediction": PREDICTION, "reference": REFERENCE},
        block_weights=_draw_block_weights(summary, record["experiment"]["model"].get("block_weights")),
        losses=chart(lambda axes: draw_losses(axes, history)) if history else "",
        validation=_draw_validation(history, best, averaging, kept),
        classes=record["labels"]["names"],
        **(_result_values(rows, summary, split, best, averaging) if rows else {"cases": ()}),
        **_provenance_values(record, split, unread),
    )


def _result_values(
    rows: Sequence[Json],
    summary: Json,
    split: Mapping[str, Sequence[str]],
    best: Mapping[str, float] | None,
    averaging: str,
) -> dict[str, Any]:
    """Return the page's values about the test."""
    agreements = agreement_by_class(rows)
    dice, atlas = case_means(rows, "dice"), case_means(rows, "atlas_dice")
    cases = [case for _, case in sorted(group_rows(rows).items(), key=lambda item: dice[item[0][0]])]  # failures first
    return {
        "results": _result_blocks(summary),
        "metrics": list(summary["definitions"] | summary["slice"]["definitions"]),
        "titles": {name: metric.title for name, metric in COLUMNS.items()},
        "definitions": _list_definitions(summary, "validation" if split["val"] else "training"),
        "pairs": _mean_pairs(summary, best, averaging),
        "case_pairs": _case_pairs(rows),
        "cases": cases,
        "above_atlas": sum(dice[case] > atlas[case] for case in dice),
        "volumes": chart(lambda axes: draw_volumes(axes, agreements), (4.2, 4)),
        "agreements": [(a.name, a.n, format_metric(a.bias, "volume_ml", True), _format_limits(a)) for a in agreements],
        "min_cases_for_limits": MIN_CASES_FOR_LIMITS,
    }


def _provenance_values(record: Json, split: Mapping[str, Sequence[str]], unread: Collection[str]) -> dict[str, Any]:
    """Return the page's values about options, data and environment."""
    options = _flatten(record["experiment"])
    hidden = {"name", "summary", *unread}
    return {
        "command": strip_run_options(record["command"]),
        "options": [(name, format_value(v)) for name, v in options.items() if name not in hidden],
        "facts": _list_facts(record),
        "parts": [
            (title, len(split[part]), ", ".join(split[part])) for part, title in PARTS.items() if split.get(part)
        ],
    }


def _flatten(experiment: Json) -> dict[str, Any]:
    """Return an experiment's options, from its JSON, by their dotted names."""
    options: dict[str, Any] = {}
    for name, value in experiment.items():
        is_group = isinstance(value, Mapping)
        options |= {f"{name}.{field}": v for field, v in value.items()} if is_group else {name: value}
    return options


def _draw_validation(
    history: Sequence[Mapping[str, float]], best: Mapping[str, float] | None, averaging: str, kept: str
) -> str:
    """Draw validation Dice and IoU over epochs; return "" if there was no validation."""
    if not has_validation(history):
        return ""
    return chart(lambda axes: draw_validation(axes, history, best, averaging, kept))


def _draw_block_weights(summary: Json, weighting: str | None) -> dict[str, str] | None:
    """Draw the block weights of a fusion network; return None for other networks."""
    if "block_weights" not in summary:
        return None
    blocks, levels = (len(summary["block_weights"][name]) for name in ("blocks", "levels"))
    inches = (max(4.6, 1.6 + 0.42 * min(blocks, 20)), 3.2)
    origin = (
        "The weights are equal and were not learned" if weighting == "uniform" else "Learned weights in the best epoch"
    )
    return {
        "uri": chart(lambda axes: draw_block_weights(axes, summary["block_weights"]), inches),
        "alt": f"Weight of each of {plural(blocks, 'block')} at each of {plural(levels, 'level')} of the decoder",
        "caption": f"{origin}; each row sums to 1",
    }


def _result_blocks(summary: Json) -> list[dict[str, Any]]:
    """Return the blocks of the table of results: over all classes, then for each class if there are several.

    A block has a title and, in the order of the table's columns, summaries {metric: mean, sd, n, unit}.
    """
    columns = {"volume": summary, "atlas": summary["atlas"], "slice": summary["slice"]}
    classes = summary["classes"] if len(summary["classes"]) > 1 else ()
    by_class = [{"title": name} | {key: value["classes"][name] for key, value in columns.items()} for name in classes]
    return [{"title": MEAN, **columns}, *by_class]


def _list_costs(cost: Json, history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Return the cost of the run: names of quantities, and their values as text."""
    volumes, slices = len(cost["inference_seconds"]), sum(cost["inference_slices"])
    parameters, trained = cost["parameters"] / 1e6, cost["trained_parameters"] / 1e6
    inference = f"{np.mean(cost['inference_seconds']):.2f} s per volume of {slices / volumes:.0f} slices"
    measured = f"from the scan in memory to its mask (mean, n = {plural(volumes, 'volume')})"
    lines = {
        "Parameters": f"{parameters:.1f} M, {trained:.1f} M of them trained",
        "Multiply-adds": f"{cost['multiply_adds'] / 1e9:.2f} G per slice",
    }
    if history:
        seconds = np.mean([line["seconds"] for line in history])
        lines["Training"] = f"{seconds:.1f} s per epoch" + (", including validation" if has_validation(history) else "")
    lines["Inference"] = f"{inference}, {measured}"
    if history:
        memory = f"{cost['step_bytes'] / 1e9:.2f} GB"
        lines["Memory of a training step"] = f"{memory} for {cost['step_slices']} slices, as reported by XLA"
    for key, owner in (("peak_host_bytes", "the process on the host"), ("peak_device_bytes", "the device")):
        if cost[key] is not None:
            lines[f"Peak memory of {owner}"] = f"{cost[key] / 1e9:.2f} GB"
    return list(lines.items())


def _list_facts(record: Json) -> list[tuple[str, str]]:
    """Return the origin of data, weights and results: names of facts, and their values as text."""
    root = record["experiment"]["data"]["root"]
    labels = record["labels"]
    environment = record["environment"]
    values = [", ".join(map(str, group)) for group in labels["values"] or [["any except 0"]]]
    masks = [f"{name}: {value}" for name, value in zip(labels["names"], values, strict=True)]
    if labels["ignored"] is None:
        masks.append("all others: background")
    elif labels["ignored"]:
        masks.append(f"ignored: {', '.join(map(str, labels['ignored']))}")
    fitted = []
    if epochs := record.get("fitted_epochs"):
        minutes = record["experiment"]["training"]["minutes"]
        fitted.append(("Steps", f"{epochs} epochs of {record['fitted_steps']}, which fit into {minutes:g} minutes"))
    versions = {"Python": environment["python"]} | environment["versions"]
    return [
        ("Data", "synthetic phantoms" if root == "phantom" else root),
        ("Mask values", "; ".join(masks)),
        ("Weights", record["weights"]),
        *fitted,
        ("Started", record["begun"]),
        *(("Resumed", f"{s['begun']}, {describe_device(s['environment'])}") for s in record["resumed"]),
        ("Device", describe_device(environment)),
        ("Platform", environment["platform"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Command", record["command"]),
        ("SHA-256 of data", record["data_sha256"]),
        ("SHA-256 of split", record["split_sha256"]),
        ("SHA-256 of weights", record["weights_sha256"] or "none"),
    ]


def _list_definitions(summary: Json, threshold_cases: str) -> dict[str, str]:
    definitions = summary["definitions"] | summary["slice"]["definitions"]
    return {COLUMNS[metric].title: text for metric, text in definitions.items()} | {
        "Empty masks": summary["empty_rule"],
        "Averaging": f"{summary['averaging']}. Per slice: {summary['slice']['averaging']}",
        "Atlas baseline": f"mean training mask in normalised coordinates, with threshold "
        f"{summary['atlas']['threshold']}, the best one on the {threshold_cases} cases",
        "Grid": "validation Dice and IoU are computed in the network's input pixels, all other numbers on the scan's "
        "own grid",
    }


def _format_limits(agreement: Agreement) -> str:
    return " to ".join(format_metric(limit, "volume_ml", sign=True) for limit in agreement.limits or ()) or "–"


def _mean_pairs(summary: Json, best: Mapping[str, float] | None, averaging: str) -> list[Pair]:
    """Return every pair of mean Dice and mean IoU in the report."""
    names = {"volume": "Test, per volume", "atlas": "Atlas baseline, per volume", "slice": "Test, per slice"}
    pairs = []
    for block in _result_blocks(summary):
        for column, name in names.items():
            title = name if block["title"] == MEAN else f"{name}, {block['title']}"
            pairs.append(Pair(title, block[column]["dice"]["mean"], block[column]["iou"]["mean"]))
    if best and "val_dice" in best:
        pairs.append(Pair(f"Validation, {averaging}", best["val_dice"], best["val_iou"]))
    return pairs


def _case_pairs(rows: Sequence[Json]) -> list[Pair]:
    """Return Dice and IoU of each case and class, of the network and of the atlas baseline."""
    pairs = []
    for row in rows:
        name = f"{row['case']}, {row['class']}"
        pairs.append(Pair(name, row["dice"], row["iou"]))
        pairs.append(Pair(f"{name}, atlas baseline", row["atlas_dice"], row["atlas_iou"]))
    return pairs
