"""python -m jaxla.evaluate: score predicted masks against reference masks.

Files are matched by name. `--output` gets cases.csv and summary.json, and with `--protocol=lascarqs2022` the table of
that challenge. The folder appears once everything is computed.
"""

import logging
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.files import atomic_folder, report_os_errors
from jaxla.cli.process import run_command
from jaxla.cli.terminal import plural
from jaxla.config import InputError
from jaxla.data.cases import find_cases, find_masks, masks_by_image
from jaxla.data.formats import SEG_EXTENSION
from jaxla.data.labels import MAX_CLASSES, Labels, parse_labels
from jaxla.data.layouts import MASK_SUFFIXES
from jaxla.data.scan_files import top_level_scans
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.split import read_split
from jaxla.data.volumes import Volume, log_warnings, read_mask, require_same_grid
from jaxla.evaluation.metrics import EmptyPolicy
from jaxla.evaluation.summary import (
    Row,
    Unit,
    format_summary,
    score_case,
    summarise,
    write_cases,
    write_lascarqs2022,
    write_summary,
)
from jaxla.inference.mask_files import mask_classes

log = logging.getLogger("jaxla.evaluate")

PROBABILITIES_SUFFIX = "_probabilities"


class Pair(NamedTuple):
    """The two masks of a case."""

    case: str
    prediction: Path
    reference: Path


def main(arguments: list[str]) -> None:
    """Score every case, write the tables, and print the summary."""
    options = parse_arguments(make_parser(), arguments)
    output = Path(options.output)
    if os.path.lexists(output):
        raise InputError(f"--output={output}", "already exists", "Choose a new folder.")
    require_writable("--output", output)
    protocol = f"--protocol={options.protocol}"
    if options.protocol and (options.unit == "slice" or options.empty == "skip"):
        excluded = "--unit=slice" if options.unit == "slice" else "--empty=skip"
        problem = f"needs the scores of every volume, so it cannot be combined with {excluded}"
        raise InputError(protocol, problem, "Remove one of the two.")

    predictions, references = Path(options.predictions), Path(options.references)
    if predictions.resolve() == references.resolve():
        problem = "the same folder as --predictions"
        raise InputError(f"--references={options.references}", problem, "Pass the folder of the reference masks.")
    pairs, given_labels = match_cases(predictions, references, options.cases, options.data.labels)
    labels = check_masks(pairs, given_labels)
    if options.protocol and len(labels.names) > 1:
        problem = f"needs one class, the LA cavity, but the classes are {labels.describe()}"
        raise InputError(protocol, problem, "Set --data.labels to one class.")

    rows = []
    for position, pair in enumerate(pairs, start=1):
        rows += score_pair(pair, read_prediction(pair, given_labels), labels, options.unit, options.empty)
        log.info("%d/%d %s", position, len(pairs), pair.case)
    summary = summarise(rows, options.unit, options.empty, labels.names)
    with report_os_errors("written", f"--output={output}", "Use another folder."), atomic_folder(output) as temporary:
        write_cases(rows, temporary / "cases.csv")
        write_summary(summary, temporary / "summary.json")
        if options.protocol == "lascarqs2022":
            write_lascarqs2022(rows, temporary / "lascarqs2022.csv")
    print(format_summary(summary))
    print(f"{plural(len(pairs), 'case')}; {summary['averaging']}; {summary['empty_rule']}")
    if options.empty == "skip":
        skipped = summary["skipped"]
        print(f"skipped: {skipped['units']} {options.unit}s, {skipped['rows']} rows of cases.csv")
    print(f"written to {shlex.quote(str(output))}")


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("jaxla.evaluate", "Score predicted masks against reference masks.")
    add = parser.add_argument
    add("--predictions", type=str, required=True, help="folder of predicted masks, <case>.nii.gz or another format")
    references = "folder of masks, <case>.nii.gz or <case>_mask.nii.gz or another format; or a data set"
    add("--references", type=str, required=True, help=references)
    add("--output", type=str, required=True, help="new folder for cases.csv and summary.json")
    add("--unit", type=Unit, default="volume", help="score and average per volume or per slice")
    add("--protocol", type=Literal["lascarqs2022"] | None, default=None, help="also write the table of this challenge")
    empty = "`one` scores two empty masks as perfect, `zero` as worst; `skip` leaves out empty references"
    add("--empty", type=EmptyPolicy, default="one", help=empty)
    add("--cases", type=str, help="a run's split.json: score only its test cases")
    add("--data.labels", type=str, default="", help="mask values of each class as in training, such as LA:1")
    return parser


