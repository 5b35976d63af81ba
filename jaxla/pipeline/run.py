"""One run, stage by stage: scans -> prepared volumes and a split -> a trained network -> test results and report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxla.config import Augmentation, Experiment, InputError
from jaxla.data.batches import SliceSource
from jaxla.data.volumes import (
    canonical_to_slices,
    from_slices,
    read_image,
    read_mask,
    slice_geometry,
    slices_to_canonical,
    to_slices,
)
from jaxla.devices.memory import exhaustion_named
from jaxla.devices.mesh import on_host, use_own_devices
from jaxla.devices.processes import gather, is_first, share, wait_for_all
from jaxla.evaluation.atlas import apply_atlas, build_atlas, choose_threshold
from jaxla.evaluation.summary import score_case, summarise_test, worst_median_best, write_cases, write_summary
from jaxla.inference.segment import make_segment, make_segment_slices, write_segmentation
from jaxla.inference.trained import load_run
from jaxla.models.build import build_network
from jaxla.models.weights import parameters_sha256, save_random
from jaxla.pipeline.cost import measure_cost
from jaxla.pipeline.data import PreparedData, say_what_is_cut
from jaxla.pipeline.progress import track
from jaxla.reporting.curves import draw_curves
from jaxla.reporting.overlays import Panel, draw_overlays
from jaxla.reporting.run_report import write_report
from jaxla.runs.cost import write_cost
from jaxla.runs.folder import (
    BACKBONE,
    COST,
    CURVES,
    OVERLAYS,
    PREDICTIONS,
    REPORT,
    SUMMARY,
    TEST_CASES,
    TEST_SLICES,
    read_metrics,
)
from jaxla.runs.record import FEATURES_KEPT, RECORD, method_label, read_record, write_record
from jaxla.training.features import CachedFeatures, FeatureCache
from jaxla.training.loop import fit
from jaxla.training.step import count_parameters, split_network

log = logging.getLogger(__name__)

Features = Mapping[str, CachedFeatures]  # by case id


def train_and_test(experiment: Experiment, data: PreparedData, run_dir: Path, cache_dir: Path) -> dict[str, Any]:
    """All of a run once its folder is there; begins where the folder says it ended. Returns the summary of the test."""
    say_what_is_cut(data, data.canvas(experiment.preprocessing))
    with on_host():
        network = build(experiment, data.dataset.labels.outputs, run_dir)
    features, origin = cached_features(experiment, network, data, cache_dir)
    if is_first():
        write_record(run_dir, replace(read_record(run_dir), features=origin))
    step_bytes = train(experiment, network, data, features, run_dir)
    del network  # the trained one is loaded with its own backbone
    with use_own_devices():
        return test(data, features, run_dir, step_bytes)


def build(experiment: Experiment, outputs: int, run_dir: Path) -> nnx.Module:
    """The untrained network of a run; a random backbone that stays frozen is kept in the run's folder.

    Raises:
        InputError: the backbone that was kept is damaged, and its seed gives another one now.
    """
    model, seed = experiment.model, experiment.seed
    if model.backbone == "finetuned" or model.weights != "random":
        return build_network(model, outputs, seed)
    kept, record = run_dir / BACKBONE, read_record(run_dir)
    wait_for_all()  # the first one writes it anew
    if record.weights_sha256:  # a resumed run
        try:
            network = build_network(replace(model, weights=str(kept)), outputs, seed)
            if parameters_sha256(network.backbone) == record.weights_sha256:
                return network
        except InputError:  # missing or truncated
            pass
        if is_first():
            log.warning("%s: missing or damaged; drawn again from seed %d", kept, seed)
    network = build_network(model, outputs, seed)
    sha256 = parameters_sha256(network.backbone)
    if record.weights_sha256 not in ("", sha256):
        raise InputError(
            f"{kept}: missing or damaged, and seed {seed} gives another backbone with the present versions; put it back"
        )
    if is_first():
        save_random(kept, network.backbone, model.arch, seed)
        write_record(run_dir, replace(record, weights_sha256=sha256))
    return network


def cached_features(
    experiment: Experiment, network: nnx.Module, data: PreparedData, cache_dir: Path
) -> tuple[Features | None, str]:
    """The features of every slice that the run uses, where they are computed once and the disk holds them.

    Returns:
        The features by case id, or None where the whole network runs in every epoch; and a sentence that says which.
    """
    if reason := why_not_cached(experiment, network):
        if experiment.model.backbone == "frozen" and experiment.training.cache_features:
            log.info(reason)
        return None, reason
    with use_own_devices():
        cache = FeatureCache(cache_dir, network, experiment.model.arch, data.canvas(experiment.preprocessing))
        features = cache.features(data.used, track)
    if features is None:
        return None, "The frozen backbone ran in every epoch: its features did not fit on the disk of the cache folder."
    by_id = {volume.id: of_volume for volume, of_volume in zip(data.used, features, strict=True)}
    return by_id, f"{FEATURES_KEPT}, in {cache.dtype.name}, and cached."


def why_not_cached(experiment: Experiment, network: nnx.Module) -> str:
    """A sentence that says why the whole network runs at every step; empty where a frozen backbone need not."""
    if experiment.model.backbone != "frozen":
        return f"All of {method_label(experiment)} is trained, so all of it runs at every step."
    if not experiment.training.cache_features:
        return "The frozen backbone runs in every epoch, for --training.cache_features is false."
    if not hasattr(network, "on_features"):
        return f"The frozen {experiment.model.arch} runs in every epoch: its features of all scales are not cached."
    if experiment.augmentation != Augmentation():
        return "The frozen backbone runs in every epoch and its features are not cached, for slices are augmented."
    return ""


def train(
    experiment: Experiment, network: nnx.Module, data: PreparedData, features: Features | None, run_dir: Path
) -> int:
    """Train, from the run's latest checkpoint on; leaves checkpoints, metrics.jsonl and progress.png in its folder.

    Returns:
        Device memory of a training step, in bytes.
    """
    canvas = data.canvas(experiment.preprocessing)

    def source(ids: Sequence[str]) -> SliceSource:
        return SliceSource(data.of(ids), canvas, features and [features[name] for name in ids])

    trained = network.on_features((canvas.size, canvas.size)) if features else network
    parts = split_network(trained, train_backbone=experiment.model.backbone == "finetuned")
    of_all, of_trained = (count_parameters(state) for state in (nnx.state(network, nnx.Param), parts.trainable))
    log.info("%s: %d parameters are trained, %d are frozen", method_label(experiment), of_trained, of_all - of_trained)
    with exhaustion_named(experiment.training.batch_size):
        best = fit(
            parts,
            source(data.split.train),
            source(data.split.val),
            experiment.training,
            augmentation=experiment.augmentation,
            seed=experiment.seed,
            pretrained_backbone=experiment.model.weights != "random",
            folder=run_dir,
            on_epoch=lambda history: draw_curves(
                history, f"{experiment.name}, {method_label(experiment)}", run_dir / CURVES
            ),
        )
    log.info("best epoch %d: validation Dice %.3f per volume", best.best_epoch, best.best_dice)
    return best.step_bytes


def test(data: PreparedData, features: Features | None, run_dir: Path, step_bytes: int) -> dict[str, Any]:
    """Segment and score every test case on its own grid, beside the atlas; leaves `test/`, the cost and the report.

    Returns:
        The summary: per metric mean, sd, n and unit, per volume; under "slice" the same per slice; under "atlas" the
        atlas's. Of several processes the first returns and writes it, and all segment their share of the cases.
    """
    split = data.split
    trained = load_run(run_dir)
    experiment = trained.record.experiment
    names = trained.record.labels.names
    canvas, batch_size = trained.record.canvas, experiment.training.batch_size
    segment = make_segment(trained)
    if features:
        network = trained.network.on_features((canvas.size, canvas.size))
        segment_slices = make_segment_slices(network, batch_size, experiment.postprocessing)

    def canonical_masks(ids: Iterable[str]) -> Iterable:
        return (slices_to_canonical(v.mask, v.slice_axis) for v in data.of(ids))

    atlas = choose_threshold(build_atlas(canonical_masks(split.train), len(names)), canonical_masks(split.val))

    rows, slice_rows, atlas_rows = [], [], []
    for name in track(share(split.test), "testing"):
        prepared = data.volumes[name]
        volume = read_image(prepared.case.image)
        geometry = slice_geometry(volume.affine)
        if features:
            frame = canvas.frame(prepared.shape[1:], prepared.spacing[1:])
            predicted, _ = segment_slices(features[name], frame, prepared.shape)
            classes = np.ascontiguousarray(from_slices(predicted, geometry))
        else:
            classes, _ = segment(volume)
            predicted = to_slices(classes, geometry)
        write_segmentation(run_dir / PREDICTIONS / f"{name}.nii.gz", classes, trained, volume)
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
    summary["best_epoch"] = trained.epoch
    summary["backbone"] = describe_backbone(experiment)
    write_cases(rows, run_dir / TEST_CASES)
    write_cases(slice_rows, run_dir / TEST_SLICES)
    write_summary(summary, run_dir / SUMMARY)

    cost = measure_cost(trained, segment, data.of(split.test), step_bytes)
    write_cost(cost, run_dir / COST)

    panels = panels_of(data, rows, run_dir / PREDICTIONS)
    draw_overlays(panels, run_dir / OVERLAYS)
    write_report(
        run_dir / REPORT,
        record=json.loads((run_dir / RECORD).read_text()),
        split=split.parts,
        history=read_metrics(run_dir),
        rows=rows,
        summary=summary,
        cost=asdict(cost),
        panels=panels,
    )
    return summary


def in_order(rows: list[dict[str, Any]], cases: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all processes, in the order of the cases."""
    of_all = [row for of_process in gather(rows) for row in of_process]
    return sorted(of_all, key=lambda row: cases.index(row["case"]))  # stable: a case's own rows keep their order


def panels_of(data: PreparedData, rows: Sequence[Mapping[str, Any]], predictions: Path) -> list[Panel]:
    """The test cases of the lowest, the median and the highest Dice, with what was predicted for them."""
    by_case: dict[str, list[float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row["dice"])
    dice = {name: np.mean(of_classes) for name, of_classes in by_case.items()}
    panels = []
    for name, rank in worst_median_best(dice).items():
        prepared = data.volumes[name]
        mask = read_mask(predictions / f"{name}.nii.gz")
        prediction = to_slices(mask.array, slice_geometry(mask.affine))
        title = f"{rank} of {len(dice)}: {name}, Dice {dice[name]:.3f}"
        panels.append(Panel(title, prepared.image, prediction, prepared.mask, prepared.spacing))
    return panels


def describe_backbone(experiment: Experiment) -> str:
    model = experiment.model
    origin = "random weights" if model.weights == "random" else Path(model.weights).name
    name = method_label(experiment)
    if name == experiment.method != model.arch:
        name += f" on {model.arch}"
    return f"{name} ({origin}, {'frozen' if model.backbone == 'frozen' else 'trained'})"
