"""The plan of a study: a run for each method, protocol and seed, and how far each of them is."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from jaxla.cli.command_line import parse_experiment
from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.config import Data, Experiment, InputError, Study
from jaxla.data.cases import find_cases
from jaxla.data.dataset import resolve_data_root
from jaxla.data.prepared import content_key
from jaxla.data.split import make_split
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.nnunet.plan import read_plan
from jaxla.pipeline.checks import checked, of_method, with_weights
from jaxla.runs.folder import CASES, PLAN, RUNS, STUDY, folder_held, has_not_begun, is_finished
from jaxla.runs.record import changed_case, differences, read_record, shown

State = Literal["complete", "begun", "new"]


class PlannedRun(NamedTuple):
    """One run of a study.

    Attributes:
        experiment: with every option resolved.
        arguments: of `python -m jaxla.train`, but for its folder.
        weights_sha256: of its backbone's weights; empty for random ones.
        folder: where it lies, or will lie.
        devices: how many it uses, 0 for all; the same for all runs.
        shard_params: whether its parameters are divided over them.
    """

    experiment: Experiment
    arguments: tuple[str, ...]
    weights_sha256: str
    folder: Path
    devices: int
    shard_params: bool

    @property
    def protocol(self) -> str:
        """Name of the experiment whose protocol it runs."""
        return self.experiment.name

    @property
    def method(self) -> str:
        return self.experiment.method

    @property
    def seed(self) -> int:
        """Of its random numbers, and of which training patients the protocol takes."""
        return self.experiment.seed


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
            parsed = parse_experiment(arguments, EXPERIMENTS, METHODS)
            try:
                experiment = checked(parsed.experiment)
                if method not in weights:  # reads all of the file
                    weights[method] = with_weights(experiment, cache_dir)
            except InputError as error:
                raise of_method(error, method) from error
            located, sha256 = weights[method]
            experiment = replace(experiment, model=located.model)
            planned.append((experiment, arguments, sha256, parsed))
    first = planned[0][0]
    for n, (experiment, *_) in enumerate(planned):
        if _scans(experiment) != _scans(first):
            raise InputError(
                f"--experiments: {experiment.name} has other data than {first.name} ({experiment.data} and "
                f"{first.data}); a study compares runs on the same scans"
            )
        for other, *_ in planned[:n]:
            if other.method != experiment.method and replace(other, method=experiment.method) == experiment:
                raise InputError(
                    f"--methods: {other.method} and {experiment.method} are the same with these options; leave one "
                    f"out, or give an option to one alone, as --{other.method}.<option>"
                )
        own, taken = EXPERIMENTS[experiment.name].data, experiment.data
        if (own.train_patients, own.train_percent) != (taken.train_patients, taken.train_percent):
            raise InputError(
                f"option --data: {experiment.name} says by itself how many patients train; choose protocols by "
                "--experiments"
            )
    return [
        PlannedRun(
            replace(experiment, seed=seed, data=replace(experiment.data, subset_seed=seed)),
            (*arguments, f"--seed={seed}", f"--data.subset_seed={seed}"),
            sha256,
            output / RUNS / f"{experiment.name}_{experiment.method}_seed{seed}",
            parsed.devices,
            parsed.shard_params,
        )
        for seed in seeds
        for experiment, arguments, sha256, parsed in planned
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
    with folder_held(output, "--output", "runs a study"):
        with report_os_errors("written", f"--output={output}", "Choose another folder."):
            write_atomically(output / STUDY, json.dumps(content, indent=1) + "\n")
        yield


def state_of(run: PlannedRun) -> State:
    """How far a run is.

    Raises:
        InputError: its folder holds something else, or a run of other options or by another version of this package.
    """
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and has_not_begun(folder)):
        return "new"
    record = read_record(folder)
    move = "move that folder away to run it again, or choose another --output"
    for option, now, then in differences(run.experiment, record.experiment):
        if option != "exp":
            raise InputError(f"{folder}: was run with --{option}={shown(then)}, not {shown(now)}; {move}")
    if run.weights_sha256 and run.weights_sha256 != record.weights_sha256:
        raise InputError(f"{folder}: was run with other weights than {run.experiment.model.weights}; {move}")
    plan = run.experiment.model.plan
    if plan and (folder / PLAN).exists() and read_plan(folder / PLAN) != read_plan(Path(plan)):
        raise InputError(f"{folder}: was run with another plan than {plan}; {move}")
    made_by, here = record.environment["versions"].get("jaxla"), importlib.metadata.version("jaxla")
    if made_by != here:
        raise InputError(f"{folder}: was made by jaxla {made_by}, and this is {here}; {move}")
    return "complete" if is_finished(folder) else "begun"


def require_same_data(runs: Sequence[PlannedRun], states: Sequence[State], cache_dir: Path) -> None:
    """Raise an InputError unless complete runs saw the scans, masks and split that there are now."""
    complete = [run for run, state in zip(runs, states, strict=True) if state == "complete"]
    if not complete:
        return
    protocol = runs[0].experiment.data
    dataset = find_cases(resolve_data_root(protocol, cache_dir), protocol.all_labels)
    cases = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
    for run in complete:
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
        if read_record(run.folder).split_sha256 != make_split(list(cases), run.experiment.data).sha256:
            raise InputError(
                f"{run.folder}: was run on another split than the present one; put --data.split back, or choose "
                "another --output"
            )