def match_cases(
    predictions: Path, references: Path, split: str | None, labels: str
) -> tuple[list[Pair], Labels | None]:
    """Return the masks of every case, and the classes if the user or the data set names them.

    Args:
        references: a data set, or a folder of masks named like the predictions, with or without a suffix like `_mask`.
        split: value of `--cases`; only the test cases of this file are returned.
        labels: value of `--data.labels`; empty uses the classes of the data set.
    """
    predicted = find_masks(predictions, "predictions")
    if not predicted:
        raise InputError(f"--predictions={predictions}", "no mask in this folder", "Pass a folder of masks.")
    referenced = find_masks(references, "references")
    classes = parse_labels(labels) if labels else None
    has_images = any(name + suffix in referenced for name in referenced for suffix in MASK_SUFFIXES)
    has_series = any(path.is_dir() and top_level_scans(path) for path in referenced.values())  # DICOM slices and a mask
    if has_images or has_series or not referenced:
        dataset = find_cases(references, labels)
        referenced, classes = {case.id: case.mask for case in dataset.cases}, dataset.labels
    elif predicted.keys().isdisjoint(referenced):
        referenced = masks_by_image(referenced) or referenced

    for name in [name for name in predicted if name.endswith(PROBABILITIES_SUFFIX) and name not in referenced]:
        if name.removesuffix(PROBABILITIES_SUFFIX) in predicted:  # `predict` writes both into the same folder
            log.info("%s: probabilities, not scored", predicted.pop(name))
    if split:
        if not (test_cases := read_split(Path(split), "cases").test):
            fix = "Remove --cases to score every prediction."
            raise InputError(f"--cases={split}", "lists no test cases", fix)
        if missing := [name for name in test_cases if name not in referenced]:
            problem = f"its test case {missing[0]} has no reference in {references}"
            raise InputError(f"--cases={split}", problem, "Use the split and the references of the same data set.")
        referenced = {name: referenced[name] for name in test_cases}
        if ignored := predicted.keys() - referenced.keys():
            log.info("--cases=%s: %s of other cases ignored", split, plural(len(ignored), "prediction"))
            predicted = {name: path for name, path in predicted.items() if name in referenced}

    for role, partner, files, partners in (
        ("prediction", "reference", predicted, referenced),
        ("reference", "prediction", referenced, predicted),
    ):
        if unmatched := [name for name in files if name not in partners]:
            others = f" and {plural(len(unmatched) - 1, 'other')} have" if len(unmatched) > 1 else " has"
            fix = f"Files are matched by name: add {unmatched[0]}.nii.gz to the {partner}s."
            raise InputError(files[unmatched[0]], f"this {role}{others} no {partner}", fix)
    return [Pair(name, predicted[name], path) for name, path in referenced.items()], classes


