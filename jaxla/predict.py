"""python -m jaxla.predict --run=DIR --input=FILE|DIR --output=FILE|DIR: segment scans with a trained network."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import Namespace

from jaxla.cli.command_line import (
    add_devices_option,
    add_processes_options,
    command_parser,
    parse_arguments,
    require_writable,
)
from jaxla.cli.files import default_cache_dir, is_leftover
from jaxla.cli.process import Stopped, run_command
from jaxla.config import InputError
from jaxla.data.cases import find_images
from jaxla.data.dicom import is_dicom_series
from jaxla.data.formats import scan_extension, strip_extension
from jaxla.data.slices import slice_geometry, to_slices
from jaxla.data.volumes import Volume, hash_voxels, log_warnings, read_image, read_mask, same_grid, write_volume
from jaxla.distributed import (
    barrier,
    gather,
    is_first,
    join_processes,
    local_items,
    log_progress,
    name_resume_command,
    require_same,
)
from jaxla.hardware import keep_compiled_programs
from jaxla.inference.mask_files import (
    EXTENSIONS,
    is_mask_file,
    mask_classes,
    mask_extension,
    probabilities_extension,
    require_mask_file,
    write_mask,
)
from jaxla.inference.segment import segment_volume
from jaxla.mesh import use_devices, use_local_devices
from jaxla.runs.folder import is_finished
from jaxla.runs.predictions import (
    Origin,
    describe_mask,
    find_kept,
    mark_unfinished,
    read_unfinished,
    recorded_cases,
    replace_rows,
    run_id,
    unfinished_file,
)
from jaxla.runs.record import Record, read_record
from jaxla.runs.trained import TrainedRun, load_run
from jaxla.runs.training_scans import describe_scan, find_differences, find_part, read_known_scans
from jaxla.tasks import Task, restore_task

Row = dict[str, Any]  # a row of predictions.csv, or some of its columns


class Output(NamedTuple):
    """A scan and the files to write for it."""

    case: str
    scan: Path
    mask: Path
    probabilities: Path | None  # None if not requested

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.mask, self.probabilities) if path]


def main(arguments: list[str]) -> None:
    """Segment scans with the network of a run's kept epoch."""
    task = "Segment scans with a trained network. Each mask has the shape, affine and header geometry of its scan."
    parser = command_parser("jaxla.predict", task)
    parser.add_argument("--run", type=str, required=True, help="folder of a run")
    parser.add_argument("--input", type=str, required=True, help="a scan, a DICOM series, or a folder of them")
    parser.add_argument("--data.image", type=str, default="", help="pattern of the images in --input, as for training")
    parser.add_argument("--output", type=str, required=True, help="file for the mask, or folder for masks <case>.*")
    formats = "format of the masks; `scan` uses the format of each scan, and dicom-seg for a DICOM series"
    parser.add_argument("--format", type=Literal["scan", *EXTENSIONS], default="scan", help=formats)
    probabilities = "also write probabilities/<case>.* (float32; a value per class for several classes)"
    parser.add_argument("--probabilities", action="store_true", help=probabilities)
    parser.add_argument("--continue", action="store_true", help="keep the masks that an interrupted command wrote")
    parser.add_argument("--overwrite", action="store_true", help="replace existing masks")
    add_devices_option(parser)
    add_processes_options(parser)
    options = parse_arguments(parser, arguments)
    more = () if options.overwrite or options["continue"] else ("--continue",)
    command = shlex.join(["python", "-m", "jaxla.predict", *arguments, *more])
    with join_processes(options.coordinator, options.processes, options.process, options.wait):
        predict(options, command)


