"""From label maps to rows per case, and from rows to the numbers of a table: mean, standard deviation, n and unit."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tabulate import tabulate

from jaxla.cli.files import atomic_file, write_atomically
from jaxla.config import InputError
from jaxla.evaluation.metrics import COLUMNS, EMPTY_POLICIES, METRICS, SIZES, EmptyPolicy, score

Unit = Literal["volume", "slice"]
Row = dict[str, Any]


def score_case(
    case_id: str,
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    class_names: Sequence[str],
    unit: Unit = "volume",
    empty: EmptyPolicy = "one",
) -> list[Row]:
    """Rows of one case: one per class, or with unit "slice" one per slice and class.

    Args:
        case_id: name of the case, the `case` column.
        prediction: class indices, for unit "slice" [S, H, W]; 0 is background, k the class `class_names[k - 1]`.
        reference: class indices of the same shape.
        spacing: millimetres per voxel along each axis.
        class_names: names of the foreground classes.
        unit: what one row measures; the `slice` column counts from 0.
        empty: how units with an empty reference count, see `metrics.EMPTY_POLICIES`.

    Raises:
        InputError: the shapes differ, or a mask holds a value that no class has.
    """
    if prediction.shape != reference.shape:
        raise InputError(
            f"case {case_id}: shapes {prediction.shape} (prediction) and {reference.shape} (reference) differ"
        )
    for role, labels in (("prediction", prediction), ("reference", reference)):
        if labels.size and not 0 <= labels.min() <= labels.max() <= len(class_names):
            raise InputError(f"case {case_id}: the {role} has values outside 0..{len(class_names)}, the known classes")

    rows = []
    for index, name in enumerate(class_names, start=1):
        predicted, referenced = prediction == index, reference == index
        if unit == "volume":
            rows.append({"case": case_id, "class": name, **score(predicted, referenced, spacing, empty)})
            continue
        for position, (plane, reference_plane) in enumerate(zip(predicted, referenced, strict=True)):
            values = score(plane, reference_plane, spacing[1:], empty)
            rows.append({"case": case_id, "slice": position, "class": name, **values})
    return sorted(rows, key=lambda row: row["slice"]) if unit == "slice" else rows


def summarise(rows: Iterable[Mapping], unit: Unit, empty: EmptyPolicy, class_names: Sequence[str]) -> dict[str, Any]:
    """Means over units of the rows of `score_case`, ready to be written as JSON.

    A unit's value is the mean over its foreground classes; `mean` and `sd` (sample standard deviation, n - 1; None when
    n is 1) are taken over those values, and `n` counts the units behind them. Under "skip" the rows whose reference is
    empty hold no values: classes and units are averaged without them, and `skipped` says how many units and rows.

    Returns:
        `{metric: {"mean", "sd", "n", "unit"}}` at the top level and for each class under "classes", beside
        "empty_policy", "empty_rule", "skipped" and the "definitions" of the metrics.
    """
    rows = list(rows)
    if not rows:
        raise InputError("there is nothing to summarise: no case was scored")
    metrics = (*METRICS, *SIZES[3 if unit == "volume" else 2])
    units = rows_by_unit([row for row in rows if row["dice"] is not None], unit).values()
    skipped_units = len(rows_by_unit(rows, unit)) - len(units)
    skipped_rows = sum(row["dice"] is None for row in rows)

    summary: dict[str, Any] = {}
    for metric in metrics:
        summary[metric] = _statistics([np.mean([row[metric] for row in group]) for group in units], unit)
    summary["classes"] = {
        name: {
            metric: _statistics([row[metric] for group in units for row in group if row["class"] == name], unit)
            for metric in metrics
        }
        for name in class_names
    }
    summary["empty_policy"] = empty
    summary["empty_rule"] = EMPTY_POLICIES[empty]
    summary["skipped"] = {"units": skipped_units, "rows": skipped_rows}
    summary["averaging"] = f"mean over foreground classes within a {unit}, then over {unit}s; sd divides by n - 1"
    summary["definitions"] = {metric: COLUMNS[metric].definition for metric in metrics}
    return summary


def summarise_test(
    rows: Sequence[Row], slice_rows: Sequence[Row], atlas_rows: Sequence[Row], class_names: Sequence[str]
) -> tuple[list[Row], dict[str, Any]]:
    """A run's test: rows per volume with the atlas's overlaps beside them, and the summary per volume.

    Under "slice" the summary has the same per slice, under "atlas" that of the atlas per volume.
    """
    summary = summarise(rows, "volume", "one", class_names)
    summary["slice"] = summarise(slice_rows, "slice", "one", class_names)
    summary["atlas"] = summarise(atlas_rows, "volume", "one", class_names)
    beside = [{f"atlas_{metric}": row[metric] for metric in ("dice", "iou")} for row in atlas_rows]
    return [row | of_atlas for row, of_atlas in zip(rows, beside, strict=True)], summary


def rows_by_unit(rows: Iterable[Row], unit: Unit = "volume") -> dict[tuple, list[Row]]:
    """(case,), or of slices (case, slice) -> its rows, one per class, in the rows' order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["slice"]) if unit == "slice" else (row["case"],), []).append(row)
    return groups


