"""python -m jaxla.train --exp=NAME: train a method under a protocol, test it, and write the run's folder."""

from __future__ import annotations

import logging
import logging.handlers
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxla.config import Experiment, InputError, lookup, parse_experiment, require_writable, run_command
from jaxla.experiments import EXPERIMENTS, METHODS

if TYPE_CHECKING:
    from jaxla.data.cases import Dataset
    from jaxla.data.prepared import PreparedVolume
    from jaxla.data.split import Split

log = logging.getLogger("jaxla.train")


def main(arguments: list[str]) -> None:
    """Train, test, report.

    Raises:
        InputError: anything wrong with the options, the data or the weights; all of it before training starts.
    """
    options = parse_experiment("jaxla.train", arguments, EXPERIMENTS, METHODS, list_experiments())
    experiment, cache_dir = options.experiment, options.cache_dir
    run_dir = options.run_dir or Path(f"runs/{experiment.name}_{time.strftime('%Y%m%d-%H%M%S')}")
    check_options(experiment)
    began = time.perf_counter()
    early_lines = logging.handlers.MemoryHandler(capacity=1)  # holds the log until there is a folder for it
    logging.getLogger("jaxla").addHandler(early_lines)

    # What can fail is checked before what takes long.
    from jaxla.models.weights import file_sha256, weights_file
    from jaxla.training.run_folder import LOG, Record, create_run_folder, environment, require_free, write_record

    require_free(run_dir)
    require_writable("--cache-dir", cache_dir)
    weights = None
    if experiment.model.weights != "random":
        weights = weights_file(experiment.model.arch, experiment.model.weights, cache_dir).absolute()
        experiment = replace(experiment, model=replace(experiment.model, weights=str(weights)))
    else:
        log.info("%s: no pretrained weights are used", describe_backbone(experiment))

    from jaxla.data.split import write_split

    dataset, volumes, split = prepare_data(experiment, cache_dir)

    create_run_folder(run_dir)
    early_lines.setTarget(logging.FileHandler(run_dir / LOG))
    write_split(split, run_dir / "split.json")
    record = Record(
        experiment=experiment,
        labels=dataset.labels,
        weights=experiment.model.weights,
        weights_sha256=file_sha256(weights) if weights else "",
        split_sha256=split.sha256,
        command=shlex.join(["python", "-m", "jaxla.train", *arguments]),
        environment=environment(),
    )
    write_record(run_dir, record)

    train(experiment, dataset, volumes, split, run_dir)
    summary = test(volumes, split, run_dir)
    dice, iou, atlas = summary["dice"], summary["iou"], summary["atlas"]["dice"]
    log.info("finished in %.0f s", time.perf_counter() - began)
    print(
        f"{summary['backbone']}: test Dice {dice['mean']:.3f}, IoU {iou['mean']:.3f} "
        f"(mean per volume over {dice['n']} patients; the atlas, which never looks at the image: "
        f"Dice {atlas['mean']:.3f}). Run folder: {run_dir}"
    )


def check_options(experiment: Experiment) -> None:
    """Raise an InputError for values that no run can work with."""
    from jaxla.models.dinov2 import VARIANTS

    if not experiment.data.root:
        from jaxla.data.cases import HOW_TO_GET_DATA, LAYOUTS

        raise InputError(
            f"option --data.root is required: a folder in one of these layouts: {'; '.join(LAYOUTS)}. {HOW_TO_GET_DATA}"
        )
    training = experiment.training
    if not experiment.model.decoder_widths:
        raise InputError("option --model.decoder_widths is empty; give at least one width, such as [64,32]")
    least = {
        "training.epochs": (1, training.epochs),
        "training.batch_size": (1, training.batch_size),
        "training.patience": (1, training.patience),
        "preprocessing.image_size": (1, experiment.preprocessing.image_size),
        "model.decoder_widths": (1, min(experiment.model.decoder_widths)),
        "data.phantom_cases": (1, experiment.data.phantom_cases),
        "seed": (0, experiment.seed),
    }
    for option, (bound, value) in least.items():
        if value < bound:
            raise InputError(f"option --{option} must be at least {bound}, got {value}")
    for option in ("learning_rate", "backbone_learning_rate"):
        if not 0 < getattr(training, option) < float("inf"):
            raise InputError(f"option --training.{option} must be a positive number, got {getattr(training, option)}")
    patch = lookup("--model.arch", experiment.model.arch, VARIANTS).patch
    size = experiment.preprocessing.image_size
    if size % patch:
        raise InputError(
            f"option --preprocessing.image_size={size} must be a multiple of the patch size {patch}, "
            f"such as {max(1, round(size / patch)) * patch}"
        )


