"""python -m jaxla.study --name=NAME: run every method, protocol and seed, then write tables and figures."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxla.cli.command_line import require_writable
from jaxla.cli.files import default_cache_dir
from jaxla.cli.process import run_command
from jaxla.cli.terminal import wrap
from jaxla.config import METHOD_GROUPS, InputError, Study, lookup
from jaxla.experiments import EXPERIMENTS, METHODS, STUDIES

# Options of a run that a study sets itself -> what to do instead
SET_BY_STUDY = {
    "exp": "Use --experiments.",
    "data.train_patients": "Use --experiments.",
    "data.train_percent": "Use --experiments.",
    "method": "Use --methods.",
    "seed": "Use --seeds.",
    "data.subset_seed": "Use --seeds.",
} | dict.fromkeys(
    ("run-dir", "resume", "fold", "coordinator", "processes", "process", "wait", "config", "print_config"),
    "Remove the option.",
)
DESCRIPTION = """
Run every method under every protocol with every seed, one after the other, and write the report.
To resume a study that was stopped, run the same command again: complete runs are kept.

Options of jaxla.train apply to all runs (--data.root=…, --training.epochs=…). With a method's name
in front, they apply to the runs of that method (--unet.training.batch_size=8). The seed of a run
also chooses its training patients.
"""


def main(arguments: list[str]) -> None:
    """Schedule, forecast, run, report.

    Raises:
        InputError: invalid options or data, or a folder that holds something else; all before the first run.
        Stopped: a run failed, or the process was asked to stop.
    """
    options, train_options = parse_options(arguments)
    if options.name == "list":
        print("\n".join(map(describe_study, STUDIES.values())))
        return
    if options.name is None:
        raise InputError("--name", "required", f"Choose from {', '.join(STUDIES)}; --name=list describes them.")
    if options.output is None:
        raise InputError("--output", "required", "Pass the folder of the study.")
    study = lookup("--name", options.name, STUDIES)
    methods = choose_names("--methods", options.methods, study.methods, METHODS)
    protocols = choose_names("--experiments", options.experiments, study.experiments, EXPERIMENTS)
    seeds = read_seeds(options.seeds)
    method_options = divide_options(train_options, methods)
    require_writable("--output", options.output)
    require_writable("--cache-dir", options.cache_dir)

    from jaxla.hardware import require_devices
    from jaxla.studies.execution import execute_runs, wait_for_running
    from jaxla.studies.forecast import describe_schedule, forecast_study
    from jaxla.studies.page import report_study
    from jaxla.studies.schedule import hold_study_folder, read_state, require_same_data, schedule_runs
    from jaxla.training.checkpoints import require_usable_path

    require_devices()
    require_usable_path(options.output)
    runs = schedule_runs(method_options, protocols, seeds, options.output, options.cache_dir)
    if not options.dry_run:
        wait_for_running(runs, options.output)
    states = [read_state(run) for run in runs]
    require_same_data(runs, states, options.cache_dir)
    forecast = None if set(states) == {"complete"} else forecast_study(runs, states, options.cache_dir)
    print(wrap(describe_schedule(runs, states, forecast), indent=6 * " "), flush=True)
    if options.dry_run:
        return
    command = shlex.join(["python", "-m", "jaxla.study", *arguments])
    with hold_study_folder(options.output, study, runs, command):
        if forecast:
            execute_runs(runs, states, forecast.seconds, command)
        page = report_study(options.output, options.cache_dir, runs[0].experiment.data.root)
    print(f"{'1 run is' if len(runs) == 1 else f'{len(runs)} runs are'} complete: {shlex.quote(str(page))}")


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the study, and the remaining arguments, which are options of `jaxla.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxla.study",
        usage="python -m jaxla.study --name=NAME --output=DIR [--option=value ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--name", help=f"one of {', '.join(STUDIES)}; `list` describes them")
    parser.add_argument("--output", type=Path, help="folder for runs, tables and figures")
    parser.add_argument("--methods", help="such as unet,dinov2_vitb14 (default: the study's own)")
    parser.add_argument("--experiments", help="experiments whose protocols to run (default: the study's own)")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2 (default)")
    parser.add_argument("--cache-dir", type=Path, help="folder that runs share (default: the user's cache folder)")
    parser.add_argument("--dry-run", action="store_true", help="print schedule and forecast without running")
    try:
        options, train_options = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(error.argument_name, error.message, "See --help.") from error
    options.cache_dir = options.cache_dir or default_cache_dir()
    return options, train_options


def describe_study(study: Study) -> str:
    protocols, methods = ", ".join(study.experiments), ", ".join(study.methods)
    return f"{study.name:<16} {study.summary}\n{'':<16} protocols of: {protocols}\n{'':<16} methods: {methods}"


def choose_names(option: str, value: str | None, default: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """Return the names in an option's value, or the study's own if the option is not given."""
    names = list(default) if value is None else [name.strip() for name in value.split(",")]
    for name in names:
        lookup(option, name, known)
    require_unique(option, names)
    return names


def read_seeds(value: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in value.strip("[]").split(",")]
    except ValueError as error:
        raise InputError(f"--seeds={value}", "expected integers", "Pass a list such as 0,1,2.") from error
    if min(seeds) < 0:
        raise InputError(f"--seeds={value}", "seeds must be 0 or more", "Remove negative seeds.")
    require_unique("--seeds", seeds)
    return seeds


def require_unique(option: str, items: Sequence[object]) -> None:
    for item in items:
        if items.count(item) > 1:
            raise InputError(option, f"{item} is repeated", "Remove the repetition.")


def divide_options(train_options: Sequence[str], methods: Sequence[str]) -> dict[str, list[str]]:
    """Return each method's options of `jaxla.train`: first those of all methods, then its own."""
    shared: list[str] = []
    by_method: dict[str, list[str]] = {method: [] for method in methods}
    target = shared
    for word in train_options:
        if not word.startswith("--"):  # the value of the option before it
            target.append(word)
            continue
        name = word[2:].split("=")[0]
        if name in SET_BY_STUDY:
            raise InputError(f"--{name}", "the study sets this option for each run", SET_BY_STUDY[name])
        method, _, rest = name.partition(".")
        if method not in METHODS:
            target = shared
            target.append(word)
            continue
        if method not in methods:
            raise InputError(f"--{name}", f"method {method} is not in this study", f"Choose from {', '.join(methods)}.")
        if rest.split(".")[0] not in METHOD_GROUPS:
            fix = f"Only options of {', '.join(METHOD_GROUPS)} can differ between methods."
            raise InputError(f"--{name}", "cannot be set for a single method", fix)
        target = by_method[method]
        target.append(f"--{word[2:].removeprefix(f'{method}.')}")
    return {method: shared + by_method[method] for method in methods}


if __name__ == "__main__":
    run_command(main)
