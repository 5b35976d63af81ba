"""Parse the command line into options, and report mistakes in one line."""

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from jaxla.cli.config_file import Entry, find_overridden, read_config
from jaxla.cli.files import default_cache_dir
from jaxla.config import METHOD_GROUPS, Experiment, InputError, Method, lookup, option_groups, option_values, suggestion

PRINT_CONFIG = "--print_config"
RUN_OPTIONS = ("--run-dir", "--coordinator", "--processes", "--process")


def command_parser(module: str, description: str) -> ArgumentParser:
    """Return the parser of a command. Options are never completed from a prefix."""
    return ArgumentParser(
        prog=f"python -m {module}",
        usage=f"python -m {module} --option=value ...",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def require_writable(option: str, path: Path) -> None:
    """Raise an InputError unless the folder `path` can be created or written; leaves nothing behind."""
    # os.path.exists also returns False for a path that the user may not see, where Path.exists raises an error
    parent = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{option}={path}", f"{parent} is not a writable folder", "Use another folder.")


def add_devices_option(parser: ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=0, help="total number of devices to use (0: all)")


def add_processes_options(parser: ArgumentParser) -> None:
    parser.add_argument("--coordinator", type=str, default="", help="HOST:PORT of process 0, if several run together")
    parser.add_argument("--processes", type=int | None, default=None, help="number of processes (default: from srun)")
    parser.add_argument("--process", type=int | None, default=None, help="index of this process, from 0")
    parser.add_argument("--wait", type=float, default=300, help="seconds to wait for the other processes at the start")


def parse_arguments(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse a command's arguments; refuse unknown options and values of the wrong type."""
    _check_words(parser, arguments)
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError("command line", " ".join(str(error).split()).rstrip("."), "See --help.") from error


def _check_words(parser: ArgumentParser, arguments: list[str]) -> None:
    """Raise an InputError if a word is not one of the parser's options, nor the value of one."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    positionals = [action for action in parser._actions if not action.option_strings and action.nargs is None]
    expects_value = False
    for word in arguments:
        name, has_value = word.split("=")[0], "=" in word
        if word.startswith("--"):
            if name not in actions:
                raise InputError(name, f"unknown option{suggestion(name, actions)}", "See --help for all options.")
            expects_value = not has_value and actions[name].nargs != 0
        elif expects_value or word in actions:  # a value, or -h
            expects_value = False
        elif positionals:
            positionals.pop()
        else:
            fix = f"Did you mean --{word}?" if f"--{name}" in actions else "Write options as --name=value."
            raise InputError("command line", f"unexpected argument {word!r}", fix)


class Options(NamedTuple):
    """The resolved command line of `jaxla.train`."""

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
    print_config: bool
    overridden: tuple[str, ...]  # a sentence for each option of --config that the command line overrides


def parse_names(arguments: list[str]) -> argparse.Namespace:
    """Return the values of `config`, `exp`, `method` and `root`, on which other options depend; None if not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--exp")
    parser.add_argument("--method")
    parser.add_argument("--data.root", dest="root")
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError as error:
        raise InputError("command line", str(error)) from error


def parse_experiment(
    arguments: list[str], experiments: Mapping[str, Experiment], methods: Mapping[str, Method]
) -> Options:
    """Parse the command line of `jaxla.train`, and its --config; refuse options that the method does not have."""
    if sum(word.split("=")[0] == "--config" for word in arguments) > 1:
        raise InputError("--config", "given twice", "Pass one file.")
    config = parse_names(arguments).config
    entries = read_config(Path(config)) if config else []
    words = [*(entry.word for entry in entries), *arguments]  # if an option is given twice, the last value counts
    overridden = find_overridden(entries, arguments)
    used = [entry for entry in entries if entry not in overridden]
    try:
        experiment = _named_experiment(parse_names(words), experiments, methods)
    except InputError as error:
        raise _add_line(error, config, used) from error
    parser = experiment_parser(experiment)
    for entry in entries:
        _require_experiment_option(entry, f"{config}:{entry.line}", parser, experiment)
    try:
        # PRINT_CONFIG is left out, because jsonargparse has its own option of this name and changes the word.
        parsed = parser.instantiate(parse_arguments(parser, [word for word in words if word != PRINT_CONFIG]))
    except InputError as error:
        error = _explain_option_of_other_method(error, experiment, methods)
        raise _add_line(error, config, [e for e in entries if not _can_be_parsed(parser, e)]) from error
    method = replace(experiment.method, **{name: parsed[name] for name in METHOD_GROUPS if name in parsed})
    values = {name: parsed[name] for name in Options._fields if name in parsed} | {
        "run_dir": Path(parsed.run_dir) if parsed.run_dir else None,
        "cache_dir": Path(parsed.cache_dir) if parsed.cache_dir else default_cache_dir(),
        "print_config": PRINT_CONFIG in arguments,
        "overridden": tuple(
            f"{config}:{e.line}: {e.name}={e.value} is overridden on the command line" for e in overridden
        ),
    }
    return Options(replace(experiment, data=parsed.data, method=method, seed=parsed.seed, fold=parsed.fold), **values)


def _require_experiment_option(entry: Entry, where: str, parser: ArgumentParser, experiment: Experiment) -> None:
    """Raise an InputError if an option in a --config is known, but not an option of an experiment."""
    if entry.name in option_groups(experiment):
        raise InputError(where, f"{entry.name} is a group of options", "Indent its options below it.")
    if f"--{entry.name}" in parser._option_string_actions and entry.name not in config_values(experiment):
        problem = f"{entry.name} is an option of a single command, not of an experiment"
        raise InputError(where, problem, "Pass it on the command line.")


def _can_be_parsed(parser: ArgumentParser, entry: Entry) -> bool:
    try:
        parse_arguments(parser, [entry.word])
    except InputError:
        return False
    return True


def _add_line(error: InputError, config: str | None, entries: Sequence[Entry]) -> InputError:
    """Return the error with the file and the line of the option at fault, if it comes from --config."""
    for entry in entries:
        if error.where in ("command line", f"--{entry.name}", entry.word):
            option = "" if error.where == "command line" else f"{error.where.removeprefix('--')}: "
            return InputError(f"{config}:{entry.line}", f"{option}{error.problem}", error.fix)
    return error


def config_values(experiment: Experiment) -> dict[str, Any]:
    """Return the options that a --config may have, with their values."""
    return {"exp": experiment.name, "method": experiment.method.name} | option_values(experiment)


def _named_experiment(
    names: argparse.Namespace, experiments: Mapping[str, Experiment], methods: Mapping[str, Method]
) -> Experiment:
    if names.exp is None:
        raise InputError("--exp", "missing", f"Use one of {', '.join(experiments)}; --exp=list describes them.")
    experiment = lookup("--exp", names.exp, experiments)
    if names.method is None:
        has_own_scans = names.root not in (None, "phantom")
        method = experiment.own_scans_method if has_own_scans else None
        return replace(experiment, method=method or experiment.method)
    if names.method not in methods and (names.method.startswith("dinov3_") or names.method.endswith("_reg")):
        fix = f"Use --model.arch={names.method} with a method: {', '.join(methods)}."
        raise InputError(f"--method={names.method}", "names a backbone, not a method", fix)
    return replace(experiment, method=lookup("--method", names.method, methods))


def experiment_parser(experiment: Experiment) -> ArgumentParser:
    """Return the parser of `jaxla.train` with the options of an experiment and its method, and their defaults."""
    title = f"{experiment.name}: {experiment.summary}; method {experiment.method.name}. Options and their values:"
    parser = command_parser("jaxla.train", title)
    parser.add_argument("--exp", type=str, help="experiment, or `list`")
    parser.add_argument("--method", type=str, help="method instead of the experiment's own")
    parser.add_argument("--config", type=str, help="YAML file of options, which the command line overrides")
    parser.add_argument(PRINT_CONFIG, action="store_true", help="print all options as a --config file, and exit")
    parser.add_argument("--run-dir", type=str, help="folder for the run (default: runs/<experiment>_<time>)")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --run-dir")
    parser.add_argument("--dry-run", action="store_true", help="forecast time, memory and disk space, and exit")
    add_devices_option(parser)
    parser.add_argument("--shard-params", action="store_true", help="shard large parameters over the devices")
    add_processes_options(parser)
    parser.add_argument("--seed", type=int, default=experiment.seed, help="seed of parameters and order of samples")
    folds = Literal["", "0", "1", "2", "3", "4", "all"]
    fold = "validation fold of five-fold cross-validation, or `all`"
    parser.add_argument("--fold", type=folds, default=experiment.fold, help=fold)
    for name, group in option_groups(experiment).items():
        parser.add_class_arguments(type(group), name)
        parser.set_defaults({f"{name}.{field}": value for field, value in vars(group).items()})
    return parser


def _explain_option_of_other_method(
    error: InputError, experiment: Experiment, methods: Mapping[str, Method]
) -> InputError:
    """Return a better error if the option at fault exists, but only for other methods."""
    method_name, option = experiment.method.name, error.where.removeprefix("--")
    if option == "model.network":
        return InputError(error.where, f"fixed by --method={method_name}", "Remove the option.")
    owners = [name for name, each in methods.items() if option in option_values(replace(experiment, method=each))]
    if method_name in owners or not owners:
        return error
    hint = f"{', '.join(owners[:3])} and others have it" if len(owners) > 3 else f"it belongs to {', '.join(owners)}"
    return InputError(error.where, f"method {method_name} has no such option; {hint}", "Remove the option.")


def strip_run_options(command: str) -> str:
    """Return a run's command line without the options for its folder, for resuming and for several processes."""
    return shlex.join(word for word in _words_without(command, RUN_OPTIONS) if word != "--resume")


def set_option(command: str, name: str, value: object) -> str:
    """Return a command line with one option set to a value, in place of any earlier value."""
    return shlex.join([*_words_without(command, (name,)), f"{name}={value}"])


def _words_without(command: str, names: Sequence[str]) -> Iterator[str]:
    words = iter(shlex.split(command))
    for word in words:
        if word in names:
            next(words, None)  # its value
        elif word.split("=")[0] not in names:
            yield word
