"""`jaxla COMMAND ...` and `python -m jaxla COMMAND ...`: the same as `python -m jaxla.COMMAND ...`."""

from __future__ import annotations

import sys
from importlib import import_module

from jaxla import __version__
from jaxla.cli.process import run_command
from jaxla.cli.start import start_command
from jaxla.config import InputError, suggestion

COMMANDS = {  # name -> module, summary
    "train": ("jaxla.train", "train a method under a protocol, test it, and write the run's folder"),
    "predict": ("jaxla.predict", "segment scans with a trained network"),
    "evaluate": ("jaxla.evaluate", "score predicted masks against references"),
    "study": ("jaxla.study", "compare methods under several protocols, and write tables and figures"),
    "report": ("jaxla.report", "rewrite the report of a study or a run"),
    "verify": ("jaxla.verify", "check a folder of scans before training"),
    "info": ("jaxla.info", "describe a run folder or a file of converted weights"),
    "plan": ("jaxla.plan", "plan nnU-Net's patches, network and batches from scans"),
    "convert": ("convert_weights.__main__", "convert released checkpoints into weights for `train`"),
    "cache": ("jaxla.cache", "list or clear the cache folder"),
    "phantom": ("jaxla.phantom", "write synthetic scans"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        start_command()
        run_command(import_module(COMMANDS[name][0]).main)
    run_command(lambda arguments: _print_help_or_version(name))


def _print_help_or_version(name: str) -> None:
    if name == "--version":
        print(f"jaxla {__version__}")
        return
    if name.startswith("--print-completion="):
        from jaxla.cli.completion import print_completion

        print_completion(name.partition("=")[2], COMMANDS)
        return
    if name not in ("-h", "--help"):
        raise InputError(name, f"not a command{suggestion(name, COMMANDS)}", f"Commands: {', '.join(COMMANDS)}.")
    print("usage: jaxla COMMAND [--option=value ...]; jaxla COMMAND --help shows its options")
    print("       jaxla --version | --print-completion=bash|zsh|tcsh\n")
    print("\n".join(f"  {command:<9} {summary}" for command, (_, summary) in COMMANDS.items()))


if __name__ == "__main__":
    main()
