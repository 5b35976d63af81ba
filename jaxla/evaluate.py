"""python -m jaxla.evaluate: score predicted masks against reference masks.

Files are matched by name. `--output` gets cases.csv and summary.json, and with `--protocol=lascarqs2022` the table of
that challenge; it appears when everything is computed, or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxla.config import InputError
from jaxla.shell.command_line import command_parser, parse_arguments
from jaxla.shell.process import run_command

if TYPE_CHECKING:
    import numpy as np

    from jaxla.data.labels import Labels
    from jaxla.evaluation.summary import Row

log = logging.getLogger("jaxla.evaluate")

MOST_CLASSES = 255  # class indices are uint8; a file with more values is an image


def main(arguments: list[str]) -> None:
    """Score every case, write the tables, print the summary.

    Raises:
        InputError: a file without its partner, on another grid, unreadable or with a value that no class has; an output
            that exists; options that contradict each other.
    """

    from jaxla.evaluation.summary import summarise, summary_table

    parser = command_parser("jaxla.evaluate", "Score predicted masks against references.")
    parser.add_argument("--predictions", type=str, required=True, help="folder of predicted masks, <case>.nii.gz")
    parser.add_argument(
        "--references", type=str, required=True, help="folder of masks of the same names, or a data set"
    )
    parser.add_argument("--output", type=str, required=True, help="folder to create for cases.csv and summary.json")
    parser.add_argument(
        "--unit",
        type=Literal["volume", "slice"],
        default="volume",
        help="what one measurement is of; means are over these",
    )
    parser.add_argument(
        "--protocol", type=Literal["lascarqs2022"] | None, default=None, help="also write this challenge's own table"
    )
    parser.add_argument(
        "--empty",
        type=Literal["one", "zero", "skip"],
        default="one",
        help="what nothing predicted counts where the reference is empty: perfect, worst, or left out",
    )
    parser.add_argument("--cases", type=str, help="a run's split.json: score only its test cases")
    options = parse_arguments(parser, arguments)

    output = Path(options.output)
    if output.exists() or output.is_symlink():
        raise InputError(f"--output={output}: exists already; name a new folder")
    if options.protocol and (options.unit, options.empty) not in (("volume", "one"), ("volume", "zero")):
        raise InputError(f"--protocol={options.protocol} scores every volume; leave --unit=slice and --empty=skip out")

    pairs, labels = _match(Path(options.predictions), Path(options.references), options.cases)
    labels = _check(pairs, labels)
    if options.protocol and len(labels.names) > 1:
        raise InputError(f"--protocol={options.protocol} has one class, the LA cavity; found {labels.describe()}")

    rows = []
    for number, (case_id, prediction, reference) in enumerate(pairs, start=1):
        rows += _score(case_id, prediction, reference, labels, options.unit, options.empty)
        log.info("%d/%d %s", number, len(pairs), case_id)
    summary = summarise(rows, options.unit, options.empty, labels.names)
    _write(output, rows, summary, options.protocol)
    print(summary_table(summary))
    print(f"{len(pairs)} cases; {summary['averaging']}; {summary['empty_rule']}")
    if options.empty == "skip":
        print(
            f"left out: {summary['skipped']['units']} {options.unit}s, {summary['skipped']['rows']} rows of cases.csv"
        )
    print(f"written to {output}")


def _match(
    predictions: Path, references: Path, cases: str | None
) -> tuple[list[tuple[str, Path, Path]], Labels | None]:
    """(case id, prediction, reference) of every case; and the classes, where the references are a data set."""
    from jaxla.data.cases import MASK_SUFFIXES, find_cases
    from jaxla.data.split import read_test_cases

    predicted = _masks_in(predictions, "--predictions")
    if not predicted:
        raise InputError(f"--predictions={predictions}: no .nii or .nii.gz file in this folder")
    referenced, labels = _masks_in(references, "--references"), None
    images_too = any(name + suffix in referenced for name in referenced for suffix in MASK_SUFFIXES)
    if images_too or not referenced:
        dataset = find_cases(references)
        referenced, labels = {case.id: case.mask for case in dataset.cases}, dataset.labels

    if cases:
        chosen = read_test_cases(Path(cases))
        if missing := [name for name in chosen if name not in referenced]:
            raise InputError(f"--cases={cases}: its test case {missing[0]} is not among the references")
        referenced = {name: referenced[name] for name in chosen}

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
    return [(name, predicted[name], path) for name, path in referenced.items()], labels


def _masks_in(folder: Path, option: str) -> dict[str, Path]:
    """The NIfTI files directly in a folder, by name without ending."""
    if not folder.is_dir():
        raise InputError(f"{option}={folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith("."):
            name = path.name.removesuffix(".gz").removesuffix(".nii")
            if name in found:
                raise InputError(f"{path}: {found[name].name} is the same case; keep one of the two")
            found[name] = path
    return found


def _check(pairs: list[tuple[str, Path, Path]], labels: Labels | None) -> Labels:
    """Read every file once, before the long work: it is sound, on its partner's grid, and its values are classes.

    Without a data set that says its classes: where no file has more than one value besides 0, that is the one class;
    otherwise each value found in the references is a class.
    """
    from jaxla.data.labels import Labels
    from jaxla.data.volumes import read_mask, require_same_grid

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
    for path in sorted(to_check, key=lambda path: -len(values[path])):
        if labels.values is None:
            beyond = values[path] if len(values[path]) > 1 else set()
        else:
            beyond = values[path] - set(labels.ignored).union(*labels.values)
        if beyond:
            classes = labels.describe() or "none, as every reference is empty"
            raise InputError(f"{path}: has the values {sorted(beyond)[:5]}, but the classes are {classes}")
    return labels


def _values(array: np.ndarray) -> set[int]:
    """The values of a mask besides 0."""
    import numpy as np

    return set(np.unique(array[array != 0]).tolist())


def _score(case_id: str, prediction: Path, reference: Path, labels: Labels, unit: str, empty: str) -> list[Row]:
    from jaxla.data.volumes import read_mask, slice_geometry, to_slices
    from jaxla.evaluation.summary import score_case

    volume = read_mask(reference)
    masks = [labels.to_classes(read_mask(prediction).array, prediction), labels.to_classes(volume.array, reference)]
    spacing = volume.spacing
    if unit == "slice":
        geometry = slice_geometry(volume.affine)
        masks, spacing = [to_slices(mask, geometry) for mask in masks], geometry.spacing
    return score_case(case_id, *masks, spacing, labels.names, unit=unit, slice_axis=0, empty=empty)


def _write(output: Path, rows: list[Row], summary: dict, protocol: str | None) -> None:
    """All files into a folder beside the output, which then takes its name."""
    from jaxla.evaluation.summary import write_cases, write_lascarqs2022, write_summary

    beside = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        beside.mkdir(parents=True)
        write_cases(rows, beside / "cases.csv")
        write_summary(summary, beside / "summary.json")
        if protocol == "lascarqs2022":
            write_lascarqs2022(rows, beside / "lascarqs2022.csv")
        beside.rename(output)
    except OSError as error:
        raise InputError(f"--output={output}: cannot be written ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
