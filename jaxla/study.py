"""python -m jaxla.study --name=NAME: a run for each method, protocol and seed, then tables, figures and statistics."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxla.cli.command_line import require_writable
from jaxla.cli.process import Stopped, run_command
from jaxla.config import InputError, Study, default_cache_dir, lookup
from jaxla.experiments import EXPERIMENTS, METHODS, STUDIES

# Options of a run that are not given to a study, and those that say it instead
OWN = {
    "exp": "--experiments", "method": "--methods", "seed": "--seeds", "data.subset_seed": "--seeds",
    "data.train_patients": "--experiments", "data.train_percent": "--experiments", "run-dir": "", "resume": "",
    "fold": "", "coordinator": "", "processes": "", "process": "", "wait": "",
}  # fmt: skip
PARTS_OF_A_METHOD = ("model", "preprocessing", "augmentation", "training", "postprocessing")
DESCRIPTION = """
A run for each method, protocol and seed, one after the other; then the report on all of them. Start the same command
again to go on with a study that was ended: complete runs are kept.

Options of jaxla.train go to every run (--data.root=…, --training.epochs=…), those with a method's name before them to
this method's runs alone (--unet.training.batch_size=8). The seed of a run also says which training patients its
protocol takes.
"""


def main(arguments: list[str]) -> None:
    """Plan, run, report.

    Raises:
        InputError: anything wrong with the options, the data or what the folder holds; all of it before the first run.
        Stopped: the process was asked to end.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxla.study",
        usage="python -m jaxla.study --name=NAME --output=DIR [--option=value ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--name", help=f"one of {', '.join(STUDIES)}; list describes them")
    parser.add_argument("--output", type=Path, help="folder of the study: its runs, tables and figures")
    parser.add_argument("--methods", help="such as unet,dinov2_vitb14 (default: the study's own)")
    parser.add_argument("--experiments", help="whose protocols to run (default: the study's own)")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2 (default)")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="folder that runs share")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and leave it at that")
    try:
        options, for_runs = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(" ".join(str(error).replace("argument ", "option ", 1).split())) from error
    if options.name == "list":
        print("\n".join(describe(study) for study in STUDIES.values()))
        return
    for name in ("name", "output"):
        if getattr(options, name) is None:
            known = f": {', '.join(STUDIES)}; list describes them" if name == "name" else ": the folder of the study"
            raise InputError(f"option --{name} is required{known}")
    study = lookup("study", options.name, STUDIES)
    methods = chosen("methods", options.methods, study.methods, METHODS)
    experiments = chosen("experiments", options.experiments, study.experiments, EXPERIMENTS)
    seeds = read_seeds(options.seeds)
    of_methods = divide_options(for_runs, methods)
    require_writable("--output", options.output)
    require_writable("--cache-dir", options.cache_dir)

    from jaxla.studies.execution import run_all, wait_for_orphans
    from jaxla.studies.forecast import describe_plan, measure
    from jaxla.studies.report import report_study
    from jaxla.studies.schedule import plan_runs, require_same_data, state_of, study_folder

    runs = plan_runs(of_methods, experiments, seeds, options.output, options.cache_dir)
    if not options.dry_run:
        wait_for_orphans(runs, options.output)
    states = [state_of(run) for run in runs]
    require_same_data(runs, states, options.cache_dir)
    forecast = None if set(states) == {"complete"} else measure(runs, states, options.cache_dir)
    print(describe_plan(runs, states, forecast), flush=True)
    if options.dry_run:
        return
    command = shlex.join(["python", "-m", "jaxla.study", *arguments])
    with study_folder(options.output, study, runs, command):
        try:
            failures = run_all(runs, states, forecast) if forecast else []
        except (Stopped, KeyboardInterrupt) as stop:
            where = str(stop) or "between two runs"
            raise Stopped(f"{where}; go on with: {command}") from stop
        if failures:
            reasons = "; ".join(f"{failure.run.folder} ({failure.reason})" for failure in failures)
            raise Stopped(
                f"with {len(failures)} of {len(runs)} runs failed: {reasons}; mend that; go on with: {command}"
            )
        page = report_study(options.output, options.cache_dir, runs[0].experiment.data.root)
    print(f"{'1 run is' if len(runs) == 1 else f'{len(runs)} runs are'} complete: {page}")


def describe(study: Study) -> str:
    return (
        f"{study.name:<16} {study.summary}\n{'':<16} protocols of: {', '.join(study.experiments)}\n"
        f"{'':<16} methods: {', '.join(study.methods)}"
    )


def chosen(option: str, given: str | None, default: Sequence[str], known: dict[str, object]) -> list[str]:
    """The names that an option lists, or the study's own."""
    if given is None:
        return list(default)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        lookup(f"--{option}:", name, known)
    require_once(option, names)
    return names


def read_seeds(given: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in given.strip("[]").split(",")]
    except ValueError as error:
        raise InputError(f"option --seeds={given}: expected numbers, such as 0,1,2") from error
    if min(seeds) < 0:
        raise InputError(f"option --seeds={given}: seeds must be 0 or more")
    require_once("seeds", seeds)
    return seeds


def require_once(option: str, items: Sequence[object]) -> None:
    for item in items:
        if items.count(item) > 1:
            raise InputError(f"option --{option}: {item} is given twice; name each once")


def divide_options(given: Sequence[str], methods: Sequence[str]) -> dict[str, list[str]]:
    """Each method's options of `jaxla.train`: those that all get, and then its own.

    Raises:
        InputError: an option that the study gives itself, or one of a method that is not run.
    """
    of_methods: dict[str, list[str]] = {method: [] for method in methods}
    own: dict[str, list[str]] = {method: [] for method in methods}
    words = of_methods.values()
    for word in given:
        if not word.startswith("--"):  # the value of the option before it
            for line in words:
                line.append(word)
            continue
        name = word[2:].split("=")[0]
        first, _, rest = name.partition(".")
        if name in OWN:
            instead = f"give {OWN[name]}" if OWN[name] else "leave it out"
            raise InputError(f"option --{name} is not for a study, which says it to each run; {instead}")
        if first in METHODS:
            if first not in methods:
                raise InputError(
                    f"option --{name}: {first} is not among the methods of this study: {', '.join(methods)}"
                )
            if rest.split(".")[0] not in PARTS_OF_A_METHOD:
                raise InputError(f"option --{name}: methods may differ in {', '.join(PARTS_OF_A_METHOD)}, not in this")
            words = [own[first]]
            words[0].append(f"--{word[2:].removeprefix(f'{first}.')}")
        else:
            words = of_methods.values()
            for line in words:
                line.append(word)
    return {method: of_methods[method] + own[method] for method in methods}


if __name__ == "__main__":
    run_command(main)
