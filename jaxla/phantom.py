"""python -m jaxla.phantom --output=DIR [--cases=N] [--size=small|full|crop] [--seed=S]: write synthetic LGE-MRI."""

import shlex
from pathlib import Path
from typing import Literal

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.data.phantoms import write_phantoms


def main(arguments: list[str]) -> None:
    """Write the phantoms."""
    parser = command_parser(
        "jaxla.phantom", "Write synthetic LGE-MRI with reference masks of the left atrium, in the layout of LAScarQS."
    )
    parser.add_argument("--output", type=str, required=True, help="a new or empty folder")
    parser.add_argument("--cases", type=int, default=20, help="number of synthetic patients")
    sizes = "`small`: heart; `full`: whole chest; `crop`: atrium, with the uneven brightness of real scans"
    parser.add_argument("--size", type=Literal["small", "full", "crop"], default="full", help=sizes)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    options = parse_arguments(parser, arguments)
    write_phantoms(Path(options.output), options.cases, options.size, options.seed)
    print(f"{options.cases} phantoms in {shlex.quote(options.output)}")


if __name__ == "__main__":
    run_command(main)
