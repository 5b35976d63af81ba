"""A study: a run for each method, protocol and seed, one after the other, each in a process of its own.

A run that fails, or takes all memory, so ends alone; and what stands in a run's folder is what `python -m jaxla.train`
with the same options would have left there.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout
from tabulate import tabulate

from jaxla.config import Data, Experiment, InputError, Stopped, Study, log_to_terminal, parse_experiment
from jaxla.data.cache import in_use
from jaxla.data.cases import find_cases
from jaxla.data.prepared import content_key
from jaxla.data.split import make_split
from jaxla.devices.memory import as_bytes
from jaxla.devices.mesh import use_devices
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.pipeline.checks import checked, of_method, require_batch, require_share, with_weights
from jaxla.pipeline.forecast import MEASURED_STEPS, RunsForecast, forecast_runs
from jaxla.pipeline.run import data_folder
from jaxla.reporting.results import RUNS, STUDY
from jaxla.reporting.study_tables import count_of
from jaxla.runs.folder import CASES, FIRST_FILES, LOCK, is_finished, is_running
from jaxla.runs.record import changed_case, differences, read_record, shown
from jaxla.training.loop import clock

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between two looks at a run that another process trains

State = Literal["complete", "begun", "new"]


class PlannedRun(NamedTuple):
    """One run of a study.

    Attributes:
        protocol: name of the experiment whose protocol it runs.
        method: by its name.
        seed: of its random numbers, and of which training patients the protocol takes.
        experiment: with every option resolved.
        arguments: of `python -m jaxla.train`, but for its folder.
        weights_sha256: of its backbone's weights; empty for random ones.
        folder: where it lies, or will lie.
        devices: how many it uses, 0 for all; the same for all runs.
        shard_params: whether its parameters are divided over them.
    """

    protocol: str
    method: str
    seed: int
    experiment: Experiment
    arguments: tuple[str, ...]
    weights_sha256: str
    folder: Path
    devices: int
    shard_params: bool


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end, and the last that it said."""

    run: PlannedRun
    reason: str


def plan_runs(
    options: Mapping[str, Sequence[str]], protocols: Sequence[str], seeds: Sequence[int], output: Path, cache_dir: Path
) -> list[PlannedRun]:
    """Every method under every protocol with every seed; all of a seed come before the next one.

    Args:
        options: for each method, those of `python -m jaxla.train`.
        protocols: names of the experiments whose protocols are run.

    Raises:
        InputError: options that no run could begin with, or missing weights.
    """
    planned, weights = [], {}
    for protocol in protocols:
        for method, of_options in options.items():
            arguments = [f"--exp={protocol}", f"--method={method}", *of_options, f"--cache-dir={cache_dir}"]
            parsed = parse_experiment("jaxla.train", arguments, EXPERIMENTS, METHODS, lambda details: "")
            try:
                experiment = checked(parsed.experiment)
                if method not in weights:  # reads all of the file
                    weights[method] = with_weights(experiment, cache_dir)
            except InputError as error:
                raise of_method(error, method) from error
            located, sha256 = weights[method]
            experiment = replace(experiment, model=located.model)
            planned.append((protocol, method, experiment, arguments, sha256, parsed))
    first = planned[0][2]
    for protocol, _, experiment, *_ in planned:
        if _scans(experiment) != _scans(first):
            raise InputError(
                f"--experiments: {protocol} has other data than {first.name} ({experiment.data} and {first.data}); "
                "a study compares runs on the same scans"
            )
        own, taken = EXPERIMENTS[protocol].data, experiment.data
        if (own.train_patients, own.train_percent) != (taken.train_patients, taken.train_percent):
            raise InputError(
                f"option --data: {protocol} says by itself how many patients train; choose protocols by --experiments"
            )
    return [
        PlannedRun(
            protocol,
            method,
            seed,
            replace(experiment, seed=seed, data=replace(experiment.data, subset_seed=seed)),
            (*arguments, f"--seed={seed}", f"--data.subset_seed={seed}"),
            sha256,
            output / RUNS / f"{protocol}_{method}_seed{seed}",
            parsed.devices,
            parsed.shard_params,
        )
        for seed in seeds
        for protocol, method, experiment, arguments, sha256, parsed in planned
    ]


