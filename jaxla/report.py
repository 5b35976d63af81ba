"""python -m jaxla.report --study=DIR: tables, figures and statistics of a study, from the folders of its runs."""

from pathlib import Path

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.process import run_command
from jaxla.config import default_cache_dir


def main(arguments: list[str]) -> None:
    """Write `tables/`, `figures/` and `report.html` into the study's folder."""
    parser = command_parser("jaxla.report", "Write tables, figures and statistics of a study.")
    parser.add_argument("--study", type=str, required=True, help="folder that python -m jaxla.study wrote")
    parser.add_argument("--cases", type=str, default="", help="cases in Figure 3: a,b (default: worst, median, best)")
    parser.add_argument("--data.root", type=str, default="", help="folder of the scans, if they have moved")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    options = parse_arguments(parser, arguments)
    folder = Path(options.study)
    cache_dir = Path(options.cache_dir) if options.cache_dir else default_cache_dir()

    from jaxla.studies.page import report_study

    if folder.is_dir():
        require_writable("--study", folder)
    cases = [case.strip() for case in options.cases.split(",") if case.strip()]
    print(f"wrote {report_study(folder, cache_dir, options['data.root'], cases)}")


if __name__ == "__main__":
    run_command(main)