def predict(options: Namespace, resume_command: str) -> None:
    """Segment the scans; each process segments its share of them."""
    names = ("run", "input", "data.image", "output", "format", "probabilities", "devices", "continue", "overwrite")
    require_same({f"--{name}": str(options[name]) for name in names}, "Start all processes with the same options.")
    source, target, folder = Path(options.input), Path(options.output), Path(options.run)
    outputs = name_outputs(find_images(source, options.data.image), source, target, options)
    table = name_table(target)
    require_separate_folder(target, source)
    require_writable("--output", outputs[0].mask.parent)
    require_free(outputs, target, options)

    record = read_record(folder)
    task = restore_task(record.experiment, record.labels.outputs, record.extent, folder)
    columns = check_scans(local_items(outputs), task, record, options.run)
    sizes = {str(output.scan): f"{output.scan.stat().st_size} bytes" for output in outputs}
    # This is also a barrier: no process writes while another one still checks its scans.
    require_same(sizes, "Pass the same scans to all processes.")
    with suppress(InputError):  # without a home folder nothing is kept
        keep_compiled_programs(default_cache_dir())
    with use_devices(options.devices), use_local_devices():
        run = load_run(folder)
        if not is_finished(folder):
            training = record.experiment.method.training
            log_progress(
                f"{options.run}: this run of at most {record.fitted_epochs or training.epochs} epochs is not finished; "
                f"using its {training.checkpoint} epoch so far, {run.epoch}"
            )
        origin = Origin(options.run, run_id(record), run.epoch)
        found = set(find_kept({o.case: o.mask for o in outputs}, table, origin)) if options["continue"] else set()
        kept_cases = {o.case for o in outputs if o.case in found and all(path.exists() for path in o.files)}
        rows = describe_kept(local_items([o for o in outputs if o.case in kept_cases]), record)
        barrier()  # no process writes while another one still reads which masks exist
        cases = [output.case for output in outputs]
        with mark_unfinished(table, origin, cases, options.overwrite), explain_stop(resume_command):
            if options["continue"] and is_first():
                remove_leftovers(outputs)
            rows |= segment_scans(run, [o for o in outputs if o.case not in kept_cases])
            write_table(table, outputs, columns, rows, origin)


def require_free(outputs: Sequence[Output], target: Path, options: Namespace) -> None:
    """Raise an InputError if an output exists, unless an option says what to do with it."""
    if options["continue"] and options.overwrite:
        raise InputError("--continue", "contradicts --overwrite", "Remove one of the two.")
    table = name_table(target)
    recorded = recorded_cases(table)
    for output in outputs:  # it may be the user's own file, which no option may replace
        if output.case not in recorded and (found := [path for path in output.files if path.exists()]):
            problem = f"already exists, and {table.name} does not list it as written by predict"
            raise InputError(found[0], problem, "Use another --output.")
    if not is_mask_file(target):
        require_finished(table, [output.case for output in outputs])
        require_one_format(outputs)
    stale = [path for output in outputs if (path := probabilities_file(output.mask, target)).exists()]
    if options.overwrite and not options.probabilities and stale:
        problem = "would not match the new mask that --overwrite writes"
        raise InputError(stale[0], problem, "Add --probabilities to replace it, or move it away.")
    if options["continue"] or options.overwrite:
        return
    own_table = [table] if is_mask_file(target) else []  # other commands may add to the table of a folder
    for path in (*(path for output in outputs for path in output.files), *own_table):
        if path.exists():
            fix = "Add --continue to keep existing masks, --overwrite to replace them, or use another --output."
            raise InputError(path, "already exists", fix)


def require_one_format(outputs: Sequence[Output]) -> None:
    """Raise an InputError if the folder holds the mask of a case in another format: `evaluate` would find two."""
    for output in outputs:
        for extension in EXTENSIONS.values():
            other = output.mask.with_name(f"{output.case}{extension}")
            if other != output.mask and other.exists():
                problem = f"case {output.case} already has a mask in a different format from {output.mask.name}"
                raise InputError(other, problem, "Use the same --format, or another --output.")


def require_finished(table: Path, cases: Sequence[str]) -> None:
    """Raise an InputError if an interrupted command wrote masks of other cases: it could no longer be continued."""
    unfinished = read_unfinished(table)
    for case in unfinished.cases if unfinished else ():
        masks = [table.parent / f"{case}{extension}" for extension in EXTENSIONS.values()]
        if case not in cases and any(mask.exists() for mask in masks):
            problem = f"the command that wrote the mask of {case} was interrupted"
            fix = "Run it again with --continue first, or use another --output."
            raise InputError(unfinished_file(table), problem, fix)


