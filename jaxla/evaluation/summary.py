"""Masks -> one row of metrics per case and class; rows -> mean, standard deviation, n and unit."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tabulate import tabulate

from jaxla.cli.csv_files import write_csv
from jaxla.cli.files import write_atomically
from jaxla.config import InputError, option
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
    """Score one case: one row per class, or with unit `slice` one per slice and class.

    Args:
        prediction: class indices, [S, H, W] for unit `slice`; 0 is background, k the class `class_names[k - 1]`.
        reference: class indices of the same shape.
        spacing: millimetres per voxel along each axis.
        class_names: names of the foreground classes.
        unit: what one row measures; the `slice` column counts from 0.
        empty: how units with an empty reference count, see `metrics.EMPTY_POLICIES`.

    Raises:
        InputError: the shapes differ, or a mask holds a value that is not a class.
    """
    where = f"case {case_id}"
    if prediction.shape != reference.shape:
        shapes = f"the prediction has shape {prediction.shape}, the reference {reference.shape}"
        raise InputError(where, shapes, "Resample the prediction onto the grid of the reference.")
    for role, classes in (("prediction", prediction), ("reference", reference)):
        if classes.size and not 0 <= classes.min() <= classes.max() <= len(class_names):
            problem = f"the {role} holds values that are not class indices from 0 to {len(class_names)}"
            raise InputError(where, problem, "Convert its mask values to class indices.")

    rows = []
    for index, name in enumerate(class_names, start=1):
        predicted, referenced = prediction == index, reference == index
        if unit == "volume":
            rows.append({"case": case_id, "class": name, **score(predicted, referenced, spacing, empty)})
            continue
        for position, planes in enumerate(zip(predicted, referenced, strict=True)):
            rows.append({"case": case_id, "slice": position, "class": name, **score(*planes, spacing[1:], empty)})
    return sorted(rows, key=lambda row: row["slice"]) if unit == "slice" else rows


def summarise(rows: Iterable[Mapping], unit: Unit, empty: EmptyPolicy, class_names: Sequence[str]) -> dict[str, Any]:
    """Average the rows of `score_case` over units; the result can be written as JSON.

    The value of a unit is the mean over its foreground classes. `mean` and `sd` (sample standard deviation with n - 1;
    None if n is 1) are over these values, and `n` is their number. With `skip`, rows with an empty reference hold no
    values and are left out; `skipped` counts their units and rows. A class of `find_absent_classes` is left out of the
    mean over classes.

    Returns:
        `{metric: {"mean", "sd", "n", "unit"}}` at the top level and for each class under "classes"; also
        "absent_classes", "empty_policy", "empty_rule", "skipped" and the "definitions" of the metrics.
    """
    rows = list(rows)
    if not rows:
        raise InputError("rows", "empty", "Pass the rows of at least one case.")
    metrics = (*METRICS, *SIZES[3 if unit == "volume" else 2])
    absent = find_absent_classes(rows)
    scored = [row for row in rows if row["dice"] is not None]
    units = group_rows((row for row in scored if row["class"] not in absent), unit).values()
    averaging = f"mean over foreground classes within a {unit}, then over {unit}s; sd divides by n - 1"
    if absent:
        averaging += f"; no reference contains {', '.join(absent)}, so the mean over classes leaves it out"

    def class_statistics(name: str) -> dict[str, Any]:
        class_rows = [row for group in group_rows(scored, unit).values() for row in group if row["class"] == name]
        return {metric: _statistics([row[metric] for row in class_rows], unit) for metric in metrics}

    return {
        **{m: _statistics([np.mean([row[m] for row in group]) for group in units], unit) for m in metrics},
        "classes": {name: class_statistics(name) for name in class_names},
        "absent_classes": absent,
        "empty_policy": empty,
        "empty_rule": EMPTY_POLICIES[empty],
        "skipped": {"units": len(group_rows(rows, unit)) - len(units), "rows": len(rows) - len(scored)},
        "averaging": averaging,
        "definitions": {metric: COLUMNS[metric].definition for metric in metrics},
    }


def find_absent_classes(rows: Iterable[Mapping]) -> list[str]:
    """Return the classes that no reference contains although references contain another class.

    Every prediction without such a class would count as perfect, and raise the mean over classes.
    """
    is_present: dict[str, bool] = {}
    for row in rows:
        size = row["reference_volume_ml"] if "reference_volume_ml" in row else row["reference_area_mm2"]
        is_present[row["class"]] = is_present.get(row["class"], False) or size > 0
    return [name for name, present in is_present.items() if not present] if any(is_present.values()) else []


def summarise_test(
    rows: Sequence[Row], slice_rows: Sequence[Row], atlas_rows: Sequence[Row], class_names: Sequence[str]
) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows per volume with the overlaps of the atlas baseline as further columns, and their summary.

    The summary holds the summary per slice under "slice", and that of the atlas baseline under "atlas".
    """
    summary = summarise(rows, "volume", "one", class_names)
    summary["slice"] = summarise(slice_rows, "slice", "one", class_names)
    summary["atlas"] = summarise(atlas_rows, "volume", "one", class_names)
    atlas_columns = [{f"atlas_{metric}": row[metric] for metric in ("dice", "iou")} for row in atlas_rows]
    return [row | columns for row, columns in zip(rows, atlas_columns, strict=True)], summary