def check_masks(pairs: list[Pair], labels: Labels | None) -> Labels:
    """Before scoring, check that every file is undamaged, on the grid of its partner, and holds only known classes.

    Returns:
        `labels`; if None, one class if no file has more than one non-zero value, otherwise a class for each value in
        the references.
    """
    log.info("checking %s", plural(len(pairs), "case"))
    values: dict[Path, set[int]] = {}
    for pair in pairs:
        prediction, reference = read_prediction(pair, labels), read_mask(pair.reference)
        require_same_grid(prediction, reference)
        for volume in (prediction, reference):
            log_warnings(volume.path, volume.warnings)
            values[volume.path] = set(np.unique(volume.array[volume.array != 0]).tolist())
            if (count := len(values[volume.path])) > MAX_CLASSES:
                problem = f"has {count} different non-zero values, so it looks like an image, not a mask"
                raise InputError(volume.path, problem, "Replace it with a mask.")
    reference_values = set().union(*(values[pair.reference] for pair in pairs))

    if labels is None and all(len(found) <= 1 for found in values.values()):
        labels = Labels(("foreground",))
        for pair in pairs:  # a prediction may hold 1 for the class, whatever its value in the references
            if unknown := values[pair.prediction] - reference_values - {1}:
                problem = f"holds the value {unknown.pop()}, which no reference has"
                fix = "Correct the mask, or list the values of the class in --data.labels."
                raise InputError(pair.prediction, problem, fix)
        log.info("one class: any non-zero value (found %s)", sorted(set().union(*values.values())))
    elif labels is None:
        if len(reference_values) > MAX_CLASSES:
            problem = f"the references hold {len(reference_values)} different values, but at most {MAX_CLASSES} classes"
            problem += " are supported"
            raise InputError(pairs[0].reference.parent, problem, "Set --data.labels.")
        classes = sorted(reference_values)
        labels = Labels(tuple(map(str, classes)), tuple((value,) for value in classes))
        log.info("classes: %s", labels.describe())
    elif labels.ignored is None:
        log.info("classes: %s", labels.describe())

    require_present_class(labels, reference_values, pairs[0].reference.parent)
    # "All other values are background" covers the values in references, not those that only predictions contain.
    ignored = reference_values if labels.ignored is None else set(labels.ignored)
    # "Any non-zero value" allows several values in references, as in training. The file with the most values is checked
    # first: if it alone has several values, the error is about it.
    to_check = [pair.prediction for pair in pairs] if labels.values is None else values
    for path in sorted(to_check, key=lambda path: -len(values[path])):
        if labels.values is None:
            unknown = values[path] if len(values[path]) > 1 else set()
        else:
            unknown = values[path] - ignored.union(*labels.values)
        if unknown:
            classes = labels.describe() or "none: every reference is empty"
            problem = f"label values {list_values(unknown)} are not among the classes ({classes})"
            raise InputError(path, problem, "Correct the mask, or set --data.labels as in training.")
    return labels


def read_prediction(pair: Pair, labels: Labels | None) -> Volume:
    """Read a predicted mask; convert the segment numbers of a DICOM segmentation to the mask values of `labels`."""
    mask = read_mask(pair.prediction)
    if labels is None or pair.prediction.suffix.lower() != SEG_EXTENSION:
        return mask
    return replace(mask, array=labels.to_values(mask_classes(mask, labels)))


def require_present_class(labels: Labels, reference_values: set[int], folder: Path) -> None:
    """Raise an InputError if no class occurs in the references: empty predictions would count as perfect."""
    if not reference_values:
        log.warning("%s: every reference is empty", folder)
    elif labels.values is not None and reference_values.isdisjoint(set().union(*labels.values)):
        found = list_values(reference_values)
        problem = f"the references hold the values {found}, but no value of a class ({labels.describe()})"
        raise InputError(folder, problem, "Correct --data.labels.")


def list_values(values: set[int]) -> str:
    """Return the five lowest values."""
    return ", ".join(map(str, sorted(values)[:5]))


def score_pair(pair: Pair, prediction: Volume, labels: Labels, unit: str, empty: str) -> list[Row]:
    """Score a case on its own grid: one row per class, or with unit `slice` one per slice and class."""
    reference = read_mask(pair.reference)
    masks = [labels.to_classes(volume.array, volume.path) for volume in (prediction, reference)]
    spacing = reference.spacing
    if unit == "slice":
        geometry = slice_geometry(reference.affine)
        masks = [to_slices(mask, geometry) for mask in masks]
        spacing = geometry.spacing
    return score_case(pair.case, *masks, spacing, labels.names, unit=unit, empty=empty)


if __name__ == "__main__":
    run_command(main)
