"""The scans of a run, `scans.json`: their hashes, and the ranges of spacing, size and grey values in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from jaxla.cli.files import write_atomically
from jaxla.cli.json_files import read_json
from jaxla.data.dataset import PreparedData
from jaxla.data.inputs import intensity_range
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.split import ALL_FOLDS
from jaxla.data.volumes import Volume
from jaxla.runs.folder import SPLIT, read_split_file

SCANS = "scans.json"
PARTS = {"train": "training", "val": "validation", "test": "test", "unused": "unused"}
# Limits within which a scan counts as similar to the training scans. For any three of 60 hippocampus scans, all 60 are
# within these limits.
MAX_FACTOR = 1.5  # largest factor between spacings and between sizes
MAX_GREY_DIFFERENCE = 0.2
MAX_SAMPLES = 1_000_000  # approximate number of voxels whose median is taken


Lengths = tuple[float, float, float]  # along slices, rows and columns, in mm


class ScanFacts(NamedTuple):
    """The properties in which scans are compared. Lengths are along slices, rows and columns."""

    slice_axis: str
    spacing_mm: tuple[float, ...]
    size_mm: tuple[float, ...]
    grey_median: float  # 0 is the 0.5th percentile of the grey values, 1 the 99.5th; MRI has no absolute scale


class _TrainingScans(TypedDict):
    """The result of `summarise_scans`: the slice axes, and the smallest and the largest value of the other facts."""

    slice_axis: list[str]
    spacing_mm: tuple[Lengths, Lengths]
    size_mm: tuple[Lengths, Lengths]
    grey_median: tuple[float, float]


class _ScansFile(TypedDict):
    """The content of `scans.json`."""

    training: _TrainingScans
    voxels_sha256: dict[str, str]


class KnownScans(NamedTuple):
    """The scans of a run, from `scans.json` and `split.json`."""

    part_of_case: dict[str, str]  # case id -> `training`, `validation`, `test` or `unused`
    case_of_hash: dict[str, str]  # hash of the voxels -> case id; empty for a run without `scans.json`
    training: dict[str, Any]  # see `summarise_scans`; empty for a run without `scans.json`


def write_known_scans(folder: Path, data: PreparedData) -> None:
    """Write `scans.json` into a run's folder. Raises OSError if that is not possible."""
    # With --fold=all, each of these cases was a training case of some of the averaged networks.
    ids = data.split.train + data.split.val if data.fold == ALL_FOLDS else data.split.train
    facts = [
        _facts(volume.slice_axis, volume.spacing, volume.shape, volume.intensity_range, volume.image)
        for volume in data.select_volumes(ids)
    ]
    hashes = {volume.id: volume.image_sha256 for volume in data.volumes.values()}
    content = {"training": summarise_scans(facts), "voxels_sha256": hashes}
    write_atomically(folder / SCANS, json.dumps(content, indent=1) + "\n")


def read_known_scans(folder: Path, fold: str) -> KnownScans:
    """Read what a run recorded about its scans; `fold` as in its experiment.

    Raises:
        InputError: a file is damaged.
    """
    titles = PARTS | ({"val": "training"} if fold == ALL_FOLDS else {})
    split = read_split_file(folder) if (folder / SPLIT).exists() else {}
    parts = {str(case): title for part, title in titles.items() for case in split.get(part, ())}
    if not (folder / SCANS).exists():
        return KnownScans(parts, {}, {})
    content = read_json(folder / SCANS, _ScansFile)
    return KnownScans(parts, {sha256: case for case, sha256 in content["voxels_sha256"].items()}, content["training"])


def find_part(scans: KnownScans, case: str, voxels_sha256: str) -> str:
    """Return the part of the split that a scan was in, found by its voxels or else by its name; "" if in none."""
    if known := scans.case_of_hash.get(voxels_sha256):
        return scans.part_of_case.get(known, "unused")
    return f"{scans.part_of_case[case]} (same name)" if case in scans.part_of_case else ""


def describe_scan(volume: Volume) -> ScanFacts:
    """Return the properties in which a scan is compared with the training scans."""
    geometry = slice_geometry(volume.affine)
    slices = to_slices(volume.array, geometry)
    return _facts(geometry.axis, geometry.spacing, slices.shape, intensity_range(volume.array), slices)


def summarise_scans(scans: Sequence[ScanFacts]) -> dict[str, Any]:
    """Return the slice axes of scans, and for each other fact of `ScanFacts` the smallest and the largest value."""
    summary: dict[str, Any] = {"slice_axis": sorted({scan.slice_axis for scan in scans})}
    for name in ("spacing_mm", "size_mm", "grey_median"):
        values = np.array([getattr(scan, name) for scan in scans])
        summary[name] = [values.min(axis=0).tolist(), values.max(axis=0).tolist()]
    return summary


def find_differences(scan: ScanFacts, training: Mapping[str, Any]) -> list[str]:
    """Return descriptions of how a scan differs from the training scans, which `summarise_scans` summarised."""
    differences = []
    if scan.slice_axis not in training["slice_axis"]:
        differences.append(f"slices along {scan.slice_axis} (training: {' or '.join(training['slice_axis'])})")
    for name, title in (("spacing_mm", "spacing"), ("size_mm", "size")):
        low, high = np.array(training[name], float)
        values = np.array(getattr(scan, name))
        if (values < low / MAX_FACTOR).any() or (values > high * MAX_FACTOR).any():
            differences.append(f"{title} {_lengths(values)} mm (training: {_range(_lengths(low), _lengths(high))} mm)")
    low, high = map(float, training["grey_median"])
    if not low - MAX_GREY_DIFFERENCE <= scan.grey_median <= high + MAX_GREY_DIFFERENCE:
        median = f"median grey value at {scan.grey_median:.0%} of the range"
        differences.append(f"{median} (training: {_range(f'{low:.0%}', f'{high:.0%}')})")
    return differences


def _facts(
    axis: str, spacing: Sequence[float], shape: Sequence[int], grey_range: tuple[float, float], slices: np.ndarray
) -> ScanFacts:
    low, high = grey_range
    step = max(1, slices.size // MAX_SAMPLES)  # distance between the rows that are read
    median = float(np.median(slices[:, step // 2 :: step] if step < slices.shape[1] else slices))
    size = tuple(n * mm for n, mm in zip(shape, spacing, strict=True))
    return ScanFacts(axis, tuple(spacing), size, (median - low) / (high - low))


def _lengths(values: np.ndarray) -> str:
    return " × ".join(f"{value:.3g}" for value in values)


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
