"""Predicted mask files against reference files: matched by name, checked, scored, and the tables written at once."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from jaxla.cli.files import atomic_folder, report_os_errors
from jaxla.cli.terminal import plural
from jaxla.config import InputError
from jaxla.data.cases import MASK_SUFFIXES, find_cases, find_masks, masks_by_image
from jaxla.data.labels import Labels, parse_labels
from jaxla.data.split import read_test_cases
from jaxla.data.volumes import read_mask, require_same_grid, slice_geometry, to_slices
from jaxla.evaluation.summary import Row, score_case, write_cases, write_lascarqs2022, write_summary

log = logging.getLogger("jaxla.evaluate")

MOST_CLASSES = 255  # class indices are uint8; a file with more values is an image


def match_cases(
    predictions: Path, references: Path, cases: str | None, labels: str
) -> tuple[list[tuple[str, Path, Path]], Labels | None]:
    """(case id, prediction, reference) of every case; and the classes, where something says them.

    Args:
        references: a data set, or a folder of masks, named as the predictions or with `_mask` or the like behind.
        cases: a split file, of whose test cases alone to take.
        labels: what `--data.labels` says; empty takes the data set's own.
    """
    predicted = find_masks(predictions, "--predictions")
    if not predicted:
        raise InputError(f"--predictions={predictions}: no .nii or .nii.gz file in this folder")
    referenced, classes = find_masks(references, "--references"), parse_labels(labels) if labels else None
    images_too = any(name + suffix in referenced for name in referenced for suffix in MASK_SUFFIXES)
    if images_too or not referenced:
        dataset = find_cases(references, labels)
        referenced, classes = {case.id: case.mask for case in dataset.cases}, dataset.labels
    elif predicted.keys().isdisjoint(referenced):
        referenced = masks_by_image(referenced) or referenced

    if cases:
        chosen = read_test_cases(Path(cases))
        if missing := [name for name in chosen if name not in referenced]:
            raise InputError(f"--cases={cases}: its test case {missing[0]} is not among the references")
        referenced = {name: referenced[name] for name in chosen}
        if others := predicted.keys() - referenced.keys():
            log.info("--cases=%s: %s of other cases not scored", cases, plural(len(others), "prediction"))
            predicted = {name: predicted[name] for name in predicted if name in referenced}

    for role, partner, has, lacks in (
        ("prediction", "reference", predicted, referenced),
        ("reference", "prediction", referenced, predicted),
    ):
        if alone := [name for name in has if name not in lacks]:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise InputError(
                f"{has[alone[0]]}: this {role} has no {partner}{more}; files are matched by name, "
                f"so there should be a {alone[0]}.nii.gz among the {partner}s"
            )
    return [(name, predicted[name], path) for name, path in referenced.items()], classes


def checked_labels(pairs: list[tuple[str, Path, Path]], labels: Labels | None) -> Labels:
    """Read every file once, before the long work: it is sound, on its partner's grid, and its values are classes.

    Without a data set that says its classes: where no file has more than one value besides 0, that is the one class;
    otherwise each value found in the references is a class.
    """
    log.info("checking %d cases", len(pairs))
    values: dict[Path, set[int]] = {}
    for _, prediction_path, reference_path in pairs:
        prediction, reference = read_mask(prediction_path), read_mask(reference_path)
        require_same_grid(prediction, reference)
        for volume in (prediction, reference):
            values[volume.path] = _values(volume.array)
            if len(values[volume.path]) > MOST_CLASSES:
                raise InputError(f"{volume.path}: holds {len(values[volume.path])} values, so it is no mask; an image?")

    if labels is None and all(len(found) <= 1 for found in values.values()):
        labels = Labels(("foreground",))
        of_references = set().union(*(values[reference] for _, _, reference in pairs))
        for _, prediction, _ in pairs:  # 1 stands for the class, whatever value the references give it
            if other := values[prediction] - of_references - {1}:
                raise InputError(f"{prediction}: has the value {other.pop()}, which no reference has")
        log.info("one class: any value but 0 (found %s)", sorted(set().union(*values.values())))
    elif labels is None:
        classes = sorted(set().union(*(values[reference] for _, _, reference in pairs)))
        if len(classes) > MOST_CLASSES:
            raise InputError(
                f"{pairs[0][2].parent}: the references hold {len(classes)} values together, too many classes"
            )
        labels = Labels(tuple(map(str, classes)), tuple((value,) for value in classes))
        log.info("classes: %s", labels.describe())

    # The file with most values first: where a single one keeps the others from being one class, it is the one to name.
    # References of "any value but 0" may hold several, as in training.
    to_check = [prediction for _, prediction, _ in pairs] if labels.values is None else values
    set_aside = set(labels.ignored or ())
    if labels.ignored is None:  # what references hold, but not what predictions alone do
        log.info("classes: %s", labels.describe())
        set_aside.update(*(values[reference] for _, _, reference in pairs))
    for path in sorted(to_check, key=lambda path: -len(values[path])):
        if labels.values is None:
            beyond = values[path] if len(values[path]) > 1 else set()
        else:
            beyond = values[path] - set_aside.union(*labels.values)
        if beyond:
            classes = labels.describe() or "none, as every reference is empty"
            raise InputError(
                f"{path}: has the values {sorted(beyond)[:5]}, but the classes are {classes}; mend the mask, or say by "
                "--data.labels which values are which class, as in training"
            )
    return labels


def _values(array: np.ndarray) -> set[int]:
    """The values of a mask besides 0."""
    return set(np.unique(array[array != 0]).tolist())


def score_files(case_id: str, prediction: Path, reference: Path, labels: Labels, unit: str, empty: str) -> list[Row]:
    volume = read_mask(reference)
    masks = [labels.to_classes(read_mask(prediction).array, prediction), labels.to_classes(volume.array, reference)]
    spacing = volume.spacing
    if unit == "slice":
        geometry = slice_geometry(volume.affine)
        masks, spacing = [to_slices(mask, geometry) for mask in masks], geometry.spacing
    return score_case(case_id, *masks, spacing, labels.names, unit=unit, empty=empty)


def write_tables(output: Path, rows: list[Row], summary: dict, protocol: str | None) -> None:
    """All files at once."""
    with report_os_errors("written", f"--output={output}", "choose another folder"), atomic_folder(output) as beside:
        write_cases(rows, beside / "cases.csv")
        write_summary(summary, beside / "summary.json")
        if protocol == "lascarqs2022":
            write_lascarqs2022(rows, beside / "lascarqs2022.csv")