def _scans(experiment: Experiment) -> Data:
    """The data of an experiment without the part of the training patients that its protocol takes."""
    return replace(experiment.data, train_patients=0, train_percent=100.0, subset_seed=0)


@contextmanager
def study_folder(output: Path, study: Study, runs: Sequence[PlannedRun], command: str) -> Iterator[None]:
    """The folder of a study, held by this process alone; `study.json` names its runs.

    Raises:
        InputError: another process holds it.
    """
    content = {
        "name": study.name,
        "summary": study.summary,
        "command": command,
        "runs": [
            {"folder": run.folder.name, "protocol": run.protocol, "method": run.method, "seed": run.seed}
            for run in runs
        ],
    }
    lock = FileLock(output / LOCK, timeout=1)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        beside = output / f".{STUDY}"
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(output / STUDY)
    except Timeout as error:
        raise InputError(f"--output={output}: another process runs a study there; wait for it or end it") from error
    except OSError as error:
        lock.release()
        raise InputError(f"--output={output}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def state_of(run: PlannedRun) -> State:
    """How far a run is.

    Raises:
        InputError: its folder holds something else, or a run of other options or by another version of this package.
    """
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and not {path.name for path in folder.iterdir()} - set(FIRST_FILES)):
        return "new"
    record = read_record(folder)
    move = "move that folder away to run it again, or choose another --output"
    for option, now, then in differences(run.experiment, record.experiment):
        if option != "exp":
            raise InputError(f"{folder}: was run with --{option}={shown(then)}, not {shown(now)}; {move}")
    if run.weights_sha256 and run.weights_sha256 != record.weights_sha256:
        raise InputError(f"{folder}: was run with other weights than {run.experiment.model.weights}; {move}")
    made_by, here = record.environment["versions"].get("jaxla"), importlib.metadata.version("jaxla")
    if made_by != here:
        raise InputError(f"{folder}: was made by jaxla {made_by}, and this is {here}; {move}")
    return "complete" if is_finished(folder) else "begun"


def require_same_data(
    runs: Sequence[PlannedRun], states: Sequence[State], forecast: RunsForecast | None, cache_dir: Path
) -> None:
    """Raise an InputError unless complete runs saw the scans, masks and split that there are now."""
    if forecast:
        cases, splits = forecast.cases, forecast.splits_sha256
    else:
        protocol = runs[0].experiment.data
        dataset = find_cases(data_folder(protocol, cache_dir), protocol.labels)
        cases = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
        splits = [make_split(list(cases), run.experiment.data).sha256 for run in runs]
    for run, state, split_sha256 in zip(runs, states, splits, strict=True):
        if state != "complete":
            continue
        try:
            then = dict(json.loads((run.folder / CASES).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{run.folder / CASES}: missing or damaged ({error!r}); move {run.folder} away to run it again"
            ) from error
        if case := changed_case(then, cases):
            raise InputError(
                f"{run.folder}: was run on other data than those in {run.experiment.data.root}: {case}; put the data "
                "back, or choose another --output"
            )
        if read_record(run.folder).split_sha256 != split_sha256:
            raise InputError(
                f"{run.folder}: was run on another split than the present one; put --data.split back, or choose "
                "another --output"
            )


def wait_for_orphans(runs: Sequence[PlannedRun], output: Path) -> None:
    """Wait for runs that a killed study has left behind, or that were started by hand.

    Raises:
        InputError: another process runs a study in this folder.
    """
    if is_running(output):
        raise InputError(f"--output={output}: another process runs a study there; wait for it or end it")
    for run in runs:
        _wait_for(run.folder)


def _wait_for(folder: Path) -> None:
    if is_running(folder):
        log.info("another process trains in %s; waiting for it", folder)
        while is_running(folder):
            time.sleep(POLL)


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
            f"measuring the methods' first steps ended with {_how_it_ended(process.exitcode)}; if memory was short, "
            "lower --training.batch_size or --preprocessing.image_size"
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
        with in_use(cache_dir), use_devices(runs[0].devices, runs[0].shard_params):
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
        f"{count_of(len(runs), 'run')}: {count_of(len(methods), 'method')}, "
        f"{count_of(len(protocols), 'protocol')}, {count_of(len(seeds), 'seed')} "
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
        [method, *(clock(seconds[method, p]) if (method, p) in seconds else "–" for p in protocols)]
        for method in methods
    ]
    total = sum(forecast.seconds[n] for n in left)
    free = shutil.disk_usage(next(path for path in runs[0].folder.absolute().parents if path.exists())).free
    disk = f"run folders {as_bytes(sum(forecast.run_bytes[n] for n in left))} at most ({as_bytes(free)} free)"
    if forecast.features_bytes:
        disk += f"; features {as_bytes(forecast.features_bytes)}, once ({as_bytes(forecast.disk_free)} free)"
    if forecast.features_bytes > forecast.disk_free:
        disk += ", more than fit: backbones that come last run in every epoch instead, which takes longer"
    if forecast.without_room:
        disk += (
            f"; features of {', '.join(forecast.without_room)} do not fit into the cache folder: the backbone runs in "
            "every epoch instead; --cache-dir names another disk"
        )
    lines += [
        tabulate(table, ["", *protocols], "plain", colalign=["left", *["right"] * len(protocols)]),
        f"time  at most about {clock(total)} on {forecast.device}"
        + (f", {clock(forecast.features_seconds)} of it for features" if forecast.features_seconds else "")
        + f"; all seeds together, from {MEASURED_STEPS} measured steps of each method; runs may stop early",
        f"disk  {disk}",
    ]
    return "\n".join(lines)