def list_experiments() -> str:
    lines = ["Experiments (--exp=NAME):"]
    lines += [f"  {e.name:20} {e.summary}; method {e.method}" for e in EXPERIMENTS.values()]
    lines += ["Methods (--method=NAME):"]
    lines += [f"  {m.name:20} {m.summary}" for m in METHODS.values()]
    return "\n".join(lines)


def prepare_data(experiment: Experiment, cache_dir: Path) -> tuple[Dataset, list[PreparedVolume], Split]:
    """Find, check and prepare the cases, and split their patients.

    Raises:
        InputError: no data, unusable data, too few patients, or a class that no training mask has.
    """
    from jaxla.data.cases import find_cases
    from jaxla.data.phantoms import cached_phantoms
    from jaxla.data.prepared import prepare_cases
    from jaxla.data.split import make_split

    protocol = experiment.data
    root = Path(protocol.root)
    if protocol.root == "phantom":
        make_split([f"train_{n + 1}" for n in range(protocol.phantom_cases)], protocol)  # too few? before making them
        root = cached_phantoms(cache_dir, protocol.phantom_size, protocol.phantom_cases)
    dataset = find_cases(root, protocol.labels)
    split = make_split([case.id for case in dataset.cases], protocol)
    volumes = prepare_cases(dataset, cache_dir, track=lambda cases: _track(cases, "preparing"))
    training = [v for v in volumes if v.id in split.train]
    for index, name in enumerate(dataset.labels.names, start=1):
        if not any(v.class_voxels[index] for v in training):
            raise InputError(
                f"{root}: the masks of all {len(training)} training patients hold no {name}; check the masks, or "
                "name their values with --data.labels"
            )
    if outside := len(volumes) - sum(map(len, (split.train, split.val, split.test))):
        log.info("%d cases are in no part of this split and are not used", outside)
    if empty := [v.id for v in volumes if not any(v.class_voxels[1:])]:
        log.info("%d cases have an empty mask and are kept: %s", len(empty), ", ".join(empty))
    log.info(
        "%d patients train, %d validate, %d test; slices along the %s axis, %d for training",
        len(split.train), len(split.val), len(split.test),
        "/".join(sorted({v.slice_axis for v in volumes})), sum(v.shape[0] for v in training),
    )  # fmt: skip
    return dataset, volumes, split


def train(
    experiment: Experiment, dataset: Dataset, volumes: Sequence[PreparedVolume], split: Split, run_dir: Path
) -> None:
    """Train; leaves checkpoints, metrics.jsonl and progress.png in the run's folder."""
    from jaxla.data.batches import SliceSource
    from jaxla.models.network import build_network
    from jaxla.reporting.curves import draw_curves
    from jaxla.training.loop import fit
    from jaxla.training.step import count_parameters, split_network

    by_id = {volume.id: volume for volume in volumes}
    size = experiment.preprocessing.image_size
    network = build_network(experiment.model, dataset.labels.outputs, experiment.seed)
    parts = split_network(network, train_backbone=experiment.model.backbone == "finetuned")
    log.info(
        "%s: %d parameters are trained, %d are frozen",
        experiment.method, count_parameters(parts.trainable), count_parameters(parts.frozen.parameters),
    )  # fmt: skip
    best = fit(
        parts,
        SliceSource([by_id[name] for name in split.train], size),
        SliceSource([by_id[name] for name in split.val], size),
        experiment.training,
        seed=experiment.seed,
        pretrained_backbone=experiment.model.weights != "random",
        folder=run_dir,
        on_epoch=lambda history: draw_curves(
            history, f"{experiment.name}, {experiment.method}", run_dir / "progress.png"
        ),
    )
    log.info("best epoch %d: validation Dice %.3f per volume", best.best_epoch, best.best_dice)


