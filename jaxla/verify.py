"""python -m jaxla.verify --data.root=DIR [--data.labels=…] [--json]: check a folder of scans before training.

The command reads every case and writes nothing. It exits with 0 if training could start, and with 2 if not.
"""

import json
import logging
import sys
from functools import partial

from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.cli.terminal import plural
from jaxla.config import InputError


def main(arguments: list[str]) -> None:
    """Read the folder and print the report; then raise an InputError if a finding prevents training."""
    parser = command_parser("jaxla.verify", "Check a folder of scans before training; writes nothing.")
    add = parser.add_argument
    add("--data.root", type=str, required=True, help="folder of scans with masks")
    add("--data.image", type=str, default="", help="pattern of the images as in training, such as '*/lge.nrrd'")
    add("--data.mask", type=str, default="", help="pattern of the masks as in training, such as '*/la.nrrd'")
    add("--data.patients", type=str, default="", help="which cases are scans of one patient, as in training")
    add("--data.labels", type=str, default="", help="mask values of each class as in training, such as LA:1")
    add("--json", action="store_true", help="print all cases and findings as one JSON document")
    options = parse_arguments(parser, arguments)
    if options.data.root == "phantom":
        fix = "Write phantoms with `python -m jaxla.phantom --output=DIR` and pass that folder."
        problem = "stands for synthetic scans that are generated during training, so there is no folder to check"
        raise InputError("--data.root=phantom", problem, fix)

    # Imported here, because SciPy takes a second to import and --help must not wait for it.
    from tqdm import tqdm

    from jaxla.data.inventory import take_inventory
    from jaxla.reporting.inventory_report import to_json, to_text

    logging.getLogger("jaxla").setLevel(logging.WARNING)  # the report holds what the readers log
    track = partial(tqdm, desc="reading", leave=False, unit="case", disable=not sys.stderr.isatty())
    inventory = take_inventory(track=track, **vars(options.data))
    print(json.dumps(to_json(inventory), indent=1, ensure_ascii=False) if options.json else to_text(inventory))
    if errors := inventory.errors:
        first = errors[0]
        count = f"{plural(len(errors), 'error')} in the scans, so training cannot start"
        problem = f"{count}. First error: {first.file}: {first.problem}"
        raise InputError(f"--data.root={options.data.root}", problem, first.fix)


if __name__ == "__main__":
    run_command(main)
