"""The test of a trained run: every test case segmented on its own grid, scored beside the atlas, and reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxla.cli.terminal import track
from jaxla.data.batches import SliceSource
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.data.split import ALL_FOLDS
from jaxla.data.volumes import (
    canonical_to_slices,
    from_slices,
    read_image,
    read_mask,
    slice_geometry,
    slices_to_canonical,
    to_slices,
)
from jaxla.distributed import gather, is_first, local_items
from jaxla.evaluation.atlas import Atlas, apply_atlas, build_atlas, choose_threshold
from jaxla.evaluation.summary import (
    Row,
    case_means,
    score_case,
    summarise_test,
    worst_median_best,
    write_cases,
    write_summary,
)
from jaxla.inference.postprocessing import postprocess
from jaxla.inference.segment import Segment, make_segment, make_segment_inputs, write_segmentation
from jaxla.inference.trained import TrainedNetwork, load_run
from jaxla.nnunet.patches import PatchSource
from jaxla.nnunet.postprocessing import choose_largest, keep_largest
from jaxla.pipeline.checks import unread_options
from jaxla.pipeline.cost import measure_cost
from jaxla.reporting.overlays import Panel, draw_overlays
from jaxla.reporting.run_report import write_report
from jaxla.runs.cost import write_cost
from jaxla.runs.folder import (
    COST,
    LARGEST,
    OVERLAYS,
    PREDICTIONS,
    REPORT,
    SPLIT,
    SUMMARY,
    TEST_CASES,
    TEST_SLICES,
    fold_folders,
    read_metrics,
)
from jaxla.runs.record import RECORD, describe_backbone
from jaxla.training.features import CachedFeatures

Features = Mapping[str, CachedFeatures]  # by case id


def run_test(data: PreparedData, features: Features | None, run_dir: Path, step_bytes: int) -> dict[str, Any]:
    """Segment and score every test case on its own grid, beside the atlas; leaves `test/`, the cost and the report.

    Returns:
        The summary: per metric mean, sd, n and unit, per volume; under "slice" the same per slice; under "atlas" the
        atlas's. Of several processes the first returns and writes it, and all segment their share of the cases.
    """
    split = data.split
    trained = load_run(run_dir)
    experiment = trained.record.experiment
    of_folds = experiment.fold == ALL_FOLDS
    if experiment.postprocessing.largest == "if_better" and not of_folds:
        names, cases = trained.record.labels.names, _validation_cases(replace(trained, largest=()), data)
        trained = replace(trained, largest=choose_largest(cases, names, run_dir / LARGEST))
    segment = make_segment(trained)
    segment_case = segment_of_case(trained, segment, features)
    names = trained.record.labels.names
    atlas = atlas_of(data, len(names))
    rows, slice_rows, atlas_rows = [], [], []
    for name in track(local_items(split.test), "testing"):
        prepared = data.volumes[name]
        predicted = segment_case(prepared, run_dir / PREDICTIONS / f"{name}.nii.gz")
        rows += score_case(name, predicted, prepared.mask, prepared.spacing, names)
        slice_rows += score_case(name, predicted, prepared.mask, prepared.spacing, names, "slice")
        shape = slices_to_canonical(prepared.mask, prepared.slice_axis).shape
        of_atlas = canonical_to_slices(apply_atlas(atlas, shape), prepared.slice_axis)
        atlas_rows += score_case(name, of_atlas, prepared.mask, prepared.spacing, names)
    rows, slice_rows, atlas_rows = (in_order(of_all, split.test) for of_all in (rows, slice_rows, atlas_rows))
    if not is_first():
        return {}

    rows, summary = summarise_test(rows, slice_rows, atlas_rows, names)
    summary["atlas"]["threshold"] = atlas.threshold
    if not of_folds:
        summary["best_epoch"] = trained.epoch
    summary["backbone"] = describe_backbone(experiment)
    if len(trained.networks) == 1 and hasattr(trained.network, "block_weights"):
        summary["block_weights"] = trained.network.block_weights()
    write_cases(rows, run_dir / TEST_CASES)
    write_cases(slice_rows, run_dir / TEST_SLICES)
    write_summary(summary, run_dir / SUMMARY)

    deepest = max(volume.shape[0] for volume in data.of(split.train + split.val))
    cost = measure_cost(trained, segment, data.of(split.test), step_bytes, deepest)
    write_cost(cost, run_dir / COST)

    panels = panels_of(data, rows, run_dir / PREDICTIONS)
    draw_overlays(panels, run_dir / OVERLAYS)
    write_report(
        run_dir / REPORT,
        record=json.loads((run_dir / RECORD).read_text()),
        split=split.parts,
        history=[] if of_folds else read_metrics(run_dir),
        rows=rows,
        summary=summary,
        cost=asdict(cost),
        panels=panels,
        unread=unread_options(experiment),
        counted=PatchSource.counted if trained.plan else SliceSource.counted,
        folds=[_of_fold(folder) for folder in fold_folders(run_dir)] if of_folds else (),
        largest=[[names[k - 1] for k in group] for group in trained.largest]
        if experiment.postprocessing.largest == "if_better"
        else None,
    )
    return summary


def _validation_cases(trained: TrainedNetwork, data: PreparedData) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (case id, predicted, reference) of this process's validation cases."""
    segment = make_segment(trained)
    for name in track(local_items(data.split.val), "validating"):
        prepared = data.volumes[name]
        volume = read_image(prepared.case.image)
        yield name, to_slices(segment(volume)[0], slice_geometry(volume.affine)), prepared.mask


