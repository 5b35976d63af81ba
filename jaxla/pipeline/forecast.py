"""What a run will take, before it starts: counts from the data, memory from XLA, times from a few measured steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxla.cli.files import free_bytes
from jaxla.cli.terminal import format_bytes, format_duration
from jaxla.config import Experiment
from jaxla.data.batches import evaluation_batches, sample_batch, steps_per_epoch, training_batches
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import gather, local_items, local_rows, on_host, process_count, shard_batch, use_local_devices
from jaxla.evaluation.summary import score_case
from jaxla.hardware import device_bytes, device_name
from jaxla.memory import catch_out_of_memory, program_bytes, require_memory
from jaxla.models.build import build_network, configuration_of, reads_volumes
from jaxla.nnunet.plan import Plan
from jaxla.nnunet.tiles import count_tiles
from jaxla.pipeline.cost import TIMED_SECONDS, TIMED_VOLUMES
from jaxla.pipeline.planning import plan_run
from jaxla.pipeline.run import why_not_cached
from jaxla.pipeline.sources import image_sources, patch_sources
from jaxla.runs.record import describe_backbone, method_label
from jaxla.training.features import FeatureCache
from jaxla.training.step import (
    compile_step,
    count_parameters,
    initial_state,
    make_evaluation,
    make_optimiser,
    make_step,
    split_network,
    take_step,
)

log = logging.getLogger(__name__)

MEASURED_STEPS = 3
PAGE_BYTES = 10_000_000  # report and figures, of large scans


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds that a run will take.

    Attributes:
        rows: what one row of a batch is called, and several are.
        features_bytes: of features still to be computed; 0 where none are cached.
        features_fit: whether the disk has room for them; if not, the backbone runs in every epoch.
        how_to_fit: what to do then.
        features_folder: where they are kept; None where they are not.
        run_bytes: of the run's folder at its largest: checkpoints and predictions.
        step_bytes: device memory of a training step, by XLA's own account.
        device_bytes: memory that the device has; 0 where it does not say.
        start_seconds: to build the network and compile its steps.
        features_seconds: to compute the missing features.
        step_seconds: of a training step.
        validation_seconds: of the validation at an epoch's end.
        test_seconds: to segment and score the test cases, and to time some.
    """

    experiment: Experiment
    rows: tuple[str, str]
    patients: dict[str, int]
    slices: dict[str, int]
    steps: int
    trained: int
    frozen: int
    features_bytes: int
    features_fit: bool
    how_to_fit: str
    features_folder: Path | None
    disk_free: int
    cache_dir: Path
    run_bytes: int
    step_bytes: int
    device_bytes: int
    start_seconds: float
    features_seconds: float
    step_seconds: float
    validation_seconds: float
    test_seconds: float

    @property
    def epoch_seconds(self) -> float:
        """Of an epoch with its validation."""
        return self.steps * self.step_seconds + self.validation_seconds

    @property
    def seconds(self) -> float:
        """Of the run, if it takes all epochs."""
        training = self.experiment.training.epochs * self.epoch_seconds
        return self.start_seconds + self.features_seconds + training + self.test_seconds


def forecast(
    experiment: Experiment, data: PreparedData, cache_dir: Path, seen: Sequence[PreparedVolume] | None = None
) -> Forecast:
    """Measure a few steps of the run on its own data; nothing is trained, and no file written but in the cache.

    Args:
        seen: whose features will be needed; by default the run's own.

    Raises:
        InputError: a step needs more memory than there is.
    """
    plan, batch_size = plan_run(experiment, data), experiment.training.batch_size
    with catch_out_of_memory(batch_size or configuration_of(experiment.model, plan).batch_size):
        return _forecast(experiment, data, plan, cache_dir, data.used if seen is None else seen)


