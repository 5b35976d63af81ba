"""From a study's folder to its report: reads the results, and the scans that Figure 3 shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxla.config import Experiment, InputError, lookup, with_method
from jaxla.data.cases import Case, find_cases
from jaxla.data.dataset import resolve_data_root
from jaxla.data.labels import Labels
from jaxla.data.prepared import content_key
from jaxla.data.volumes import read_image, read_mask, slice_geometry, to_slices
from jaxla.evaluation.summary import worst_median_best
from jaxla.experiments import EXPERIMENTS, METHODS, PUBLISHED
from jaxla.reporting.overlays import Panel
from jaxla.runs.record import differences, shown
from jaxla.studies.page import write_study_report
from jaxla.studies.results import Results, StudyRun, read_study
from jaxla.studies.tables import largest_protocol


def report_study(folder: Path, cache_dir: Path, data_root: str = "", cases: Sequence[str] = ()) -> Path:
    """Write the report of a study whose runs are complete; -> the path of its page.

    Args:
        data_root: where the scans lie, if not where they were.
        cases: to show in Figure 3; by default the worst, the median and the best.

    Raises:
        InputError: the study is incomplete, its scans are gone, or the report cannot be written.
    """
    results = read_study(folder)
    largest = largest_protocol(results)
    runs = [results.of(largest, method)[0] for method in results.methods]
    record = runs[0].record
    root = resolve_data_root(record.experiment.data, cache_dir, data_root)
    by_id = {case.id: case for case in find_cases(root, record.experiment.data.all_labels).cases}
    panels = {}
    for name, case_id in choose_cases(results, cases).items():
        if case_id not in by_id:
            raise InputError(f"{root}: case {case_id} of the study is not there; give its folder as --data.root")
        if content_key(by_id[case_id], record.labels) != runs[0].cases[case_id]:
            raise InputError(
                f"{root}: case {case_id} is another scan or mask than the one that the study was run on; give the "
                "folder of those as --data.root"
            )
        panels[name] = panels_of(runs, by_id[case_id], record.labels)
    try:
        changed = {run.method: options for run in runs if (options := changed_options(run.record.experiment))}
        return write_study_report(folder, results, PUBLISHED, panels, list(METHODS), list(EXPERIMENTS), changed)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); mend that and write the report again"
        ) from error


def changed_options(experiment: Experiment) -> str:
    """The options in which a run's method is not as it stands in the table of methods, as a command line has them.

    Raises:
        InputError: there is no such method, as in a study of another version.
    """
    own = with_method(experiment, lookup("method", experiment.method, METHODS))
    return " ".join(f"--{option}={shown(now)}" for option, now, _ in differences(experiment, own))


def choose_cases(results: Results, asked: Sequence[str]) -> dict[str, str]:
    """What each case is to be called -> its id: those asked for, or the worst, median and best over all methods."""
    largest = largest_protocol(results)
    of_methods = [results.volumes(largest, method, "dice") for method in results.methods]
    dice = {case: sum(values[case] for values in of_methods) for case in of_methods[0]}
    for case in asked:
        if case not in dice:
            raise InputError(f"option --cases: {case} is no test case of this study; these are: {', '.join(dice)}")
    if asked:
        return {case: case for case in asked}
    return {f"{rank}: {case}": case for case, rank in worst_median_best(dice).items()}


def panels_of(runs: Sequence[StudyRun], case: Case, labels: Labels) -> list[Panel]:
    """A case as each run segmented it; image and reference are held once."""
    image, mask = read_image(case.image), read_mask(case.mask)
    geometry = slice_geometry(image.affine)
    slices, reference = (to_slices(a, geometry) for a in (image.array, labels.to_classes(mask.array, case.mask)))
    panels = []
    for run in runs:
        path = run.prediction_folder / f"{case.id}.nii.gz"
        prediction = to_slices(labels.to_classes(read_mask(path).array, path), geometry)
        if prediction.shape != reference.shape:
            raise InputError(f"{path}: has {prediction.shape} voxels, and its scan {reference.shape}; run it again")
        title = f"Dice {run.volumes('dice')[case.id]:.3f}"
        panels.append(Panel(title, slices, prediction, reference, geometry.spacing))
    return panels
