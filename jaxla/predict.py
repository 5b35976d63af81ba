"""python -m jaxla.predict --run=DIR --input=FILE|DIR --output=FILE|DIR [--probabilities]: scans in, masks out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from jaxla.cli.command_line import (
    add_devices_option,
    add_processes_options,
    command_parser,
    parse_arguments,
    require_writable,
)
from jaxla.cli.process import run_command
from jaxla.config import InputError
from jaxla.distributed import join_processes, local_items, log_progress, require_same

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from jaxla.data.inputs import Canvas
    from jaxla.data.volumes import Volume


def main(arguments: list[str]) -> None:
    """Segment scans with the epoch of a run that was kept.

    Raises:
        InputError: no run, no scan, an unreadable scan, or an output that exists or cannot be written.
    """
    parser = command_parser(
        "jaxla.predict",
        "Segment scans with the epoch that a run kept; each mask has its scan's shape, affine and header geometry.",
    )
    parser.add_argument("--run", type=str, required=True, help="folder of a run")
    parser.add_argument("--input", type=str, required=True, help="a .nii or .nii.gz scan, or a folder of them")
    parser.add_argument("--output", type=str, required=True, help="the mask's file, or a folder for <case>.nii.gz")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write <case>_probabilities.nii.gz (float32; several classes: 4D)",
    )
    add_devices_option(parser)
    add_processes_options(parser)
    options = parse_arguments(parser, arguments)
    with join_processes(options.coordinator, options.processes, options.process, options.wait):
        predict(options)


def predict(options: Namespace) -> None:
    """Segment the scans that the options name; of several processes each its share of them."""
    given = {name: str(options[name]) for name in ("run", "input", "output", "probabilities", "devices")}
    require_same({f"--{name}": value for name, value in given.items()}, "Give all processes the same options.")

    from jaxla.data.cases import find_images

    outputs = _name_outputs(find_images(options.input), Path(options.input), Path(options.output))
    for mask in outputs.values():
        for path in (mask, _probabilities_file(mask)) if options.probabilities else (mask,):
            if path.exists():
                raise InputError(f"{path}: exists already; choose another --output or remove it")

    require_writable("--output", next(iter(outputs.values())).parent)

    from jaxla.data.volumes import read_image, write_volume
    from jaxla.distributed import use_devices, use_local_devices
    from jaxla.inference.segment import make_segment, write_segmentation
    from jaxla.inference.trained import load_run
    from jaxla.models.build import about_depth, require_slices
    from jaxla.runs.folder import is_finished
    from jaxla.runs.record import read_record

    record = read_record(Path(options.run))
    model, counts = record.experiment.model, []
    for scan in local_items(list(outputs)):  # all are checked before the first is segmented
        counts.append(slices_of(read_image(scan)))
        require_slices(model, scan, counts[-1])
    if counts and (of_depth := about_depth(model, counts)):
        log_progress(f"{options.run}: {of_depth}")
    sizes = {str(path): f"{path.stat().st_size} bytes" for path in outputs}
    require_same(sizes, "Give all processes the same scans.")  # and wait: none writes while another still looks
    with use_devices(options.devices), use_local_devices():
        trained = load_run(options.run)
        if not is_finished(Path(options.run)):
            kept = record.experiment.training.checkpoint
            log_progress(
                f"{options.run}: this run of at most {record.experiment.training.epochs} epochs is not finished; its "
                f"{kept} epoch so far, {trained.epoch}, segments"
            )
        segment, names = make_segment(trained), record.labels.names
        for number, (scan, mask) in local_items(list(enumerate(outputs.items(), start=1))):
            volume = read_image(scan)
            say_if_cut(volume, trained.record.canvas)
            classes, probabilities = segment(volume, options.probabilities)
            if probabilities is not None:
                write_volume(_probabilities_file(mask), probabilities, volume)
            write_segmentation(mask, classes, trained, volume)
            voxel = math.prod(volume.spacing) / 1000
            found = [f"{name} {(classes == k).sum() * voxel:.1f} ml" for k, name in enumerate(names, start=1)]
            log_progress(f"{number}/{len(outputs)} {mask}: {', '.join(found)}")


def slices_of(volume: Volume) -> int:
    """How many slices a scan has."""
    from jaxla.data.volumes import slice_geometry, to_slices

    return to_slices(volume.array, slice_geometry(volume.affine)).shape[0]


def say_if_cut(volume: Volume, canvas: Canvas) -> None:
    from jaxla.data.volumes import slice_geometry, to_slices

    geometry = slice_geometry(volume.affine)
    shape, spacing = to_slices(volume.array, geometry).shape[1:], geometry.spacing[1:]
    if canvas.frame(shape, spacing).cuts:
        height, width = (n * mm for n, mm in zip(shape, spacing, strict=True))
        log_progress(
            f"{volume.path}: slices of {height:.0f} × {width:.0f} mm are larger than the {canvas.extent:.0f} mm that "
            "the network was trained on: it sees their centre, the rest is background"
        )


def _name_outputs(scans: dict[str, Path], source: Path, output: Path) -> dict[Path, Path]:
    """Scan -> mask file: the output itself for one scan and a file name, else `<case>.nii.gz` in the output folder."""
    names_file = output.name.endswith((".nii", ".nii.gz"))
    if source.is_file():
        return {source: output if names_file else output / f"{next(iter(scans))}.nii.gz"}
    if names_file:
        raise InputError(f"--output={output}: a file, but --input={source} is a folder; give a folder")
    return {scan: output / f"{case_id}.nii.gz" for case_id, scan in scans.items()}


def _probabilities_file(mask: Path) -> Path:
    stem = mask.name.removesuffix(".gz").removesuffix(".nii")
    return mask.with_name(f"{stem}_probabilities{mask.name.removeprefix(stem)}")


if __name__ == "__main__":
    run_command(main)
