"""Completion of commands, options and paths in a shell."""

import argparse
import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from importlib import import_module

import shtab

from jaxla.config import lookup

SHELLS = dict.fromkeys(("bash", "zsh", "tcsh"))


def print_completion(shell: str, commands: Mapping[str, tuple[str, str]]) -> None:
    """Print the script that completes `jaxla` in a shell; `commands` are name -> module, summary.

    For `train`, the options are those of paper 1's default method, which has most of them.

    Raises:
        InputError: the shell is not one of `SHELLS`.
    """
    lookup("--print-completion", shell, SHELLS)
    parser = argparse.ArgumentParser("jaxla")
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    for name, (module, summary) in commands.items():
        command = subparsers.add_parser(name, help=summary)
        words = ["--exp=paper1"] if name == "train" else []
        for option in re.findall(r"^ +(--[a-z][\w.-]*)", read_help(module, words), re.MULTILINE):
            command.add_argument(option).complete = shtab.FILE
    print(shtab.complete(parser, shell))


def read_help(module: str, words: list[str]) -> str:
    """Return what a command prints for `--help` after these words."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        import_module(module).main([*words, "--help"])
    return printed.getvalue()
