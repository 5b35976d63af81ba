"""python -m jaxla.verify --data.root=DIR [--data.labels=…] [--json]: what is in a folder of scans, before any training.

Reads every case, writes nothing. Exits 0 if training could start, 2 if it could not.
"""

from __future__ import annotations

import json
import logging
import sys

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError


def main(arguments: list[str]) -> None:
    """Read the folder, print the report.

    Raises:
        InputError: wrong usage, no cases, or findings that would keep training from starting (after the report).
    """
    parser = command_parser("jaxla.verify", "Say what is in a folder of scans, before any training; writes nothing.")
    parser.add_argument("--data.root", type=str, required=True, help="folder of scans with masks")
    parser.add_argument(
        "--data.labels", type=str, default="", help="which mask values are which class, such as LA:1; as in training"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document, with every case and finding, instead of text"
    )
    options = parse_arguments(parser, arguments)
    if options.data.root == "phantom":
        raise InputError(
            "--data.root=phantom: names scans that training makes, no folder; make some with "
            "`python -m jaxla.phantom --output=DIR` and give that folder"
        )

    from tqdm import tqdm

    from jaxla.data.inventory import take_inventory
    from jaxla.reporting.inventory_report import to_json, to_text

    logging.getLogger("jaxla").setLevel(logging.WARNING)  # what the readers log on stdout is in the report
    inventory = take_inventory(
        options.data.root,
        options.data.labels,
        track=lambda cases: tqdm(cases, "reading", leave=False, unit="case", disable=not sys.stderr.isatty()),
    )
    print(json.dumps(to_json(inventory), indent=1, ensure_ascii=False) if options.json else to_text(inventory))
    if errors := inventory.errors:
        first = errors[0]
        problems = "1 problem keeps" if len(errors) == 1 else f"{len(errors)} problems keep"
        which = "" if len(errors) == 1 else "; the first"
        raise InputError(
            f"--data.root={options.data.root}: {problems} training from starting{which}: "
            f"{first.file}: {first.what}; {first.mend}"
        )


if __name__ == "__main__":
    run_command(main)
