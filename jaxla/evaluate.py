"""python -m jaxla.evaluate: score predicted masks against reference masks.

Files are matched by name. `--output` gets cases.csv and summary.json, and with `--protocol=lascarqs2022` the table of
that challenge; it appears when everything is computed, or not at all.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError

log = logging.getLogger("jaxla.evaluate")


def main(arguments: list[str]) -> None:
    """Score every case, write the tables, print the summary.

    Raises:
        InputError: a file without its partner, on another grid, unreadable or with a value that no class has; an output
            that exists; options that contradict each other.
    """
    parser = command_parser("jaxla.evaluate", "Score predicted masks against references.")
    parser.add_argument("--predictions", type=str, required=True, help="folder of predicted masks, <case>.nii.gz")
    parser.add_argument(
        "--references",
        type=str,
        required=True,
        help="folder of such masks, <case>_mask.nii.gz too, or a data set",
    )
    parser.add_argument("--output", type=str, required=True, help="folder to create for cases.csv and summary.json")
    parser.add_argument(
        "--unit",
        type=Literal["volume", "slice"],
        default="volume",
        help="what one measurement is of; means are over these",
    )
    parser.add_argument(
        "--protocol", type=Literal["lascarqs2022"] | None, default=None, help="also write this challenge's own table"
    )
    parser.add_argument(
        "--empty",
        type=Literal["one", "zero", "skip"],
        default="one",
        help="what nothing predicted counts where the reference is empty: perfect, worst, or left out",
    )
    parser.add_argument("--cases", type=str, help="a run's split.json: score only its test cases")
    parser.add_argument(
        "--data.labels", type=str, default="", help="which mask values are which class, such as LA:1; as in training"
    )
    options = parse_arguments(parser, arguments)

    from jaxla.evaluation.summary import summarise, summary_table
    from jaxla.pipeline.scoring import checked_labels, match_cases, score_files, write_tables

    output = Path(options.output)
    if output.exists() or output.is_symlink():
        raise InputError(f"--output={output}: exists already; name a new folder")
    if options.protocol and (options.unit, options.empty) not in (("volume", "one"), ("volume", "zero")):
        raise InputError(f"--protocol={options.protocol} scores every volume; leave --unit=slice and --empty=skip out")

    pairs, labels = match_cases(Path(options.predictions), Path(options.references), options.cases, options.data.labels)
    labels = checked_labels(pairs, labels)
    if options.protocol and len(labels.names) > 1:
        raise InputError(f"--protocol={options.protocol} has one class, the LA cavity; found {labels.describe()}")

    rows = []
    for number, (case_id, prediction, reference) in enumerate(pairs, start=1):
        rows += score_files(case_id, prediction, reference, labels, options.unit, options.empty)
        log.info("%d/%d %s", number, len(pairs), case_id)
    summary = summarise(rows, options.unit, options.empty, labels.names)
    write_tables(output, rows, summary, options.protocol)
    print(summary_table(summary))
    print(f"{len(pairs)} cases; {summary['averaging']}; {summary['empty_rule']}")
    if options.empty == "skip":
        print(
            f"left out: {summary['skipped']['units']} {options.unit}s, {summary['skipped']['rows']} rows of cases.csv"
        )
    print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
