"""The forecast of a study: time and disk space, from a few measured steps of each method."""

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tabulate import tabulate

from jaxla.cli.files import free_bytes
from jaxla.cli.process import log_to_terminal
from jaxla.cli.terminal import format_bytes, format_duration, plural
from jaxla.config import Experiment, InputError, command_line_wording
from jaxla.data.cache import mark_cache_in_use
from jaxla.data.dataset import prepare_data, require_classes
from jaxla.hardware import device_name, keep_compiled_programs, on_cpu
from jaxla.mesh import use_devices
from jaxla.runs.forecast import Forecast, forecast_run
from jaxla.runs.machine import processor
from jaxla.runs.speed import MEASURED_STEPS
from jaxla.studies.schedule import ScheduledRun, State, add_method_to_errors
from jaxla.tasks import Task, make_checked_task
from jaxla.training.features import MAX_DISK_FRACTION

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyForecast:
    """Time and disk space of several runs on the same scans, one after the other."""

    seconds: list[float]  # time of each run, with features in a method's first run; 0 for complete runs
    run_bytes: list[int]  # largest size of each run's folder; 0 for complete runs
    features_seconds: float  # time to compute missing features, for all runs together
    features_bytes: int
    uncached: dict[str, str]  # method -> advice, if its features do not fit: its backbone runs in every epoch
    disk_free: int  # bytes on the disk of the cache folder
    device: str  # device that the steps were measured on