def case_means(rows: Iterable[Row], metric: str) -> dict[str, float]:
    """Case -> its value per volume, the mean over its classes; in the rows' order."""
    return {case: float(np.mean([row[metric] for row in of_case])) for (case,), of_case in rows_by_unit(rows).items()}


def worst_median_best(dice: Mapping[str, float]) -> dict[str, str]:
    """The cases of the lowest, the median and the highest Dice, each once -> `worst`, `median` or `best`."""
    ranked = sorted(dice, key=dice.get)
    ranks = {ranked[-1]: "best", ranked[(len(ranked) - 1) // 2]: "median", ranked[0]: "worst"}
    return dict(reversed(ranks.items()))


def summary_table(summary: Mapping) -> str:
    """The summary as lines to print: one per metric, and the Dice of each class where there are several."""
    metrics = [(metric, summary[metric]) for metric in summary["definitions"]]
    if len(summary["classes"]) > 1:
        metrics += [(f"dice of {name}", values["dice"]) for name, values in summary["classes"].items()]
    lines = [
        [name, *("-" if of[key] is None else f"{of[key]:.4f}" for key in ("mean", "sd")), of["n"], of["unit"]]
        for name, of in metrics
    ]
    head, aligned = ("metric", "mean", "sd", "n", "unit"), ("left", "right", "right", "right", "left")
    return tabulate(lines, head, "plain", colalign=aligned, disable_numparse=True)


def write_cases(rows: Sequence[Mapping], path: Path) -> None:
    """Rows as CSV: case, (slice,) class, metrics, then whatever other columns the rows have. None is an empty cell."""
    if not rows:
        raise InputError(f"there are no rows to write to {path}")
    first = ("case", "slice", "class", *COLUMNS)
    present = dict.fromkeys(column for row in rows for column in row)
    columns = [column for column in first if column in present] + [column for column in present if column not in first]
    _write_csv(path, columns, rows)


def write_summary(summary: Mapping, path: Path) -> None:
    """A summary as JSON; refuses NaN, which JSON has no word for."""
    write_atomically(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lascarqs2022(rows: Sequence[Mapping], path: Path) -> None:
    """The table of the LAScarQS 2022 challenge: 3D Dice, ASSD in mm and maximal Hausdorff distance in mm of each case.

    Raises:
        InputError: the rows are not whole volumes of one class, the LA cavity, or some were skipped.
    """
    if any("slice" in row for row in rows) or len({row["class"] for row in rows}) != 1:
        raise InputError("protocol lascarqs2022 scores whole volumes with one class, the left-atrial cavity")
    if any(row["dice"] is None for row in rows):
        raise InputError("protocol lascarqs2022 scores every case: empty references cannot be skipped")
    names = {"Casename": "case", "LAcavity_Dice": "dice", "LAcavity_ASD": "assd_mm", "LAcavity_HD": "hd_mm"}
    _write_csv(path, list(names), [{name: row[key] for name, key in names.items()} for row in rows])


def _statistics(values: Sequence[float], unit: Unit) -> dict[str, Any]:
    """Mean, sample standard deviation, count and unit; mean and sd are None where too few values define them."""
    mean = float(np.mean(values)) if len(values) else None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean, "sd": sd, "n": len(values), "unit": unit}


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping]) -> None:
    with atomic_file(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
