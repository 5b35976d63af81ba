"""The test of a trained run: every test case is segmented on its own grid and scored, as is the atlas baseline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxla.cli.terminal import track
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.data.slices import canonical_to_slices, from_slices, slice_geometry, slices_to_canonical
from jaxla.data.volumes import read_grid, write_volume
from jaxla.distributed import gather, is_first, local_items
from jaxla.evaluation.atlas import Atlas, apply_atlas, build_atlas, choose_threshold
from jaxla.evaluation.summary import Row, score_case, summarise_test, write_cases, write_summary
from jaxla.inference.segment import SegmentSlices
from jaxla.nnunet.postprocessing import choose_largest
from jaxla.runs.folder import LARGEST, PREDICTIONS, SUMMARY, TEST_CASES, TEST_SLICES
from jaxla.runs.trained import TrainedRun
from jaxla.tasks import Features

log = logging.getLogger(__name__)

HOW_TO_TEST = "To test, segment labelled scans with `jaxla.predict` and score them with `jaxla.evaluate`."

SegmentCase = Callable[[PreparedVolume], np.ndarray]  # -> classes [S, H, W]


def choose_postprocessing(run: TrainedRun, data: PreparedData, run_dir: Path) -> TrainedRun:
    """Decide on the validation cases whether to keep only the largest connected components; store the decision.

    Each process segments its share of the cases.
    """
    segment_case = make_segment_case(run, replace(run, largest=()).segment, None)
    volumes = (data.volumes[name] for name in track(local_items(data.split.val), "validating"))
    cases = ((volume.id, segment_case(volume), volume.mask) for volume in volumes)
    return replace(run, largest=choose_largest(cases, run.record.labels.names, run_dir / LARGEST))


def make_segment_case(run: TrainedRun, segment: SegmentSlices, features: Features | None) -> SegmentCase:
    """Return a function that segments a test case, from cached features if possible (not if flips are averaged)."""
    if features is None or run.record.experiment.method.postprocessing.flips:
        return lambda volume: segment(volume.image, slice_geometry(read_grid(volume.case.image).affine), False)[0]
    segment_features = run.task.make_segment_features(run.networks)
    return lambda volume: run.postprocess(segment_features(volume, features.by_case[volume.id]))


def score_test_cases(
    run: TrainedRun, data: PreparedData, segment_case: SegmentCase, run_dir: Path, about: Mapping[str, Any]
) -> tuple[list[Row], dict[str, Any]]:
    """Segment and score every test case; write `test/`, and return the rows of `cases.csv` and the summary.

    The summary has mean, sd, n and unit of each metric per volume, the same per slice under "slice" and of the atlas
    baseline under "atlas", and the entries `about`; without test cases only these. Each process segments its share of
    the cases; only the first process returns rows and summary.
    """
    names = run.record.labels.names
    split = data.split
    if not split.test:
        if is_first():
            log.warning("no test cases. %s", HOW_TO_TEST)
            (run_dir / SUMMARY).parent.mkdir(exist_ok=True)
            write_summary(about, run_dir / SUMMARY)
        return [], dict(about)
    atlas = make_atlas(data, len(names))
    rows, slice_rows, atlas_rows = [], [], []
    for case_id in track(local_items(split.test), "testing"):
        volume = data.volumes[case_id]
        predicted = segment_case(volume)
        write_prediction(predicted, volume, run, run_dir / PREDICTIONS / f"{case_id}.nii.gz")
        rows += score_case(case_id, predicted, volume.mask, volume.spacing, names)
        slice_rows += score_case(case_id, predicted, volume.mask, volume.spacing, names, "slice")
        baseline = atlas_mask(atlas, volume)
        atlas_rows += score_case(case_id, baseline, volume.mask, volume.spacing, names)
    rows, slice_rows, atlas_rows = (gather_in_order(part, split.test) for part in (rows, slice_rows, atlas_rows))
    if not is_first():
        return [], {}
    rows, summary = summarise_test(rows, slice_rows, atlas_rows, names)
    summary["atlas"]["threshold"] = atlas.threshold
    summary |= about
    write_cases(rows, run_dir / TEST_CASES)
    write_cases(slice_rows, run_dir / TEST_SLICES)
    write_summary(summary, run_dir / SUMMARY)
    return rows, summary


def write_prediction(classes: np.ndarray, volume: PreparedVolume, run: TrainedRun, path: Path) -> None:
    """Write classes [S, H, W] as a mask with the data set's label values, on the scan's own grid."""
    grid = read_grid(volume.case.image)
    stored = np.ascontiguousarray(from_slices(classes, slice_geometry(grid.affine)))
    write_volume(path, run.record.labels.to_values(stored), grid)


def make_atlas(data: PreparedData, classes: int) -> Atlas:
    """Return the atlas baseline of the training masks.

    Its threshold is chosen on the validation masks, or if there are none on the training masks.
    """

    def masks(ids: Iterable[str]) -> Iterator[np.ndarray]:
        return (slices_to_canonical(volume.mask, volume.slice_axis) for volume in data.select_volumes(ids))

    return choose_threshold(build_atlas(masks(data.split.train), classes), masks(data.split.val or data.split.train))


def atlas_mask(atlas: Atlas, volume: PreparedVolume) -> np.ndarray:
    """Return the atlas baseline's mask [S, H, W] for a volume."""
    shape = slices_to_canonical(volume.mask, volume.slice_axis).shape
    return canonical_to_slices(apply_atlas(atlas, shape), volume.slice_axis)


def gather_in_order(rows: list[Row], case_ids: Sequence[str]) -> list[Row]:
    """Return the rows of all processes, in the order of the cases."""
    all_rows = [row for process_rows in gather(rows) for row in process_rows]
    return sorted(all_rows, key=lambda row: case_ids.index(row["case"]))  # stable: a case's rows keep their order
