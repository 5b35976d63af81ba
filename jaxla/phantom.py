"""python -m jaxla.phantom --output=DIR [--cases=N] [--size=small|full] [--seed=S]: synthetic LGE-MRI."""

from __future__ import annotations

from jaxla.shell.command_line import command_parser, parse_arguments
from jaxla.shell.process import run_command


def main(arguments: list[str]) -> None:
    """Parse the command line and write the phantoms. Raises InputError on bad usage or an output folder in use."""
    import sys
    from pathlib import Path
    from typing import Literal

    from tqdm import tqdm

    from jaxla.data.phantoms import write_phantoms

    parser = command_parser(
        "jaxla.phantom", "Write synthetic LGE-MRI with reference masks of the left atrium, laid out as LAScarQS 2022."
    )
    parser.add_argument("--output", type=str, required=True, help="a new or empty folder")
    parser.add_argument("--cases", type=int, default=20, help="number of synthetic patients")
    parser.add_argument("--size", type=Literal["small", "full"], default="full", help="the heart, or the chest")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    options = parse_arguments(parser, arguments)

    # A bar where someone watches, lines where a file does.
    with tqdm(total=options.cases, unit="case", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, cases: int) -> None:
            bar.update(done - bar.n)
            if bar.disable:
                print(f"case {done} of {cases}", flush=True)

        write_phantoms(Path(options.output), options.cases, options.size, options.seed, progress)
    print(f"{options.cases} phantoms in {options.output}")


if __name__ == "__main__":
    run_command(main)