def group_rows(rows: Iterable[Row], unit: Unit = "volume") -> dict[tuple, list[Row]]:
    """Return (case,) -> rows, or for slices (case, slice) -> rows, one per class, in the given order."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["slice"]) if unit == "slice" else (row["case"],), []).append(row)
    return groups


def case_means(rows: Iterable[Row], metric: str) -> dict[str, float]:
    """Return case -> mean over its classes except the absent ones, per volume, in the order of the rows."""
    rows = list(rows)
    absent = find_absent_classes(rows)
    groups = group_rows(row for row in rows if row["class"] not in absent)
    return {case: float(np.mean([row[metric] for row in group])) for (case,), group in groups.items()}


def worst_median_best(dice: Mapping[str, float]) -> dict[str, str]:
    """Return the cases with the lowest, the median and the highest Dice, each once -> `worst`, `median` or `best`."""
    ranked = sorted(dice, key=dice.get)
    ranks = {ranked[-1]: "best", ranked[(len(ranked) - 1) // 2]: "median", ranked[0]: "worst"}
    return dict(reversed(ranks.items()))


def format_summary(summary: Mapping) -> str:
    """Return the summary as a text table: a line per metric, and the Dice of each class if there are several."""
    metrics = [(metric, summary[metric]) for metric in summary["definitions"]]
    if len(summary["classes"]) > 1:
        metrics += [(f"dice of {name}", values["dice"]) for name, values in summary["classes"].items()]
    lines = [
        [name, *("-" if row[key] is None else f"{row[key]:.4f}" for key in ("mean", "sd")), row["n"], row["unit"]]
        for name, row in metrics
    ]
    head = ("metric", "mean", "sd", "n", "unit")
    alignment = ("left", "right", "right", "right", "left")
    return tabulate(lines, head, "plain", colalign=alignment, disable_numparse=True)


def write_cases(rows: Sequence[Mapping], path: Path) -> None:
    """Write rows as CSV: case, (slice,) class, metrics, then all further columns. None becomes an empty cell."""
    first = ("case", "slice", "class", *COLUMNS)
    present = dict.fromkeys(column for row in rows for column in row)
    columns = [column for column in first if column in present] + [column for column in present if column not in first]
    write_csv(path, columns, rows)


def write_summary(summary: Mapping, path: Path) -> None:
    """Write a summary as JSON.

    Raises:
        ValueError: it holds NaN, which JSON cannot represent.
    """
    write_atomically(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lascarqs2022(rows: Sequence[Mapping], path: Path) -> None:
    """Write the table of the LAScarQS 2022 challenge: 3D Dice, ASSD and Hausdorff distance in mm of each case.

    Raises:
        InputError: the rows are not of volumes and one class, the LA cavity, or some were skipped.
    """
    where = option("protocol", "lascarqs2022")
    if (classes := len({row["class"] for row in rows})) != 1:
        problem = f"needs a single class, the LA cavity, but {classes} were scored"
        raise InputError(where, problem, f"Select it with {option('data.labels')}.")
    if any("slice" in row or row["dice"] is None for row in rows):
        problem = "needs the scores of every volume"
        raise InputError(where, problem, "Score volumes instead of slices, and do not skip empty references.")
    names = {"Casename": "case", "LAcavity_Dice": "dice", "LAcavity_ASD": "assd_mm", "LAcavity_HD": "hd_mm"}
    write_csv(path, list(names), [{name: row[key] for name, key in names.items()} for row in rows])


def _statistics(values: Sequence[float], unit: Unit) -> dict[str, Any]:
    """Return mean, sample standard deviation, count and unit; mean and sd are None if there are too few values."""
    mean = float(np.mean(values)) if len(values) else None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean, "sd": sd, "n": len(values), "unit": unit}
