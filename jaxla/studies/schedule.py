"""The schedule of a study: a run for each method, protocol and seed, and the progress of each."""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

from jaxla.cli.command_line import parse_experiment
from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.json_files import read_json
from jaxla.config import ALL_CASES, METHOD_GROUPS, Data, Experiment, InputError, Study, choices_by_validation
from jaxla.data.dataset import find_dataset, split_cases
from jaxla.data.prepared import content_key
from jaxla.data.split import read_split
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.runs.checks import check_experiment, find_weights
from jaxla.runs.folder import CASES, has_not_begun, is_finished, lock_folder
from jaxla.runs.record import Record, changed_case, differences, format_value, read_record
from jaxla.studies import RUNS, STUDY
from jaxla.tasks import is_same_plan

State = Literal["complete", "started", "new"]


class ScheduledRun(NamedTuple):
    """One run of a study; `devices` and `shard_params` are the same for all runs."""

    protocol: str  # name of the experiment whose protocol is run
    method: str
    seed: int  # seed of the run's random numbers and of its subset of training patients
    experiment: Experiment  # with every option resolved
    arguments: tuple[str, ...]  # arguments of `python -m jaxla.train`, without its folder
    weights_sha256: str  # hash of its backbone's weights; empty for random ones
    folder: Path  # folder of the run, which may not exist yet
    devices: int
    shard_params: bool


def schedule_runs(
    options: Mapping[str, Sequence[str]], protocols: Sequence[str], seeds: Sequence[int], output: Path, cache_dir: Path
) -> list[ScheduledRun]:
    """Schedule every method under every protocol with every seed, seed by seed.

    Args:
        options: method -> its options of `python -m jaxla.train`.
        protocols: names of the experiments whose protocols are run.
    """
    runs = []
    for protocol in protocols:
        for method, method_options in options.items():
            arguments = [f"--exp={protocol}", f"--method={method}", *method_options, f"--cache-dir={cache_dir}"]
            parsed = parse_experiment(arguments, EXPERIMENTS, METHODS)
            with add_method_to_errors(method):
                experiment, sha256 = find_weights(check_experiment(parsed.experiment), cache_dir)
            placement = (output / RUNS, parsed.devices, parsed.shard_params)
            runs.append(ScheduledRun(protocol, method, 0, experiment, tuple(arguments), sha256, *placement))
    _require_comparable(runs)
    return [_with_seed(run, seed) for seed in seeds for run in _with_same_patients(runs)]


def _with_same_patients(runs: Sequence[ScheduledRun]) -> Sequence[ScheduledRun]:
    """Return the runs, with validation patients for all of them if only some methods depend on validation."""
    data = runs[0].experiment.data
    if data.split or data.validation != "if_useful":
        return runs
    if len({bool(choices_by_validation(run.experiment.method)) for run in runs}) == 1:
        return runs
    argument = "--data.validation=always"
    changed_data = [replace(run.experiment.data, validation="always") for run in runs]
    return [
        run._replace(experiment=replace(run.experiment, data=new_data), arguments=(*run.arguments, argument))
        for run, new_data in zip(runs, changed_data, strict=True)
    ]


def _with_seed(run: ScheduledRun, seed: int) -> ScheduledRun:
    return run._replace(
        seed=seed,
        experiment=replace(run.experiment, seed=seed, data=replace(run.experiment.data, subset_seed=seed)),
        arguments=(*run.arguments, f"--seed={seed}", f"--data.subset_seed={seed}"),
        folder=run.folder / f"{run.protocol}_{run.method}_seed{seed}",
    )


def _require_comparable(runs: Sequence[ScheduledRun]) -> None:
    """Raise an InputError unless runs use the same scans with a test set, and differ in method or training patients."""
    split = runs[0].experiment.data.split
    if split == ALL_CASES or (split and not read_split(Path(split), "data.split").test):
        problem = "leaves no test cases, which a study needs to compare methods"
        raise InputError(f"--data.split={split}", problem, "Use another split.")
    for run in runs:
        preset = EXPERIMENTS[run.protocol].data
        data = run.experiment.data
        first = runs[0]
        options, first_options = vars(_scan_options(data)), vars(_scan_options(first.experiment.data))
        if changed := [name for name, value in options.items() if value != first_options[name]]:
            name = changed[0]
            values = f"{format_value(options[name])} and {format_value(first_options[name])}"
            problem = f"{run.protocol} and {first.protocol} use different data (data.{name}: {values})"
            raise InputError("--experiments", problem, "Choose experiments on the same scans.")
        if (preset.train_patients, preset.train_percent) != (data.train_patients, data.train_percent):
            problem = f"cannot change the number of training patients, which the protocol {run.protocol} sets"
            raise InputError("--data", problem, "Choose protocols with --experiments.")
    for a, b in combinations(runs, 2):
        method = b.experiment.method
        renamed = replace(a.experiment.method, name=method.name, summary=method.summary)
        if a.method != b.method and replace(a.experiment, method=renamed) == b.experiment:
            fix = f"Remove one of them, or set an option for one method only: --{a.method}.<option>."
            raise InputError("--methods", f"{a.method} and {b.method} are equal with these options", fix)


