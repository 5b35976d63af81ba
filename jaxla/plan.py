"""python -m jaxla.plan (--data.root=DIR | --fingerprint=FILE) --output=FILE: write nnU-Net's plan for scans."""

import os
from pathlib import Path

from jsonargparse import Namespace

from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.files import default_cache_dir, report_os_errors
from jaxla.cli.process import run_command
from jaxla.cli.terminal import plural
from jaxla.config import Data, InputError
from jaxla.nnunet.plan import DEFAULT_MEMORY_GB, Plan, describe_configuration, read_fingerprint, write_plan


def main(arguments: list[str]) -> None:
    """Make a plan from a folder of scans, or from shapes and spacings alone, and write it."""
    parser = command_parser("jaxla.plan", "Write nnU-Net's plan for scans: patches, networks and batch sizes.")
    parser.add_argument("--data.root", type=str, default="", help="folder of scans with masks")
    parser.add_argument("--data.image", type=str, default="", help="pattern of the images, as for training")
    parser.add_argument("--data.mask", type=str, default="", help="pattern of the masks, as for training")
    parser.add_argument("--data.labels", type=str, default="", help="mask values of each class, as for training")
    parser.add_argument("--fingerprint", type=str, help="file with spacings and shapes_after_crop, instead of scans")
    parser.add_argument("--classes", type=int, help="number of structures, with --fingerprint (default: 1)")
    parser.add_argument("--memory-gb", type=float, default=DEFAULT_MEMORY_GB, help="memory of the GPU to plan for")
    parser.add_argument("--output", type=str, required=True, help="file to write the plan to, .json")
    parser.add_argument("--cache-dir", type=str, help="shared cache folder (default: the user's cache folder)")
    options = parse_arguments(parser, arguments)
    _check_options(options)

    from jaxla.nnunet.planner import make_plan

    if options.fingerprint:
        plan = make_plan(read_fingerprint(Path(options.fingerprint)), 1 + (options.classes or 1), options.memory_gb)
    else:
        data = Data(**{name: options[f"data.{name}"] for name in ("root", "image", "mask", "labels")})
        plan = _plan_scans(data, Path(options.cache_dir or default_cache_dir()), options.memory_gb)
    output = Path(options.output)
    with report_os_errors("written", f"--output={output}", "Use another --output."):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_plan(output, plan)
    print(describe_plan(plan))


def _check_options(options: Namespace) -> None:
    """Raise an InputError for options that exclude each other, and for an output that cannot be written."""
    output = Path(options.output)
    if bool(options["data.root"]) == bool(options.fingerprint):
        problem = "both were given" if options.fingerprint else "neither was given"
        raise InputError("--data.root and --fingerprint", problem, "Pass one of them.")
    if options.fingerprint and options["data.labels"]:
        raise InputError("--data.labels", "can only be used with --data.root", "Use --classes with --fingerprint.")
    if options.classes is not None and not options.fingerprint:
        fix = "Remove it: the data set defines its classes."
        raise InputError("--classes", "can only be used with --fingerprint", fix)
    if options.classes is not None and options.classes < 1:
        raise InputError(f"--classes={options.classes}", "must be at least 1", "Pass the number of structures.")
    if not 0 < options.memory_gb < float("inf"):
        raise InputError(f"--memory-gb={options.memory_gb}", "must be a positive number", "Use 8, for example.")
    if output.suffix != ".json":
        raise InputError(f"--output={output}", "the name does not end in .json", "Add .json to the name.")
    if os.path.exists(output):
        raise InputError(f"--output={output}", "already exists", "Use another --output.")
    require_writable("--output", output.parent)


def _plan_scans(data: Data, cache_dir: Path, memory_gb: float) -> Plan:
    from jaxla.cli.terminal import track
    from jaxla.data.cache import mark_cache_in_use
    from jaxla.data.dataset import find_dataset
    from jaxla.data.prepared import prepare_cases
    from jaxla.nnunet.planner import plan_from_data, warn_unless_mri

    require_writable("--cache-dir", cache_dir)
    with mark_cache_in_use(cache_dir):
        dataset = find_dataset(data, cache_dir)
        warn_unless_mri(dataset.root)
        volumes = prepare_cases(dataset, cache_dir, lambda cases: track(cases, "reading"))
        return plan_from_data(volumes, 1 + len(dataset.labels.names), memory_gb)


def describe_plan(plan: Plan) -> str:
    """Return a line about the cases, and a line for each configuration."""
    shape, spacing = ("×".join(f"{n:g}" for n in numbers) for numbers in (plan.median_shape, plan.median_spacing))
    cases = len(plan.fingerprint.spacings) if plan.fingerprint else 0
    lines = [f"{plural(cases, 'case')}, median {shape} voxels of {spacing} mm"]
    return "\n".join(lines + [f"{name:<12} {describe_configuration(c)}" for name, c in plan.configurations.items()])


if __name__ == "__main__":
    run_command(main)
