"""python -m jaxla.report --study=DIR or --run=DIR: rewrite the report of a study or a run from its files."""

import shlex
from pathlib import Path

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.files import default_cache_dir
from jaxla.cli.process import run_command
from jaxla.config import InputError


def main(arguments: list[str]) -> None:
    """Write a study's `tables/`, `figures/` and `report.html`, or a run's `report.html` and overlays."""
    parser = command_parser("jaxla.report", "Rewrite the report of a study or a run.")
    parser.add_argument("--study", type=str, default="", help="folder that python -m jaxla.study wrote")
    parser.add_argument("--run", type=str, default="", help="folder that python -m jaxla.train wrote")
    parser.add_argument("--cases", type=str, default="", help="cases in Figure 3: a,b (default: worst, median, best)")
    parser.add_argument("--data.root", type=str, default="", help="folder of the scans, if they have moved")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    options = parse_arguments(parser, arguments)
    if bool(options.study) == bool(options.run):
        problem = "cannot be combined with --run" if options.study else "missing"
        raise InputError("--study", problem, "Pass --study=DIR or --run=DIR.")
    if options.run and options.cases:
        raise InputError("--cases", "applies only to --study", "Remove the option.")
    kind, folder = ("study", Path(options.study)) if options.study else ("run", Path(options.run))
    cache_dir = Path(options.cache_dir) if options.cache_dir else default_cache_dir()

    from jaxla.reporting.run_pages import rebuild_reports
    from jaxla.studies.page import report_study

    if folder.is_dir():
        require_writable(f"--{kind}", folder)
    if kind == "run":
        page = rebuild_reports(folder, cache_dir, options["data.root"])
    else:
        cases = [case.strip() for case in options.cases.split(",") if case.strip()]
        page = report_study(folder, cache_dir, options["data.root"], cases)
    print(f"wrote {shlex.quote(str(page))}")


if __name__ == "__main__":
    run_command(main)