def _scan_options(data: Data) -> Data:
    """Return data options without those that choose the training patients."""
    return replace(data, train_patients=0, train_percent=100.0, subset_seed=0)


@contextmanager
def add_method_to_errors(method: str) -> Iterator[None]:
    """Add the method to an InputError about an option that methods may set differently."""
    try:
        yield
    except InputError as error:
        name = error.where.lstrip("-").partition("=")[0]
        if name.partition(".")[0] not in METHOD_GROUPS:
            raise
        fix = f"{error.fix} To set it for this method only, use --{method}.{name}."
        raise InputError(error.where, f"{error.problem} (method {method})", fix) from error


@contextmanager
def hold_study_folder(output: Path, study: Study, runs: Sequence[ScheduledRun], command: str) -> Iterator[None]:
    """Lock a study's folder for this process, and write the schedule into it."""
    listed = [{"folder": r.folder.name, "protocol": r.protocol, "method": r.method, "seed": r.seed} for r in runs]
    content = {"name": study.name, "summary": study.summary, "command": command, "runs": listed}
    with lock_folder(output, "--output", "runs a study"):
        with report_os_errors("written", f"--output={output}", "Choose another folder."):
            write_atomically(output / STUDY, json.dumps(content, indent=1) + "\n")
        yield


def read_state(run: ScheduledRun) -> State:
    """Return whether a run is complete, started or new.

    Raise an InputError if the folder holds files other than a run's, or a run with different options, weights, plan or
    package version.
    """
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and has_not_begun(folder)):
        return "new"
    if problem := next(_find_mismatches(run, read_record(folder)), ""):
        raise InputError(folder, problem, "Move this folder away to rerun it, or choose another --output.")
    return "complete" if is_finished(folder) else "started"


def _find_mismatches(run: ScheduledRun, record: Record) -> Iterator[str]:
    model = run.experiment.method.model
    for option, scheduled, found in differences(run.experiment, record.experiment):
        if option != "exp":
            yield f"was run with --{option}={format_value(found)}, but the study schedules {format_value(scheduled)}"
    if run.weights_sha256 and run.weights_sha256 != record.weights_sha256:
        yield f"was run with different weights than {model.weights}"
    if not is_same_plan(model, run.folder):
        yield f"was run with a different plan than {model.plan}"
    installed, found = importlib.metadata.version("jaxla"), record.environment["versions"].get("jaxla")
    if found != installed:
        yield f"was run with jaxla {found}, but {installed} is installed"


def require_same_data(runs: Sequence[ScheduledRun], states: Sequence[State], cache_dir: Path) -> None:
    """Raise an InputError unless complete runs used the current scans, masks and split."""
    complete = [run for run, state in zip(runs, states, strict=True) if state == "complete"]
    if not complete:
        return
    protocol = runs[0].experiment.data
    dataset = find_dataset(protocol, cache_dir)
    hashes = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
    for run in complete:
        fix = f"Move the folder {run.folder} away to rerun it."
        try:
            recorded = read_json(run.folder / CASES, dict[str, str], fix)
        except FileNotFoundError as error:
            raise InputError(run.folder / CASES, "missing", fix) from error
        if change := changed_case(recorded, hashes):
            problem = f"was run on different data than {run.experiment.data.root} has now ({change})"
            raise InputError(run.folder, problem, "Restore the data, or choose another --output.")
        if read_record(run.folder).split_sha256 != split_cases(list(hashes), run.experiment).sha256:
            fix = "Restore the file of --data.split, or choose another --output."
            raise InputError(run.folder, "was run on a different split than the current one", fix)
