"""python -m jaxla.predict --run=DIR --input=FILE|DIR --output=FILE|DIR [--probabilities]: scans in, masks out."""

import math
from pathlib import Path

from jsonargparse import Namespace

from jaxla.cli.command_line import (
    add_devices_option,
    add_processes_options,
    command_parser,
    parse_arguments,
    require_writable,
)
from jaxla.cli.process import run_command
from jaxla.config import InputError, default_cache_dir
from jaxla.data.cases import find_images
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.volumes import Volume, read_image, write_volume
from jaxla.distributed import join_processes, local_items, log_progress, require_same, use_devices, use_local_devices
from jaxla.hardware import keep_compiled_programs
from jaxla.inference.segment import segment_volume
from jaxla.runs.folder import is_finished
from jaxla.runs.record import read_record
from jaxla.runs.trained import TrainedRun, load_run
from jaxla.tasks import Task, restore_task


def main(arguments: list[str]) -> None:
    """Segment scans with the epoch that a run kept."""
    task = "Segment scans with a trained network. Each mask has the shape, affine and header geometry of its scan."
    parser = command_parser("jaxla.predict", task)
    parser.add_argument("--run", type=str, required=True, help="folder of a run")
    parser.add_argument("--input", type=str, required=True, help="a .nii or .nii.gz scan, or a folder of them")
    parser.add_argument("--output", type=str, required=True, help="file for the mask, or folder for <case>.nii.gz")
    probabilities = "also write <case>_probabilities.nii.gz (float32; 4D for several classes)"
    parser.add_argument("--probabilities", action="store_true", help=probabilities)
    add_devices_option(parser)
    add_processes_options(parser)
    options = parse_arguments(parser, arguments)
    with join_processes(options.coordinator, options.processes, options.process, options.wait):
        predict(options)


def predict(options: Namespace) -> None:
    """Segment the scans; each process segments its share of them."""
    given = {name: str(options[name]) for name in ("run", "input", "output", "probabilities", "devices")}
    require_same({f"--{name}": value for name, value in given.items()}, "Give all processes the same options.")
    scans, source, output = find_images(options.input), Path(options.input), Path(options.output)
    outputs = name_outputs(scans, source, output)
    require_apart(output, source, outputs)
    for mask in outputs.values():
        for path in (mask, probabilities_file(mask)) if options.probabilities else (mask,):
            if path.exists():
                raise InputError(path, "exists already", "Use another --output.")
    require_writable("--output", next(iter(outputs.values())).parent)

    record = read_record(Path(options.run))
    task = restore_task(record.experiment, record.labels.outputs, record.extent, Path(options.run))
    check_scans(local_items(list(outputs)), task, options.run)
    sizes = {str(path): f"{path.stat().st_size} bytes" for path in outputs}
    require_same(sizes, "Give all processes the same scans.")  # also waits: none writes while another still checks
    keep_compiled_programs(default_cache_dir())
    with use_devices(options.devices), use_local_devices():
        run = load_run(options.run)
        if not is_finished(Path(options.run)):
            training = record.experiment.method.training
            log_progress(
                f"{options.run}: this run of at most {record.fitted_epochs or training.epochs} epochs is not finished; "
                f"using its {training.checkpoint} epoch so far, {run.epoch}"
            )
        segment_scans(run, outputs, options.probabilities)


def check_scans(scans: list[Path], task: Task, run: str) -> None:
    """Raise an InputError unless all scans can be read and have enough slices."""
    slice_counts = []
    for scan in scans:
        volume = read_image(scan)
        slice_counts.append(to_slices(volume.array, slice_geometry(volume.affine)).shape[0])
        task.check_scan(scan, slice_counts[-1])
    if slice_counts and (description := task.describe(slice_counts)):
        log_progress(f"{run}: {description}")


def segment_scans(run: TrainedRun, outputs: dict[Path, Path], with_probabilities: bool) -> None:
    """Segment this process's share of the scans, and write each mask as soon as it is there."""
    segment, names = run.make_segment(), run.record.labels.names
    for position, (scan, mask) in local_items(list(enumerate(outputs.items(), start=1))):
        volume = read_image(scan)
        log_if_cut(volume, run.task)
        classes, probabilities = segment_volume(segment, volume, with_probabilities)
        if probabilities is not None:
            write_volume(probabilities_file(mask), probabilities, volume)
        write_volume(mask, run.record.labels.to_values(classes), volume)
        voxel_ml = math.prod(volume.spacing) / 1000
        volumes = [f"{name} {(classes == k).sum() * voxel_ml:.1f} ml" for k, name in enumerate(names, start=1)]
        log_progress(f"{position}/{len(outputs)} {mask}: {', '.join(volumes)}")


def log_if_cut(volume: Volume, task: Task) -> None:
    """Log if the network sees only the centre of a scan's slices."""
    geometry = slice_geometry(volume.affine)
    shape, spacing = to_slices(volume.array, geometry).shape, geometry.spacing
    if task.is_cut(shape, spacing):
        height, width = (n * mm for n, mm in zip(shape[1:], spacing[1:], strict=True))
        log_progress(
            f"{volume.path}: slices of {height:.0f} × {width:.0f} mm are larger than the {task.extent:.0f} mm that the "
            "network was trained on; it sees their centre, and the rest becomes background"
        )


def name_outputs(scans: dict[str, Path], source: Path, output: Path) -> dict[Path, Path]:
    """Return the mask file of each scan: the output itself for one scan and a file name, else `<case>.nii.gz` in it."""
    is_file_name = output.name.endswith((".nii", ".nii.gz"))
    if source.is_file():
        return {source: output if is_file_name else output / f"{next(iter(scans))}.nii.gz"}
    if is_file_name:
        raise InputError(f"--output={output}", f"a file, but --input={source} is a folder", "Give a folder.")
    return {scan: output / f"{case_id}.nii.gz" for case_id, scan in scans.items()}


def require_apart(output: Path, source: Path, outputs: dict[Path, Path]) -> None:
    """Raise an InputError if masks would lie among the scans, where they may be taken for scans or references."""
    if output in outputs.values():  # the file name that the user gave for one mask
        return
    folder, scans = output.resolve(), source.resolve()
    if folder.is_relative_to(scans) if source.is_dir() else folder == scans.parent:
        problem = f"masks would lie among the scans of --input={source}"
        raise InputError(f"--output={output}", problem, "Use another folder.")


def probabilities_file(mask: Path) -> Path:
    """Return the name of the probabilities beside a mask."""
    stem = mask.name.removesuffix(".gz").removesuffix(".nii")
    return mask.with_name(f"{stem}_probabilities{mask.name.removeprefix(stem)}")


if __name__ == "__main__":
    run_command(main)