def check_scans(outputs: Sequence[Output], task: Task, record: Record, run: str) -> dict[str, Row]:
    """Read all scans once, and log those that differ from the training scans or are among them.

    Args:
        outputs: the outputs of this process.

    Returns:
        For the cases of all processes, the columns of `predictions.csv` that depend on the scan alone.

    Raises:
        InputError: a scan cannot be read, or has too few slices.
    """
    known = read_known_scans(Path(run), record.experiment.fold)
    columns = {}
    slice_counts = []
    if not known.training and is_first():
        log_progress(f"{run}: the run did not record its training scans, so scans are not compared with them")
    for output in outputs:
        volume = read_image(output.scan)
        log_warnings(output.scan, volume.warnings)
        slice_counts.append(to_slices(volume.array, slice_geometry(volume.affine)).shape[0])
        task.check_scan(output.scan, slice_counts[-1])
        differences = "; ".join(find_differences(describe_scan(volume), known.training)) if known.training else ""
        if differences:
            log_progress(f"{output.scan}: unlike the training scans, so its mask may be wrong: {differences}")
        part = find_part(known, output.case, hash_voxels(volume.array))
        if part.startswith("training"):
            log_progress(f"{output.scan}: this run used it for {part}")
        spacing = {f"spacing_{axis}_mm": mm for axis, mm in zip("xyz", volume.spacing, strict=True)}
        about = {"part_of_run": part, "unlike_training_scans": differences, "scan": str(output.scan)}
        columns[output.case] = spacing | about
    if slice_counts and (description := task.describe(slice_counts)):
        log_progress(f"{run}: {description}")
    return {case: row for process_columns in gather(columns) for case, row in process_columns.items()}


def describe_kept(outputs: Sequence[Output], record: Record) -> dict[str, list[Row]]:
    """Read masks that an earlier command wrote; return case -> rows of `predictions.csv`, as `describe_mask` does."""
    rows = {}
    for output in outputs:
        mask = read_mask(output.mask)
        scan = read_image(output.scan)
        fix = "Move it away, or use another --output."
        if not same_grid(mask, scan):
            raise InputError(output.mask, f"not on the grid of {output.scan}", fix)
        classes = mask_classes(mask, record.labels)
        rows[output.case] = describe_mask(classes, record.labels.names, scan)
        log_progress(f"{output.mask}: kept; {format_volumes(rows[output.case])}")
    return rows


def segment_scans(run: TrainedRun, outputs: Sequence[Output]) -> dict[str, list[Row]]:
    """Segment this process's share of the scans, and write each mask as soon as it is computed.

    Returns:
        Case -> rows of `predictions.csv`, as `describe_mask` returns them.
    """
    segment = run.segment
    labels = run.record.labels
    rows = {}
    for position, output in local_items(list(enumerate(outputs, start=1))):
        volume = read_image(output.scan)
        log_if_cut(volume, run.task)
        classes, probabilities = segment_volume(segment, volume, output.probabilities is not None)
        if output.probabilities is not None:
            write_volume(output.probabilities, probabilities, volume)
        write_mask(output.mask, classes, labels, volume)  # last: a mask marks its case as complete
        rows[output.case] = describe_mask(classes, labels.names, volume)
        log_progress(f"{position}/{len(outputs)} {output.mask}: {format_volumes(rows[output.case])}")
    return rows


def write_table(
    path: Path,
    outputs: Sequence[Output],
    columns: Mapping[str, Row],
    mask_rows: Mapping[str, Sequence[Row]],
    origin: Origin,
) -> None:
    """Write the rows of all processes into `predictions.csv`, in the order of the outputs."""
    all_rows = {case: rows for process_rows in gather(dict(mask_rows)) for case, rows in process_rows.items()}
    if is_first():
        about = origin._asdict()
        rows = [{"case": o.case} | row | columns[o.case] | about for o in outputs for row in all_rows[o.case]]
        replace_rows(path, columns.keys(), rows)