def forecast_study(runs: Sequence[ScheduledRun], states: Sequence[State], cache_dir: Path) -> StudyForecast:
    """Measure the runs that are not complete, in a separate process, which then releases the device.

    Raises:
        InputError: the data or a method's first step would make a run fail at its start.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(sender, runs, states, cache_dir))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError as error:
        process.join()
        ending = describe_exit(process.exitcode)
        if process.exitcode > 0:  # an error in this package, whose traceback the process has printed
            raise RuntimeError(f"measuring the first steps failed: {ending}") from error
        problem = f"the process that measured them was {ending}"
        fix = "If memory ran out, lower --training.batch_size or --preprocessing.image_size."
        raise InputError("first steps of the methods", problem, fix) from error
    finally:
        process.terminate()
        process.join()
    if isinstance(result, StudyForecast):
        return result
    raise InputError(*result)


def _measure_and_send(
    sender: Connection, runs: Sequence[ScheduledRun], states: Sequence[State], cache_dir: Path
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too, but its parent stops it
    logging.getLogger().handlers.clear()  # Orbax, which is imported before this runs, has added its own
    log_to_terminal()
    try:
        with command_line_wording(), mark_cache_in_use(cache_dir), use_devices(runs[0].devices, runs[0].shard_params):
            keep_compiled_programs(cache_dir)
            sender.send(_measure_runs([run.experiment for run in runs], states, cache_dir))
    except InputError as error:  # as a tuple, because not every subclass can be unpickled
        sender.send((error.where, error.problem, error.fix))


def _measure_runs(experiments: Sequence[Experiment], states: Sequence[State], cache_dir: Path) -> StudyForecast:
    """Measure a few steps of each method on its largest open run; its other runs differ in their number of steps."""
    first = experiments[0]
    all_patients = replace(first.data, train_patients=0, train_percent=100.0)
    prepared = prepare_data(replace(first, data=all_patients), cache_dir)
    data = [prepared.for_fold("", experiment) for experiment in experiments]
    open_runs: dict[str, list[int]] = {}  # method -> indices of its runs
    tasks: dict[int, Task] = {}
    for n, experiment in enumerate(experiments):
        if states[n] != "complete":
            require_classes(data[n], experiment.data)
            with add_method_to_errors(experiment.method.name):
                tasks[n] = make_checked_task(experiment, data[n])
            open_runs.setdefault(experiment.method.name, []).append(n)
    steps = {n: task.steps_per_epoch(data[n].select_volumes(data[n].split.train)) for n, task in tasks.items()}

    run_seconds, run_bytes = [0.0] * len(experiments), [0] * len(experiments)
    by_method: dict[str, Forecast] = {}
    feature_folders = set()
    for method, indices in open_runs.items():
        log.info("measuring a few steps of %s", method)
        largest = max(indices, key=steps.get)
        volumes = {volume.id: volume for n in indices for volume in data[n].used_volumes}
        run = (experiments[largest], method, data[largest], tasks[largest])
        with add_method_to_errors(method):
            measured = forecast_run(*run, cache_dir, list(volumes.values()))
        if measured.features.folder in feature_folders:  # an earlier method computes the same features
            measured = replace(measured, features=replace(measured.features, size=0, seconds=0.0))
        feature_folders.add(measured.features.folder)
        by_method[method] = measured
        for n in indices:
            seconds = measured.features.seconds if n == indices[0] else 0.0
            is_fitted = tasks[n].recipe.minutes > 0
            run_steps = measured.steps if is_fitted else steps[n]
            forecast = replace(measured, steps=run_steps, features=replace(measured.features, seconds=seconds))
            run_seconds[n], run_bytes[n] = forecast.seconds, forecast.run_bytes
    cached = [measured.features for measured in by_method.values() if measured.features.fit]
    return StudyForecast(
        seconds=run_seconds,
        run_bytes=run_bytes,
        features_seconds=sum(features.seconds for features in cached),
        features_bytes=sum(features.size for features in cached),
        uncached={name: found.features.how_to_fit for name, found in by_method.items() if not found.features.fit},
        disk_free=min(measured.disk_free for measured in by_method.values()),
        device=processor() if on_cpu() else device_name(),
    )


def describe_schedule(
    runs: Sequence[ScheduledRun], states: Sequence[State], forecast: StudyForecast | None = None
) -> str:
    """Describe the schedule in a line, and the forecast in a table of times and lines on time and disk space."""
    methods, protocols, seeds = (
        list(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("method", "protocol", "seed")
    )
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "started", "new"))
    headline = (
        f"{plural(len(runs), 'run')}: {plural(len(methods), 'method')}, {plural(len(protocols), 'protocol')}, "
        f"{plural(len(seeds), 'seed')} ({', '.join(map(str, seeds))}); {counts}"
    )
    if forecast is None:
        return headline
    seconds: dict[tuple[str, str], float] = {}
    for run, state, run_seconds in zip(runs, states, forecast.seconds, strict=True):
        if state != "complete":
            seconds[run.method, run.protocol] = seconds.get((run.method, run.protocol), 0.0) + run_seconds
    cells = {key: format_duration(total) for key, total in seconds.items()}
    table = [[method, *(cells.get((method, protocol), "–") for protocol in protocols)] for method in methods]
    features = f", {format_duration(forecast.features_seconds)} of it for features" if forecast.features_seconds else ""
    lines = [
        headline,
        tabulate(table, ["", *protocols], "plain", colalign=["left", *["right"] * len(protocols)]),
        f"time  about {format_duration(sum(forecast.seconds))} on {forecast.device}{features}; all seeds "
        f"together, from {MEASURED_STEPS} measured steps of each method; runs may stop early",
        f"disk  {_describe_disk(forecast, free_bytes(runs[0].folder))}",
    ]
    return "\n".join(lines)


def _describe_disk(forecast: StudyForecast, free: int) -> str:
    parts = [f"run folders at most {format_bytes(sum(forecast.run_bytes))} ({format_bytes(free)} free)"]
    if size := forecast.features_bytes:
        parts.append(f"features {format_bytes(size)} for all runs ({format_bytes(forecast.disk_free)} free)")
        if size > MAX_DISK_FRACTION * forecast.disk_free:
            parts.append("this is too much: the backbones of the last methods run in every epoch, which is slower")
    for method, advice in forecast.uncached.items():
        problem = f"the features of {method} do not fit in the cache folder: its backbone runs in every epoch"
        parts.append(f"{problem}. To cache them, use {advice}")
    return "; ".join(parts)


def describe_exit(code: int) -> str:
    """Return `killed by SIGKILL`, or `exit code 1`."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