def run_all(runs: Sequence[PlannedRun], states: Sequence[State], forecast: RunsForecast) -> list[Failure]:
    """Run what is not complete, in order; -> those that failed.

    Raises:
        Stopped: asked to end; the run in progress has saved where it stands.
    """
    failures, expected, taken = [], 0.0, 0.0
    left = [n for n, state in enumerate(states) if state != "complete"]
    for done, n in enumerate(left):
        run = runs[n]
        log.info("run %d of %d: %s, %s, seed %d", done + 1, len(left), run.protocol, run.method, run.seed)
        began = time.perf_counter()
        failure = _run(run)
        expected, taken = expected + forecast.seconds[n], taken + time.perf_counter() - began
        outlook = sum(forecast.seconds[m] for m in left[done + 1 :]) * taken / max(expected, 1e-9)
        if failure:
            failures.append(Failure(run, failure))
            log.warning("failed: %s", failure)
        log.info("%d of %d done; about %s left", done + 1, len(left), clock(outlook))
    return failures


def _run(run: PlannedRun) -> str:
    """Train and test in a process of its own, whose lines are printed indented; -> why it failed, or nothing."""
    _wait_for(run.folder)
    try:
        state = state_of(run)
    except InputError as error:
        return str(error)
    if state == "complete":
        return ""
    command = [sys.executable, "-m", "jaxla.train", *run.arguments, f"--run-dir={run.folder}", "--processes=1"]
    command += ["--resume"] * (state == "begun")
    said, stopped = "", None
    with (
        interruptible(),
        # a process group of its own: Ctrl-C on a terminal would reach it too, and the same signal twice ends it at once
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
        ) as process,
    ):
        while True:
            try:
                for line in process.stdout:
                    with suppress(OSError):  # nobody reads any more, as after Ctrl-C of `… | tee`
                        print(f"    {line.rstrip()}", flush=True)
                    said = line.strip() or said
                break
            except KeyboardInterrupt as interrupt:
                stopped = interrupt
                process.send_signal(signal.SIGINT)
    if stopped:
        raise Stopped(f"in {run.folder.name}") from stopped
    if process.returncode == 0 and is_finished(run.folder):
        return ""
    if process.returncode < 0:
        return f"ended with {_how_it_ended(process.returncode)}"
    return said.removeprefix("error: ") or _how_it_ended(process.returncode)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and a closed terminal, unless it is ignored as under nohup, are a KeyboardInterrupt."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how_it_ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
