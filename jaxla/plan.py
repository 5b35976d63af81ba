"""python -m jaxla.plan (--data.root=DIR | --fingerprint=FILE) --output=FILE: what nnU-Net plans for the scans."""

from __future__ import annotations

import os
from pathlib import Path

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.files import report_os_errors
from jaxla.cli.process import run_command
from jaxla.config import Data, InputError, default_cache_dir
from jaxla.nnunet.plan import Plan, read_fingerprint, write_plan
from jaxla.nnunet.plan import describe as describe_configuration
from jaxla.nnunet.planner import MEMORY_GB, make_plan


def main(arguments: list[str]) -> None:
    """Plan from a folder of scans, or from their shapes and spacings alone, and write the plan.

    Raises:
        InputError: no scans or no fingerprint, or an output that exists or cannot be written.
    """
    parser = command_parser(
        "jaxla.plan", "What nnU-Net plans for scans: patches, networks and batches, from their shapes and spacings."
    )
    parser.add_argument("--data.root", type=str, default="", help="folder of scans with masks")
    parser.add_argument(
        "--data.labels", type=str, default="", help="which mask values are which class (as for training)"
    )
    parser.add_argument("--fingerprint", type=str, help="in place of scans: file with spacings and shapes_after_crop")
    parser.add_argument("--classes", type=int, help="with --fingerprint: number of structures (default: 1)")
    parser.add_argument("--memory-gb", type=float, default=MEMORY_GB, help="memory of the GPU that is planned for")
    parser.add_argument("--output", type=str, required=True, help="the plan's file, .json")
    parser.add_argument("--cache-dir", type=str, help="folder that runs share (default: the user's cache folder)")
    options = parse_arguments(parser, arguments)

    root, output = options["data.root"], Path(options.output)
    if bool(root) == bool(options.fingerprint):
        raise InputError("give one of the options --data.root, a folder of scans, and --fingerprint, a file")
    if not 0 < options.memory_gb < float("inf"):
        raise InputError(f"option --memory-gb must be a positive number, got {options.memory_gb}")
    if output.suffix != ".json":
        raise InputError(f"--output={output}: the file's name must end in .json")
    if os.path.exists(output):
        raise InputError(f"{output}: exists already; choose another --output or remove it")
    require_writable("--output", output.parent)

    if options.fingerprint:
        if options.data.labels:
            raise InputError("option --data.labels goes with --data.root; with --fingerprint give --classes")
        if options.classes is not None and options.classes < 1:
            raise InputError(f"option --classes must be at least 1, got {options.classes}")
        plan = make_plan(read_fingerprint(Path(options.fingerprint)), 1 + (options.classes or 1), options.memory_gb)
    else:
        if options.classes is not None:
            raise InputError("option --classes goes with --fingerprint; the data say which classes there are")
        plan = _plan_scans(Data(root=root, labels=options["data.labels"]), options.cache_dir, options.memory_gb)
    with report_os_errors("written", f"--output={output}", "Choose another file."):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_plan(output, plan)
    print(describe(plan))


def _plan_scans(data: Data, cache_dir: str | None, memory_gb: float) -> Plan:
    from jaxla.cli.terminal import track
    from jaxla.data.cache import mark_cache_in_use
    from jaxla.data.cases import find_cases
    from jaxla.data.dataset import resolve_data_root
    from jaxla.data.prepared import prepare_cases
    from jaxla.nnunet.fingerprint import fingerprint
    from jaxla.pipeline.planning import warn_of_channel

    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    require_writable("--cache-dir", cache)
    with mark_cache_in_use(cache):
        dataset = find_cases(resolve_data_root(data, cache), data.labels)
        warn_of_channel(dataset.root)
        volumes = prepare_cases(dataset, cache, lambda cases: track(cases, "reading"))
        found = fingerprint(volumes, lambda volumes: track(volumes, "planning"))
    return make_plan(found, 1 + len(dataset.labels.names), memory_gb)


def describe(plan: Plan) -> str:
    """A plan in a few lines."""

    shape, spacing = ("×".join(f"{n:g}" for n in numbers) for numbers in (plan.median_shape, plan.median_spacing))
    cases = len(plan.fingerprint.spacings) if plan.fingerprint else 0
    lines = [f"{cases} cases, median {shape} voxels of {spacing} mm"]
    lines += [f"{name:<12} {describe_configuration(c)}" for name, c in plan.configurations.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
