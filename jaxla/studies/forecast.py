"""What a study will take, before it runs: a few measured steps of each method, and the plan in words."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import jax
from tabulate import tabulate

from jaxla.cli.files import free_bytes
from jaxla.cli.process import log_to_terminal
from jaxla.cli.terminal import format_bytes, format_duration, plural
from jaxla.config import Experiment, InputError
from jaxla.data.cache import mark_cache_in_use
from jaxla.data.dataset import PreparedData, prepare_data, require_classes
from jaxla.data.split import make_split
from jaxla.distributed import use_devices
from jaxla.memory import HOW_TO_SAVE_MEMORY
from jaxla.models.build import reads_volumes
from jaxla.pipeline.checks import of_method, require_batch, require_fitting_scans, require_share
from jaxla.pipeline.forecast import MEASURED_STEPS, forecast
from jaxla.runs.machine import processor
from jaxla.studies.schedule import PlannedRun, State
from jaxla.training.features import MAX_DISK_FRACTION

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunsForecast:
    """What several runs on the same scans will take, one after the other.

    Attributes:
        seconds: of each run, if it takes all epochs, a method's first one with the features; 0 of one that is complete.
        run_bytes: of each run's folder at its largest; 0 of one that is complete.
        features_seconds: the part of it in which missing features are computed, for all runs.
        features_bytes: of these.
        without_room: methods whose features do not fit on the disk, so that their backbones run in every epoch; for
            each what to do about it.
        disk_free: where features are kept.
        device: that was measured on.
    """

    seconds: tuple[float, ...]
    run_bytes: tuple[int, ...]
    features_seconds: float
    features_bytes: int
    without_room: dict[str, str]
    disk_free: int
    device: str


def forecast_runs(experiments: Sequence[Experiment], complete: Sequence[bool], cache_dir: Path) -> RunsForecast:
    """Measure a few steps of each method, for its run on most patients; the others follow from their numbers of steps.

    Args:
        complete: which of the runs are, and need not be measured.

    Raises:
        InputError: as for a run before it starts.
    """
    first = experiments[0]
    everyone = replace(first.data, train_patients=0, train_percent=100.0)
    prepared = prepare_data(replace(first, data=everyone), cache_dir)
    ids = [case.id for case in prepared.dataset.cases]
    data = [replace(prepared, split=make_split(ids, experiment.data)) for experiment in experiments]
    left: dict[str, list[int]] = {}
    for n, experiment in enumerate(experiments):
        if not complete[n]:
            require_classes(data[n], experiment.data)
            try:
                require_fitting_scans(experiment, data[n].used_volumes)
            except InputError as error:
                raise of_method(error, experiment.method) from error
            left.setdefault(experiment.method, []).append(n)
    steps = {n: _steps(experiments[n], data[n]) for of_these in left.values() for n in of_these}
    of_runs, measured, folders = {}, {}, set()
    for method, of_these in left.items():
        log.info("measuring a few steps of %s", method)
        largest = max(of_these, key=steps.get)
        seen = {volume.id: volume for n in of_these for volume in data[n].used_volumes}
        try:
            found = forecast(experiments[largest], data[largest], cache_dir, list(seen.values()))
        except InputError as error:
            raise of_method(error, method) from error
        if found.features_folder in folders:  # another method reads the same
            found = replace(found, features_bytes=0, features_seconds=0.0)
        folders.add(found.features_folder)
        measured[method] = found
        for n in of_these:
            once = found.features_seconds if n == of_these[0] else 0.0
            of_runs[n] = replace(found, experiment=experiments[n], steps=steps[n], features_seconds=once)
    kept = [found for found in measured.values() if found.features_fit]
    return RunsForecast(
        seconds=tuple(of_runs[n].seconds if n in of_runs else 0.0 for n in range(len(experiments))),
        run_bytes=tuple(of_runs[n].run_bytes if n in of_runs else 0 for n in range(len(experiments))),
        features_seconds=sum(found.features_seconds for found in kept),
        features_bytes=sum(found.features_bytes for found in kept),
        without_room={name: found.how_to_fit for name, found in measured.items() if not found.features_fit},
        disk_free=min(found.disk_free for found in measured.values()),
        device=processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
    )


def _steps(experiment: Experiment, data: PreparedData) -> int:
    """Of an epoch."""
    volumes, recipe = data.volumes_of(data.split.train), experiment.training
    rows = len(volumes) if reads_volumes(experiment.model) else sum(v.shape[0] for v in volumes)
    return recipe.steps or -(-rows // recipe.batch_size)


def measure(runs: Sequence[PlannedRun], states: Sequence[State], cache_dir: Path) -> RunsForecast:
    """What the runs not yet complete will take; measured in a process of its own, which then gives the device back.

    Raises:
        InputError: the data, or a method's first step, would end a run before it starts.
    """
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sending, runs, states, cache_dir))
    process.start()
    sending.close()
    try:
        found = receiving.recv()
    except EOFError as error:
        process.join()
        raise InputError(
            f"measuring the methods' first steps ended with {how_it_ended(process.exitcode)}; if memory was short, "
            f"lower --training.batch_size, or {HOW_TO_SAVE_MEMORY}"
        ) from error
    finally:
        process.terminate()
        process.join()
    if isinstance(found, str):
        raise InputError(found)
    return found


def _measure(answer: Connection, runs: Sequence[PlannedRun], states: Sequence[State], cache_dir: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal reaches this too, and who started it ends it
    logging.getLogger().handlers.clear()  # Orbax, imported before this runs, has put its own there
    log_to_terminal()
    experiments, complete = [run.experiment for run in runs], [state == "complete" for state in states]
    try:
        with mark_cache_in_use(cache_dir), use_devices(runs[0].devices, runs[0].shard_params):
            for run in runs:
                try:
                    require_share(run.experiment)
                    require_batch(run.experiment)
                except InputError as error:
                    raise of_method(error, run.method) from error
            found = forecast_runs(experiments, complete, cache_dir)
    except InputError as error:  # not every error survives the way to another process
        found = str(error)
    answer.send(found)


def describe_plan(runs: Sequence[PlannedRun], states: Sequence[State], forecast: RunsForecast | None) -> str:
    """The plan as lines to print; without a forecast nothing is left to run."""
    count = {state: states.count(state) for state in ("complete", "begun", "new")}
    methods, protocols, seeds = (
        list(dict.fromkeys(getattr(run, of) for run in runs)) for of in ("method", "protocol", "seed")
    )
    lines = [
        f"{plural(len(runs), 'run')}: {plural(len(methods), 'method')}, "
        f"{plural(len(protocols), 'protocol')}, {plural(len(seeds), 'seed')} "
        f"({', '.join(map(str, seeds))}); {count['complete']} complete, {count['begun']} to go on with, "
        f"{count['new']} new"
    ]
    if forecast is None:
        return lines[0]
    left = [n for n, state in enumerate(states) if state != "complete"]
    seconds = {}
    for n in left:
        key = (runs[n].method, runs[n].protocol)
        seconds[key] = seconds.get(key, 0.0) + forecast.seconds[n]
    table = [
        [method, *(format_duration(seconds[method, p]) if (method, p) in seconds else "–" for p in protocols)]
        for method in methods
    ]
    total = sum(forecast.seconds[n] for n in left)
    free = free_bytes(runs[0].folder)
    disk = f"run folders {format_bytes(sum(forecast.run_bytes[n] for n in left))} at most ({format_bytes(free)} free)"
    if forecast.features_bytes:
        disk += f"; features {format_bytes(forecast.features_bytes)}, once ({format_bytes(forecast.disk_free)} free)"
    if forecast.features_bytes > MAX_DISK_FRACTION * forecast.disk_free:
        disk += ", more than fit: backbones that come last run in every epoch instead, which takes longer"
    for method, how_to_fit in forecast.without_room.items():
        disk += (
            f"; features of {method} do not fit into the cache folder: the backbone runs in every epoch instead; "
            f"{how_to_fit}"
        )
    lines += [
        tabulate(table, ["", *protocols], "plain", colalign=["left", *["right"] * len(protocols)]),
        f"time  at most about {format_duration(total)} on {forecast.device}"
        + (f", {format_duration(forecast.features_seconds)} of it for features" if forecast.features_seconds else "")
        + f"; all seeds together, from {MEASURED_STEPS} measured steps of each method; runs may stop early",
        f"disk  {disk}",
    ]
    return "\n".join(lines)


def how_it_ended(code: int) -> str:
    """`SIGKILL`, or `exit code 1`."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