def format_volumes(rows: Sequence[Row]) -> str:
    """Return the volume of each class: `LA 54.3 ml`."""
    return ", ".join(f"{row['class']} {row['volume_ml']:.1f} ml" for row in rows)


def log_if_cut(volume: Volume, task: Task) -> None:
    """Log if the network sees only the centre of a scan's slices."""
    geometry = slice_geometry(volume.affine)
    shape = to_slices(volume.array, geometry).shape
    spacing = geometry.spacing
    if task.is_cut(shape, spacing):
        height, width = (n * mm for n, mm in zip(shape[1:], spacing[1:], strict=True))
        log_progress(
            f"{volume.path}: slices of {height:.0f} × {width:.0f} mm are larger than the {task.extent:.0f} mm that the "
            "network was trained on; the network sees their centre, and the rest becomes background"
        )


@contextmanager
def explain_stop(resume_command: str) -> Iterator[None]:
    """Print the command that continues after Ctrl-C, SIGTERM or the failure of another process."""
    try:
        with name_resume_command(resume_command, lambda line: None):
            yield
    except KeyboardInterrupt as stop:
        raise Stopped("before the end", resume_command) from stop


def remove_leftovers(outputs: Sequence[Output]) -> None:
    """Remove what a killed command left half-written for these outputs."""
    files = {path for output in outputs for path in output.files}
    for folder in {path.parent for path in files}:
        for path in folder.iterdir() if folder.is_dir() else ():
            if is_leftover(path) and any(path.name.endswith(f".{file.name}") for file in files):
                path.unlink(missing_ok=True)


# --- names of the outputs --------------------------------------------------------------------------------------------


def name_outputs(scans: Mapping[str, Path], source: Path, target: Path, options: Namespace) -> list[Output]:
    """Return the outputs of each scan: `target` itself if it is a mask file, else `<case>.*` in that folder."""
    if is_mask_file(target):
        if source.is_dir() and not is_dicom_series(source):
            raise InputError(f"--output={target}", f"a file, but --input={source} is a folder", "Pass a folder.")
        for scan in scans.values():
            require_mask_file(target, scan, options.format)
        masks = dict.fromkeys(scans, target)
    else:
        masks = {case: target / f"{case}{mask_extension(scan, options.format)}" for case, scan in scans.items()}
    return [
        Output(case, scan, masks[case], probabilities_file(masks[case], target) if options.probabilities else None)
        for case, scan in scans.items()
    ]


def probabilities_file(mask: Path, target: Path) -> Path:
    """Return the file of a mask's probabilities: next to a single mask, else in a folder that `evaluate` ignores."""
    stem, extension = strip_extension(mask.name), probabilities_extension(scan_extension(mask.name))
    if is_mask_file(target):
        return mask.with_name(f"{stem}_probabilities{extension}")
    return mask.parent / "probabilities" / f"{stem}{extension}"


def name_table(target: Path) -> Path:
    """Return the path of the table: `predictions.csv` in a folder of masks, `<mask>_predictions.csv` next to one."""
    if is_mask_file(target):
        return target.with_name(f"{strip_extension(target.name)}_predictions.csv")
    return target / "predictions.csv"


def require_separate_folder(target: Path, source: Path) -> None:
    """Raise an InputError if masks would be among the scans, where they may be mistaken for scans or references."""
    if is_mask_file(target) and not source.is_dir():  # the user gave the file name of the one mask
        return
    folder, scans = (target.parent if is_mask_file(target) else target).resolve(), source.resolve()
    if folder.is_relative_to(scans) if source.is_dir() else folder == scans.parent:
        problem = f"masks would be among the scans of --input={source}"
        raise InputError(f"--output={target}", problem, "Use another folder.")


if __name__ == "__main__":
    run_command(main)