def _forecast(
    experiment: Experiment, data: PreparedData, plan: Plan | None, cache_dir: Path, seen: Sequence[PreparedVolume]
) -> Forecast:
    began = time.perf_counter()
    recipe, model, canvas = experiment.training, experiment.model, data.canvas(experiment.preprocessing)
    size = canvas.size
    parts = {name: data.of(getattr(data.split, name)) for name in ("train", "val", "test")}
    slices = {name: sum(v.shape[0] for v in volumes) for name, volumes in parts.items()}

    with on_host():
        network = build_network(model, data.dataset.labels.outputs, experiment.seed, plan=plan)
    of_all = count_parameters(nnx.state(network, nnx.Param))
    features_bytes, features_seconds, features_fit, how_to_fit, stand_ins = 0, 0.0, True, "", None
    features_folder, with_images = None, False
    extract_seconds = 0.0  # of a slice, where the frozen backbone's part is not in the steps measured below
    if not why_not_cached(experiment, network):
        with use_local_devices():
            cache = FeatureCache(cache_dir, network, model.arch, canvas)
        missing = cache.missing(seen)
        features_bytes = cache.bytes_of(missing)
        features_fit, how_to_fit = all(gather(cache.fits(features_bytes))), cache.how_to_fit
        features_folder = cache.folder
        if features_fit:
            with use_local_devices():
                images = shard_batch(np.zeros((cache.batch, size, size, 1), np.float32))
                of_batch = _seconds(lambda: cache.extract(images), 1)
            extract_seconds = of_batch / cache.batch
            features_seconds = of_batch * sum(-(-v.shape[0] // cache.batch) for v in local_items(missing))
            # what the values are does not change how long a step takes
            stand_ins = {v.id: np.broadcast_to(np.zeros(1, cache.dtype), (v.shape[0], *cache.shape)) for v in data.used}
            with_images, network = network.READS_IMAGES, network.on_features((size, size))

    split = split_network(network, train_backbone=model.backbone == "finetuned")
    if plan:
        began_to_resample = time.perf_counter()
        sources = patch_sources(experiment, data, plan, cache_dir)
        began += time.perf_counter() - began_to_resample  # the run finds it done
    else:
        sources = image_sources(experiment, data, stand_ins, with_images)
    recipe = sources.recipe
    steps = steps_per_epoch(sources.train, recipe.batch_size, recipe.steps)
    optimiser = make_optimiser(recipe, steps * recipe.epochs, model.weights != "random")
    state = initial_state(split, optimiser)
    trained, trained_bytes = count_parameters(state.trainable), _bytes(state.trainable)

    rows, key = local_rows(recipe.batch_size), jax.random.key(0)
    batches = training_batches(sources.train, recipe.batch_size, experiment.seed, rows)
    step = make_step(sources.gradient_of(split.training, sources.augment, sources.loss_of), optimiser)
    step = compile_step(step, state, shard_batch(sample_batch(sources.train, rows)), key)
    require_memory(program_bytes(step), recipe.batch_size)

    def one_step() -> jax.Array:
        return take_step(step, state, shard_batch(next(batches)), key)

    one_step()
    start_seconds = time.perf_counter() - began
    step_seconds = _seconds(one_step, MEASURED_STEPS)
    batches.close()
    evaluate = make_evaluation(split.evaluation, sources.loss_of)
    with closing(evaluation_batches(sources.val, recipe.batch_size, rows)) as batches:
        batch = shard_batch(next(batches))
    batch_seconds = _seconds(lambda: evaluate(state.trainable, state.frozen, batch), 2)
    score_seconds = _scoring_seconds(data) * len(parts["test"])
    if plan:
        windows = count_tiles(parts["test"], plan, configuration_of(model, plan))
        of_volume = windows / len(parts["test"]) * batch_seconds / recipe.batch_size
    else:
        to_segment = len(parts["test"]) if reads_volumes(model) else slices["test"]
        of_test = to_segment * batch_seconds / recipe.batch_size + slices["test"] * extract_seconds
        of_volume = of_test / len(parts["test"])
    judged = of_volume * len(parts["val"]) if experiment.postprocessing.largest == "if_better" else 0.0
    cost_seconds = of_volume + min(TIMED_VOLUMES * of_volume, TIMED_SECONDS + of_volume)

    return Forecast(
        experiment=replace(experiment, training=recipe),
        rows=sources.train.rows,
        patients={name: len(volumes) for name, volumes in parts.items()},
        slices=slices,
        steps=steps,
        trained=trained,
        frozen=of_all - trained,
        features_bytes=features_bytes,
        features_fit=features_fit,
        how_to_fit=how_to_fit,
        features_folder=features_folder,
        disk_free=free_bytes(cache_dir),
        cache_dir=cache_dir,
        # two checkpoints of each kind are kept, and a third is there while it is written
        run_bytes=3 * (2 * trained_bytes + _bytes(state.optimiser))
        + sum(int(np.prod(v.shape)) for v in parts["test"]) // 20
        + PAGE_BYTES,
        step_bytes=program_bytes(step),
        device_bytes=device_bytes(),
        start_seconds=start_seconds,
        features_seconds=features_seconds,
        step_seconds=step_seconds,
        validation_seconds=-(-len(sources.val) // recipe.batch_size) * batch_seconds,
        test_seconds=(of_volume * len(parts["test"]) if plan else -(-to_segment // recipe.batch_size) * batch_seconds)
        + judged
        + score_seconds / process_count()
        + cost_seconds,
    )


def describe(f: Forecast) -> str:
    """The forecast as lines to print."""
    experiment, recipe = f.experiment, f.experiment.training
    features = f"features {format_bytes(f.features_bytes)} in {f.cache_dir} ({format_bytes(f.disk_free)} free)"
    if not f.features_fit:
        features = (
            f"features would take {format_bytes(f.features_bytes)} in {f.cache_dir}, where {format_bytes(f.disk_free)} are "
            f"free: the backbone runs in every epoch instead; {f.how_to_fit}"
        )
    memory = f"{format_bytes(f.step_bytes)} for a training step, by XLA's account"
    if f.device_bytes:
        memory += f", of {format_bytes(f.device_bytes)}"
    rows = f.rows[recipe.batch_size > 1]
    lines = {
        "run": f"{experiment.name}, {method_label(experiment)}: {describe_backbone(experiment)}",
        "patients": ", ".join(f"{count} {name}" for name, count in f.patients.items()),
        "slices": ", ".join(f"{count} {name}" for name, count in f.slices.items()),
        "steps": f"{f.steps} an epoch of {recipe.batch_size} {rows} each, {recipe.epochs} epochs at most",
        "parameters": f"{f.trained} trained, {f.frozen} frozen",
        "disk": f"run folder {format_bytes(f.run_bytes)} at most" + (f"; {features}" if f.features_bytes else ""),
        "memory": memory,
        "time": (
            f"start and compilation {format_duration(f.start_seconds)}; "
            + (f"features {format_duration(f.features_seconds)}; " if f.features_seconds else "")
            + f"an epoch {format_duration(f.epoch_seconds)}, all {recipe.epochs} {format_duration(recipe.epochs * f.epoch_seconds)}; "
            f"test {format_duration(f.test_seconds)}; together about {format_duration(f.seconds)}, on {device_name()}, "
            f"from {MEASURED_STEPS} measured steps"
            + (", without reading from disk" if f.features_folder and f.features_fit else "")
        ),
    }
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one call, on average, after a first one that compiles."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / repeats


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _scoring_seconds(data: PreparedData) -> float:
    """To score one case as the test does, measured on a validation mask against itself, moved."""
    volume, names = data.of(data.split.val)[0], data.dataset.labels.names
    mask = np.asarray(volume.mask)
    moved = np.roll(mask, 5, axis=1)
    began = time.perf_counter()
    score_case(volume.id, moved, mask, volume.spacing, names, "slice")
    by_slice = time.perf_counter()
    score_case(volume.id, moved, mask, volume.spacing, names)
    by_volume = time.perf_counter()
    return (by_slice - began) + 2 * (by_volume - by_slice)  # by volume the network's mask and the atlas's
