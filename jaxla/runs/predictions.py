"""The files that predict writes next to its masks: `predictions.csv`, and a mark that they are unfinished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from scipy import ndimage

from jaxla.cli.csv_files import read_csv, write_csv
from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.json_files import read_json
from jaxla.config import InputError
from jaxla.data.slices import slice_geometry
from jaxla.data.volumes import Volume
from jaxla.distributed import barrier, is_first
from jaxla.runs.record import Record

COLUMNS = (
    "case",
    "class",
    "volume_ml",
    "voxels",
    "connected_parts",  # voxels of one part share faces
    "slices",  # number of slices that contain the class
    "touches_border",  # whether the class touches the border of the scan
    "spacing_x_mm",
    "spacing_y_mm",
    "spacing_z_mm",
    "part_of_run",  # training, validation, test or unused; empty for a new scan
    "unlike_training_scans",
    "scan",
    "run",
    "run_id",
    "epoch",
)


class Origin(NamedTuple):
    """The network that a mask comes from."""

    run: str  # folder, as the user gave it
    run_id: str  # does not depend on where the folder is
    epoch: int


class Unfinished(NamedTuple):
    """The task of an interrupted command."""

    origin: Origin
    cases: tuple[str, ...]  # ids of all cases that it was to segment
    overwrite: bool  # whether it replaced earlier masks


class _UnfinishedFile(TypedDict):
    """The content of the file that marks masks as unfinished."""

    run: str
    run_id: str
    epoch: int
    overwrite: bool
    cases: list[str]


def run_id(record: Record) -> str:
    """Return a short unique id of a run."""
    return hashlib.sha256(f"{record.begun} {record.command} {record.data_sha256}".encode()).hexdigest()[:12]


def describe_mask(classes: np.ndarray, names: Sequence[str], volume: Volume) -> list[dict[str, Any]]:
    """Return a row of `predictions.csv` for each class, with the columns that depend only on the mask.

    Args:
        classes: class indices on the grid of the scan `volume`.
        names: names of the foreground classes.
    """
    slice_axis = slice_geometry(volume.affine).order[0]
    voxel_ml = math.prod(volume.spacing) / 1000
    rows = []
    for index, name in enumerate(names, start=1):
        mask = classes == index
        voxels = int(mask.sum())
        sides = [np.take(mask, side, axis) for axis, n in enumerate(mask.shape) if n > 1 for side in (0, -1)]
        rows.append({
            "class": name,
            "volume_ml": voxels * voxel_ml,
            "voxels": voxels,
            "connected_parts": int(ndimage.label(mask)[1]),
            "slices": int(mask.any(axis=tuple({0, 1, 2} - {slice_axis})).sum()),
            "touches_border": "yes" if any(side.any() for side in sides) else "no",
        })  # fmt: skip
    return rows


def find_kept(outputs: Mapping[str, Path], table: Path, origin: Origin) -> list[str]:
    """Return the cases whose mask exists, for `--continue`.

    Args:
        outputs: case id -> path of its mask; all existing masks belong to `recorded_cases`.

    Raises:
        InputError: a mask was not, or not certainly, written by the network `origin`.
    """
    expected = f"by --run={origin.run}, epoch {origin.epoch}"
    marker = unfinished_file(table)
    fix = "Use --overwrite to replace the masks, or another --output."
    unfinished = read_unfinished(table)
    if unfinished and unfinished.overwrite:
        problem = "--overwrite was interrupted, so some masks are new and some are not"
        raise InputError(marker, problem, "Use --overwrite again, or another --output.")
    if unfinished and unfinished.origin[1:] != origin[1:]:
        problem = f"written by --run={unfinished.origin.run}, epoch {unfinished.origin.epoch}, not {expected}"
        raise InputError(marker, problem, fix)
    origins = {row["case"]: (row["run_id"], row["epoch"]) for row in read_table(table)}
    kept = [case for case, mask in outputs.items() if mask.exists()]
    for case in kept:
        if case in origins and origins[case] != (origin.run_id, str(origin.epoch)):
            raise InputError(outputs[case], f"not written {expected}", fix)
    return kept


def recorded_cases(table: Path) -> set[str]:
    """Return the cases whose masks predict is known to have written, or to have begun."""
    unfinished = read_unfinished(table)
    return {row["case"] for row in read_table(table)} | set(unfinished.cases if unfinished else ())


def read_unfinished(table: Path) -> Unfinished | None:
    """Return what `mark_unfinished` wrote, or None if no command was interrupted.

    Raises:
        InputError: the file is damaged.
    """
    marker = unfinished_file(table)
    if not marker.exists():
        return None
    content = read_json(marker, _UnfinishedFile, "Use another --output.")
    origin = Origin(content["run"], content["run_id"], content["epoch"])
    return Unfinished(origin, tuple(content["cases"]), content["overwrite"])


def unfinished_file(table: Path) -> Path:
    """Return the file that records which network writes the masks, until the table is complete."""
    return table.with_suffix(".unfinished.json")


@contextmanager
def mark_unfinished(table: Path, origin: Origin, cases: Sequence[str], overwrite: bool) -> Iterator[None]:
    """Mark the masks of these cases as unfinished until the context ends without an error.

    With `overwrite`, the rows of earlier masks leave the table, because the masks may be replaced at any time.
    """
    marker = unfinished_file(table)
    if is_first():
        with report_os_errors("written", marker, "Use another --output."):
            marker.parent.mkdir(parents=True, exist_ok=True)
            content = {**origin._asdict(), "overwrite": overwrite, "cases": cases}
            write_atomically(marker, json.dumps(content, indent=1) + "\n")
        if overwrite and table.exists():
            replace_rows(table, cases, [])
    barrier()  # no process writes a mask before this
    yield
    if is_first():
        marker.unlink(missing_ok=True)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of `predictions.csv`, or an empty list if the file does not exist.

    Raises:
        InputError: the file is not a table of predictions.
    """
    if not path.exists():
        return []
    try:
        rows = read_csv(path)
        if rows and (missing := [column for column in COLUMNS if column not in rows[0]]):
            raise ValueError(f"no column {missing[0]}")
    except (OSError, ValueError) as error:
        raise InputError(path, f"not a table of predictions ({error})", "Move it away.") from error
    return rows


def replace_rows(path: Path, cases: Collection[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of these cases in `predictions.csv`; the new rows follow those of other cases.

    Columns that a user added are kept; they are empty in the new rows.
    """
    earlier = [row for row in read_table(path) if row["case"] not in cases]
    added = dict.fromkeys(column for row in earlier for column in row if column not in COLUMNS)
    with report_os_errors("written", path, "Use another --output."):
        write_csv(path, (*COLUMNS, *added), [*earlier, *rows])
