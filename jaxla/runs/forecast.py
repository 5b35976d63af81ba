"""The forecast of a run before it starts: counts from the data, memory from XLA, times from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flax import nnx

from jaxla.cli.files import free_bytes
from jaxla.cli.terminal import format_bytes, format_duration, plural
from jaxla.config import Experiment
from jaxla.data.dataset import PreparedData
from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import gather, local_items, process_count
from jaxla.evaluation.summary import score_case
from jaxla.hardware import device_bytes, device_name
from jaxla.inference.segment import FLIPS
from jaxla.memory import catch_out_of_memory
from jaxla.mesh import on_host, shard_batch, use_local_devices
from jaxla.runs.cost import MAX_TIMED_SECONDS, MAX_TIMED_VOLUMES
from jaxla.runs.speed import MEASURED_STEPS, fit_to_minutes, mean_seconds, measure_speed, measuring_seconds
from jaxla.tasks import Features, Task
from jaxla.training.step import count_parameters

PAGE_BYTES = 10_000_000  # report and figures for large scans


@dataclass(frozen=True)
class FeaturesForecast:
    """Time and disk space for the features of a frozen backbone; all zero if they are not cached."""

    size: int = 0  # bytes of the features that are not in the cache yet
    fit: bool = True  # whether the disk has room for them; if not, the backbone runs in every epoch
    how_to_fit: str = ""  # advice on making them fit
    folder: Path | None = None  # folder that stores them
    seconds: float = 0.0  # time to compute the missing features
    seconds_per_slice: float = 0.0  # time of the frozen backbone


@dataclass(frozen=True)
class Forecast:
    """Time, memory and disk space that a run needs."""

    network: str  # description of the network
    sample: tuple[str, str]  # the word for one training sample, and for several
    case_word: str  # the word for a case: `patient` or `case`
    cases: dict[str, int]  # number of cases in each part of the split
    slices: dict[str, int]  # number of slices in each part of the split
    batch_size: int  # samples per step
    steps: int  # steps per epoch
    epochs: int  # maximum number of epochs
    trained: int  # number of trained parameters
    frozen: int  # number of frozen parameters
    features: FeaturesForecast
    disk_free: int  # bytes on the disk of the cache folder
    cache_dir: Path
    run_bytes: int  # size of the run's folder at its largest: checkpoints and predictions
    step_bytes: int  # device memory of a training step, as reported by XLA
    device_bytes: int  # memory of the device; 0 if unknown
    start_seconds: float  # time to build the network, compile its step, and measure the step if minutes are limited
    step_seconds: float  # time of a training step
    validation_seconds: float  # time at the end of each epoch
    test_seconds: float  # time to segment and score the test cases, and to time inference on some of them

    @property
    def epoch_seconds(self) -> float:
        """Seconds of an epoch with its validation."""
        return self.steps * self.step_seconds + self.validation_seconds

    @property
    def seconds(self) -> float:
        """Seconds of the run, if it trains all epochs."""
        return self.start_seconds + self.features.seconds + self.epochs * self.epoch_seconds + self.test_seconds


def forecast_run(
    experiment: Experiment,
    network_description: str,
    data: PreparedData,
    task: Task,
    cache_dir: Path,
    needing_features: Sequence[PreparedVolume] | None = None,
) -> Forecast:
    """Measure a few steps of a run on its own data. Nothing is trained, and files are written only in the cache.

    Args:
        needing_features: volumes whose features are needed; by default the run's own.

    Raises:
        InputError: a step needs more memory than is available.
    """
    with catch_out_of_memory(task.batch_size, task.memory_advice):
        began = time.perf_counter()
        with on_host():
            network = task.build_network()
        parameters = count_parameters(nnx.state(network, nnx.Param))
        build_seconds = time.perf_counter() - began
        volumes = data.used_volumes if needing_features is None else needing_features
        feature_forecast, features = forecast_features(network, data, task, cache_dir, volumes)
        sources = task.make_sources(data, cache_dir, features)  # not timed: the run finds resampled volumes cached

        speed = measure_speed(task, network, sources, features)
    recipe = experiment.method.training
    if recipe.minutes:
        recipe = fit_to_minutes(recipe, speed)

    parts = {name: data.select_volumes(getattr(data.split, name)) for name in ("train", "val", "test")}
    return Forecast(
        network=network_description,
        sample=task.sample,
        case_word=experiment.data.case_word,
        cases={name: len(volumes) for name, volumes in parts.items()},
        slices={name: sum(volume.shape[0] for volume in volumes) for name, volumes in parts.items()},
        batch_size=task.batch_size,
        steps=recipe.steps or speed.steps,
        epochs=recipe.epochs,
        trained=speed.trained,
        frozen=parameters - speed.trained,
        features=feature_forecast,
        disk_free=free_bytes(cache_dir),
        cache_dir=cache_dir,
        # Two checkpoints of each kind are kept, and a third exists while it is written.
        run_bytes=3 * speed.checkpoint_bytes + sum(int(np.prod(v.shape)) for v in parts["test"]) // 20 + PAGE_BYTES,
        step_bytes=speed.step_bytes,
        device_bytes=device_bytes(),
        start_seconds=build_seconds + speed.compile_seconds + measuring_seconds(recipe),
        step_seconds=speed.step_seconds,
        validation_seconds=speed.validation_seconds,
        test_seconds=forecast_test(experiment, data, task, speed.batch_seconds, feature_forecast.seconds_per_slice),
    )


def forecast_features(
    network: nnx.Module, data: PreparedData, task: Task, cache_dir: Path, volumes: Sequence[PreparedVolume]
) -> tuple[FeaturesForecast, Features | None]:
    """Forecast the features of volumes; also return stand-ins for the run's own, which take as long to train on."""
    if task.explain_uncached(network):
        return FeaturesForecast(), None
    with use_local_devices():
        cache = task.make_feature_cache(network, cache_dir)
    missing = cache.find_missing(volumes)
    size = cache.count_bytes(missing)
    feature_forecast = FeaturesForecast(size, all(gather(cache.fits_on_disk(size))), cache.how_to_fit, cache.folder)
    if not feature_forecast.fit:
        return feature_forecast, None
    with use_local_devices():
        images = shard_batch(np.zeros(cache.input_shape, np.float32))
        batch_seconds = mean_seconds(lambda: cache.extract(images), 1)
    batches = sum(-(-volume.shape[0] // cache.batch) for volume in local_items(missing))
    stand_ins = {
        volume.id: np.broadcast_to(np.zeros(1, cache.dtype), (volume.shape[0], *cache.shape))
        for volume in data.used_volumes
    }
    feature_forecast = replace(
        feature_forecast, seconds=batch_seconds * batches, seconds_per_slice=batch_seconds / cache.batch
    )
    return feature_forecast, Features(stand_ins, network.reads_images)


def forecast_test(
    experiment: Experiment, data: PreparedData, task: Task, batch_seconds: float, backbone_seconds_per_slice: float
) -> float:
    """Return the seconds to segment and score the test cases, time inference, and choose the postprocessing."""
    test, val = data.select_volumes(data.split.test), data.select_volumes(data.split.val)
    if experiment.method.postprocessing.flips:
        batch_seconds *= len(FLIPS)
    timed = test or data.select_volumes(data.split.train)
    slices = sum(volume.shape[0] for volume in timed)
    per_volume = (task.batches_to_segment(timed) * batch_seconds + slices * backbone_seconds_per_slice) / len(timed)
    segmenting = task.batches_to_segment(test) * batch_seconds
    choosing = per_volume * len(val) if experiment.method.postprocessing.largest == "if_better" else 0.0
    timing = per_volume + min(MAX_TIMED_VOLUMES * per_volume, MAX_TIMED_SECONDS + per_volume)
    scoring = _time_scoring(data) * len(test) / process_count()
    return segmenting + choosing + scoring + timing


def describe_forecast(forecast: Forecast, name: str) -> str:
    """Return the forecast of the experiment of this name as lines to print."""
    f = forecast
    features = forecast.features
    epochs = plural(forecast.epochs, "epoch")
    disk = f"run folder {format_bytes(f.run_bytes)} at most"
    if features.size:
        size = format_bytes(features.size)
        free = f"{format_bytes(f.disk_free)} free"
        disk += f"; features {size} in {f.cache_dir} ({free})"
        if not features.fit:
            disk += f", which do not fit: the backbone runs in every epoch. To cache them, use {features.how_to_fit}"
    memory = f"{format_bytes(f.step_bytes)} for a training step, as reported by XLA"
    if f.device_bytes:
        memory += f", of {format_bytes(f.device_bytes)}"
    lines = {
        "run": f"{name}, {f.network}",
        f"{f.case_word}s": ", ".join(f"{count} {part}" for part, count in f.cases.items()),
        "slices": ", ".join(f"{count} {part}" for part, count in f.slices.items()),
        "steps": f"{f.steps} per epoch, {f.batch_size} {f.sample[f.batch_size > 1]} each, at most {epochs}",
        "parameters": f"{f.trained} trained, {f.frozen} frozen",
        "disk": disk,
        "memory": memory,
        "time": (
            f"start and compilation {format_duration(f.start_seconds)}; "
            + (f"features {format_duration(features.seconds)}; " if features.seconds else "")
            + f"an epoch {format_duration(f.epoch_seconds)}, {epochs} "
            f"{format_duration(f.epochs * f.epoch_seconds)}; test {format_duration(f.test_seconds)}; "
            f"about {format_duration(f.seconds)} in total, on {device_name()}, "
            f"from {MEASURED_STEPS} measured steps"
            + (", without reading features from disk" if features.folder and features.fit else "")
        ),
    }
    return "\n".join(f"{title:<11} {text}" for title, text in lines.items())


def _time_scoring(data: PreparedData) -> float:
    """Return the seconds to score one case as the test does, measured on a shifted validation or training mask."""
    volume = data.volumes[(data.split.val or data.split.train)[0]]
    names = data.dataset.labels.names
    mask = np.asarray(volume.mask)
    shifted = np.roll(mask, 5, axis=1)
    began = time.perf_counter()
    score_case(volume.id, shifted, mask, volume.spacing, names, "slice")
    by_slice = time.perf_counter()
    score_case(volume.id, shifted, mask, volume.spacing, names)
    by_volume = time.perf_counter()
    return (by_slice - began) + 2 * (by_volume - by_slice)  # per volume: the network's mask and the atlas baseline's