def test(volumes: Sequence[PreparedVolume], split: Split, run_dir: Path) -> dict[str, Any]:
    """Segment and score every test case on its own grid, beside the atlas; leaves `test/` in the run's folder.

    Returns:
        The summary: per metric mean, sd, n and unit, per volume; under "slice" the same per slice; under "atlas" the
        atlas's.
    """
    import numpy as np

    from jaxla.data.volumes import (
        canonical_to_slices,
        read_image,
        read_mask,
        slice_geometry,
        slices_to_canonical,
        to_slices,
    )
    from jaxla.evaluation.atlas import apply_atlas, build_atlas, choose_threshold
    from jaxla.evaluation.summary import score_case, summarise, write_cases, write_summary
    from jaxla.inference.segment import make_segment, write_segmentation
    from jaxla.inference.trained import load_run
    from jaxla.reporting.overlays import Panel, draw_overlays

    by_id = {volume.id: volume for volume in volumes}
    trained = load_run(run_dir)
    names = trained.record.labels.names
    segment = make_segment(trained)

    def canonical_masks(ids: Iterable[str]) -> Iterable:
        return (slices_to_canonical(by_id[name].mask, by_id[name].slice_axis) for name in ids)

    atlas = choose_threshold(build_atlas(canonical_masks(split.train), len(names)), canonical_masks(split.val))

    rows, slice_rows, atlas_rows = [], [], []
    for name in _track(split.test, "testing"):
        prepared = by_id[name]
        volume = read_image(prepared.case.image)
        classes, _ = segment(volume)
        write_segmentation(run_dir / "test" / "predictions" / f"{name}.nii.gz", classes, trained, volume)
        predicted = to_slices(classes, slice_geometry(volume.affine))
        rows += score_case(name, predicted, prepared.mask, prepared.spacing, names)
        slice_rows += score_case(name, predicted, prepared.mask, prepared.spacing, names, "slice")
        shape = slices_to_canonical(prepared.mask, prepared.slice_axis).shape
        of_atlas = canonical_to_slices(apply_atlas(atlas, shape), prepared.slice_axis)
        atlas_rows += score_case(name, of_atlas, prepared.mask, prepared.spacing, names)
    for row, atlas_row in zip(rows, atlas_rows, strict=True):
        row.update({f"atlas_{metric}": atlas_row[metric] for metric in ("dice", "iou")})

    summary = summarise(rows, "volume", "one", names)
    summary["slice"] = summarise(slice_rows, "slice", "one", names)
    summary["atlas"] = summarise(atlas_rows, "volume", "one", names) | {"threshold": atlas.threshold}
    summary["best_epoch"] = trained.epoch
    summary["backbone"] = describe_backbone(trained.record.experiment)
    write_cases(rows, run_dir / "test" / "cases.csv")
    write_cases(slice_rows, run_dir / "test" / "slices.csv")
    write_summary(summary, run_dir / "test" / "summary.json")

    dice = {name: np.mean([row["dice"] for row in rows if row["case"] == name]) for name in split.test}
    ranked = sorted(dice, key=dice.get)
    shown = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    panels = []
    for rank, name in shown.items():
        prepared = by_id[name]
        mask = read_mask(run_dir / "test" / "predictions" / f"{name}.nii.gz")
        prediction = to_slices(mask.array, slice_geometry(mask.affine))
        title = f"{rank} of {len(ranked)}: {name}, Dice {dice[name]:.3f}"
        panels.append(Panel(title, prepared.image, prediction, prepared.mask, prepared.spacing))
    draw_overlays(panels, run_dir / "test" / "overlays.png")
    return summary


def describe_backbone(experiment: Experiment) -> str:
    model = experiment.model
    origin = "random weights" if model.weights == "random" else Path(model.weights).name
    return f"{model.arch} ({origin}, {'frozen' if model.backbone == 'frozen' else 'trained'})"


def _track(items: Iterable, label: str) -> Iterable:
    """A progress bar on a terminal; elsewhere a line at each quarter."""
    from tqdm import tqdm

    items = list(items)
    if sys.stdout.isatty():
        yield from tqdm(items, label, leave=False, file=sys.stdout, unit="case")
        return
    for number, item in enumerate(items, start=1):
        yield item
        if number % max(1, len(items) // 4) == 0 or number == len(items):
            log.info("%s: %d of %d cases", label, number, len(items))


if __name__ == "__main__":
    run_command(main)