def _of_fold(folder: Path) -> dict[str, Any]:
    """What the report of all folds says of one."""
    summary, history = json.loads((folder / SUMMARY).read_text()), read_metrics(folder)
    kept = next(line for line in history if line["epoch"] == summary["best_epoch"])
    return {
        "folder": folder.name,
        "patients": len(json.loads((folder / SPLIT).read_text())["val"]),
        **{name: kept[name] for name in ("epoch", "val_dice", "val_iou")},
        "test_dice": summary["dice"]["mean"],
        "test_iou": summary["iou"]["mean"],
        "minutes": sum(line["seconds"] for line in history) / 60,
    }


def segment_of_case(
    trained: TrainedNetwork, segment: Segment, features: Features | None
) -> Callable[[PreparedVolume, Path], np.ndarray]:
    """`(case, path) -> classes [S, H, W]`; the mask is written to `path` on the scan's own grid.

    Where there are features, the rest of the network runs on these.
    """
    canvas, experiment = trained.record.canvas, trained.record.experiment
    if features:
        networks = [network.on_features((canvas.size, canvas.size)) for network in trained.networks]
        segment_slices = make_segment_inputs(trained, networks)

    def segment_case(prepared: PreparedVolume, path: Path) -> np.ndarray:
        volume = read_image(prepared.case.image)
        geometry = slice_geometry(volume.affine)
        if features:
            frame = canvas.frame(prepared.shape[1:], prepared.spacing[1:])
            inputs = features[prepared.id]
            if trained.networks[0].READS_IMAGES:
                inputs = zip(inputs, (prepared.input(s, frame) for s in range(prepared.shape[0])), strict=True)
            predicted, _ = segment_slices(inputs, frame, prepared.shape)
            predicted = keep_largest(postprocess(predicted, experiment.postprocessing), trained.largest)
            classes = np.ascontiguousarray(from_slices(predicted, geometry))
        else:
            classes, _ = segment(volume)
            predicted = to_slices(classes, geometry)
        write_segmentation(path, classes, trained, volume)
        return predicted

    return segment_case


def atlas_of(data: PreparedData, classes: int) -> Atlas:
    """Built of the training masks; its threshold chosen on the validation masks."""

    def canonical_masks(ids: Iterable[str]) -> Iterable[np.ndarray]:
        return (slices_to_canonical(v.mask, v.slice_axis) for v in data.of(ids))

    return choose_threshold(build_atlas(canonical_masks(data.split.train), classes), canonical_masks(data.split.val))


def in_order(rows: list[Row], cases: Sequence[str]) -> list[Row]:
    """The rows of all processes, in the order of the cases."""
    of_all = [row for of_process in gather(rows) for row in of_process]
    return sorted(of_all, key=lambda row: cases.index(row["case"]))  # stable: a case's own rows keep their order


def panels_of(data: PreparedData, rows: Sequence[Row], predictions: Path) -> list[Panel]:
    """The test cases of the lowest, the median and the highest Dice, with what was predicted for them."""
    dice, panels = case_means(rows, "dice"), []
    for name, rank in worst_median_best(dice).items():
        prepared = data.volumes[name]
        mask = read_mask(predictions / f"{name}.nii.gz")
        prediction = to_slices(mask.array, slice_geometry(mask.affine))
        title = f"{rank} of {len(dice)}: {name}, Dice {dice[name]:.3f}"
        panels.append(Panel(title, prepared.image, prediction, prepared.mask, prepared.spacing))
    return panels
