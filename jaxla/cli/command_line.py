"""The command line: how its options become an experiment, and how a mistake in them is said in one line."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxla.config import PARTS, Experiment, InputError, Method, default_cache_dir, lookup, nearest, with_method

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def command_parser(module: str, description: str) -> ArgumentParser:
    """The parser of a command; its options are taken as spelt, never completed."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"python -m {module}",
        usage=f"python -m {module} --option=value ...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def require_writable(option: str, path: Path) -> None:
    """Raise an InputError unless the folder `path` can be made or written; leaves nothing behind."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{option}={path}: cannot be written, for {parent} is no writable folder; choose another")


def add_devices_option(parser: ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=0, help="how many devices to use in all (0: all there are)")


def add_processes_options(parser: ArgumentParser) -> None:
    parser.add_argument("--coordinator", type=str, default="", help="HOST:PORT of process 0, where several meet")
    parser.add_argument("--processes", type=int | None, default=None, help="how many run this together (srun tells)")
    parser.add_argument("--process", type=int | None, default=None, help="which of them this one is, from 0 to N - 1")
    parser.add_argument("--wait", type=float, default=300, help="seconds to wait for the other processes at the start")


def parse_arguments(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """`parser.parse_args`, with every mistake an InputError of one line that names the option."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        message = " ".join(str(error).split())
    known = [option for action in parser._actions for option in action.option_strings]
    if unrecognised := re.match(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
        option = unrecognised[1].split("=")[0].split(" ")[0]
        if not option.startswith("-"):
            raise InputError(f"{option!r} is no option; options are given as --name=value")
        raise InputError(f"option {option} is unknown{nearest(option, known)} --help lists them all")
    if wrong := re.match(r'Parser key "(.*?)": Does not validate .*?Literal\[(.*?)\].* Given value: (.*)', message):
        raise InputError(f"option --{wrong[1]} expects one of {wrong[2]}, got {wrong[3]!r}")
    if wrong := re.match(r'Parser key "(.*?)": Expected an? (.*)\. Got value: ?(.*)', message):
        expected = re.sub(r"<class '(.*?)'>", r"\1", wrong[2]).replace("typing.Literal", "one of ")
        if expected.startswith("tuple"):
            example = wrong[3] if re.fullmatch(r"[-0-9, ]+", wrong[3]) else "8,4"
            expected = f"a list of whole numbers, such as [{example}]"
        raise InputError(f"option --{wrong[1]} expects {expected}, got {wrong[3]!r}")
    if lacking := re.match(r"the following arguments are required: (.*)", message):
        options = ", ".join(f"--{name}" if f"--{name}" in known else name.upper() for name in lacking[1].split(", "))
        raise InputError(f"required and not given: {options}; --help describes them")
    raise InputError(f"{message}; --help lists all options")


class Options(NamedTuple):
    """A resolved command line."""

    experiment: Experiment
    run_dir: Path | None
    cache_dir: Path
    resume: bool
    dry_run: bool
    devices: int
    shard_params: bool
    coordinator: str
    processes: int | None
    process: int | None
    wait: float


def named_experiment(arguments: list[str]) -> argparse.Namespace:
    """The values of `exp` and `method`, on which the other options depend; None where they are not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--exp")
    parser.add_argument("--method")
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error


def parse_experiment(
    arguments: list[str], experiments: Mapping[str, Experiment], methods: Mapping[str, Method]
) -> Options:
    """The experiment that a command line of `jaxla.train` names, with its method and options exchanged as it says.

    Raises:
        InputError: an unknown experiment, method or option, or a value of the wrong kind.
    """
    named = named_experiment(arguments)
    if named.exp is None:
        raise InputError(f"option --exp is required; --exp=list describes them: {', '.join(experiments)}")
    experiment = lookup("experiment", named.exp, experiments)
    if named.method is not None:
        if named.method not in methods and (named.method.startswith("dinov3_") or named.method.endswith("_reg")):
            raise InputError(
                f"method {named.method!r} is unknown; a backbone is given to any method as "
                f"--model.arch={named.method}; methods: {', '.join(methods)}"
            )
        experiment = with_method(experiment, lookup("method", named.method, methods))

    summary = f"{experiment.name}: {experiment.summary}; method {experiment.method}. Options and their values:"
    parser = command_parser("jaxla.train", summary)
    parser.add_argument("--exp", type=str, help="experiment, or `list`")
    parser.add_argument("--method", type=str, help="method in place of the experiment's own")
    parser.add_argument("--run-dir", type=str, help="folder for the run (default: runs/<experiment>_<time>)")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, which was ended")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would take, and leave it at that")
    add_devices_option(parser)
    parser.add_argument("--shard-params", action="store_true", help="divide large parameters over the devices")
    add_processes_options(parser)
    fixed = {"name": experiment.name, "summary": experiment.summary, "method": experiment.method}
    parser.add_class_arguments(Experiment, None, skip=set(fixed))
    parser.set_defaults({key: value for key, value in asdict(experiment).items() if key not in fixed})
    parsed = parser.instantiate(parse_arguments(parser, arguments))

    of_session = {name: parsed[name] for name in Options._fields if name not in ("experiment", "run_dir", "cache_dir")}
    return Options(
        experiment=Experiment(**fixed, **{key: parsed[key] for key in ("seed", "fold", *PARTS)}),
        run_dir=Path(parsed.run_dir) if parsed.run_dir else None,
        cache_dir=Path(parsed.cache_dir) if parsed.cache_dir else default_cache_dir(),
        **of_session,
    )


def without_folder_and_process(command: str) -> str:
    """A run's command line without what ties it to its folder and to one of several processes."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word in ("--run-dir", "--coordinator", "--processes", "--process"):
            next(words, None)  # its value
        elif word != "--resume" and not word.startswith(("--run-dir=", "--coordinator=", "--process")):
            kept.append(word)
    return shlex.join(kept)
