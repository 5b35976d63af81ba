"""`jaxla COMMAND ...` and `python -m jaxla COMMAND ...`: the same as `python -m jaxla.COMMAND ...`."""

from __future__ import annotations

import sys
from importlib import import_module

from jaxla.cli.process import run_command
from jaxla.cli.start import start_command
from jaxla.config import InputError, suggestion

COMMANDS = {
    "train": "train a method under a protocol, test it, and write the run's folder",
    "predict": "segment scans with a trained network",
    "evaluate": "score predicted masks against references",
    "study": "run methods and protocols to compare, and write tables and figures",
    "report": "write a study's tables and figures again",
    "verify": "check a folder of scans before training",
    "info": "describe a run folder or a file of converted weights",
    "plan": "plan nnU-Net's patches, network and batches from scans",
    "cache": "list or clear the cache folder",
    "phantom": "write synthetic scans",
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        start_command()
        run_command(import_module(f"jaxla.{name}").main)
    run_command(lambda arguments: _print_commands(name))


def _print_commands(name: str) -> None:
    if name not in ("-h", "--help"):
        raise InputError(name, f"not a command{suggestion(name, COMMANDS)}", f"Commands: {', '.join(COMMANDS)}.")
    print("usage: jaxla COMMAND [--option=value ...]; jaxla COMMAND --help shows its options\n")
    print("\n".join(f"  {command:<9} {summary}" for command, summary in COMMANDS.items()))


if __name__ == "__main__":
    main()
