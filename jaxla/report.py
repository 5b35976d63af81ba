"""python -m jaxla.report --study=DIR: tables, figures and statistics of a study, from the folders of its runs."""

from __future__ import annotations

from pathlib import Path

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.process import run_command
from jaxla.config import default_cache_dir


def main(arguments: list[str]) -> None:
    """Write `tables/`, `figures/` and `report.html` into the study's folder.

    Raises:
        InputError: not a study's folder, a run that is incomplete or cannot be compared with the others, or scans that
            are gone.
    """
    parser = command_parser("jaxla.report", "Tables, figures and statistics of a study.")
    parser.add_argument("--study", type=str, required=True, help="folder that python -m jaxla.study wrote")
    parser.add_argument("--cases", type=str, default="", help="for Figure 3, such as a,b (default: worst to best)")
    parser.add_argument("--data.root", type=str, default="", help="the scans, if they are no longer where they were")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    options = parse_arguments(parser, arguments)
    folder = Path(options.study)
    cache_dir = Path(options.cache_dir) if options.cache_dir else default_cache_dir()

    from jaxla.studies.report import report_study

    if folder.is_dir():
        require_writable("--study", folder)
    cases = [case.strip() for case in options.cases.split(",") if case.strip()]
    print(f"written: {report_study(folder, cache_dir, options['data.root'], cases)}")


if __name__ == "__main__":
    run_command(main)
