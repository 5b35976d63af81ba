"""Inventory of a folder of scans: facts about each case, errors that stop training, and warnings for the user.

Every case is read with the readers and checks of training, one at a time; only its facts are kept.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

import nibabel as nib
import numpy as np
from scipy.stats import median_abs_deviation

from jaxla.cli.terminal import plural
from jaxla.config import Data, InputError, option
from jaxla.data.cases import Case, Finding, survey_cases
from jaxla.data.dataset_json import listed_cases
from jaxla.data.labels import Labels, parse_labels, require_one_value
from jaxla.data.patients import describe_shared_patients
from jaxla.data.prepared import describe_duplicate
from jaxla.data.slices import slice_geometry
from jaxla.data.split import Split, make_split
from jaxla.data.volumes import Volume, hash_voxels, read_image, read_mask, require_same_grid

VOLUME_OUTLIER = "volume"  # kind of finding
MAX_OUTLIER_Z = 3.5
MIN_OUTLIER_CASES = 5
# Smallest deviation of log volume to assume. Anatomy varies by more, but a few similar cases may deviate by less, and
# would make any other case an outlier.
MIN_OUTLIER_DEVIATION = 0.1
OUTLIER_RULE = (
    f"modified z-score of log volume beyond ±{MAX_OUTLIER_Z} (median, median absolute deviation of at least "
    f"{100 * MIN_OUTLIER_DEVIATION:.0f} %), with at least {MIN_OUTLIER_CASES} cases"
)
MAX_SPACING_RATIO = 1.5
MAX_OBLIQUE_DEGREES = 15
MAX_MASK_VALUES = 255  # a file with more values is an image, not a mask


@dataclass(frozen=True)
class CaseFacts:
    """The facts of one case, None where a file cannot be read or its mask has values without a class."""

    id: str
    image: Path
    mask: Path
    shape: tuple[int, int, int] | None = None  # X, Y, Z as stored
    spacing: tuple[float, float, float] | None = None  # mm along these axes
    orientation: str | None = None  # the anatomical directions of these axes, such as RAS
    oblique: float | None = None  # largest angle in degrees between an axis and the patient's axis closest to it
    slice_axis: str | None = None  # anatomical name of the axis along which training takes slices
    slices: int | None = None
    slice_spacing: tuple[float, float, float] | None = None  # mm along slices, rows and columns
    image_sha256: str | None = None  # hash of the scan's voxels
    mask_values: tuple[int, ...] | None = None  # the non-zero values of the mask, at most `MAX_MASK_VALUES`
    volumes: dict[str, float] | None = None  # ml of each foreground class


@dataclass(frozen=True)
class Inventory:
    """The contents of a folder of scans."""

    root: Path
    layout: str
    labels: Labels | None  # None if the data set does not define them; a finding says why
    cases: tuple[CaseFacts, ...]  # every image with a mask
    split: Split | None  # the default split; None if there are too few cases
    unread: tuple[Path, ...]  # scans that belong to no case and have no finding, such as unlabelled test images
    findings: tuple[Finding, ...]  # errors first

    @property
    def errors(self) -> list[Finding]:
        """The findings that prevent training."""
        return [finding for finding in self.findings if finding.level == "error"]


def take_inventory(
    root: str | Path,
    labels: str = "",
    track: Callable[[Sequence[Case]], Iterable[Case]] = iter,
    image: str = "",
    mask: str = "",
    patients: str = "",
) -> Inventory:
    """Read every case of a folder, one at a time, and collect facts and findings; write nothing.

    Args:
        labels: mask values of each class, as in `config.Data.labels`; empty takes them from the data set.
        track: wraps the iteration over cases, for a progress bar.
        image, mask, patients: as in `config.Data`.

    Raises:
        InputError: the folder does not exist, its cases cannot be told apart, or `labels` cannot be parsed.
    """
    survey = survey_cases(root, image, mask)
    findings = list(survey.findings)
    classes = parse_labels(labels) if labels else None
    if not labels:
        with _collect_errors(findings, "labels", survey.root / "dataset.json"):
            classes = survey.layout.labels(survey.root)

    cases: list[CaseFacts] = []
    case_by_image: dict[str, str] = {}
    for case in track(survey.cases):
        facts, case_findings = _examine(case, classes)
        findings += case_findings
        if facts.image_sha256 and (first := case_by_image.setdefault(facts.image_sha256, case.id)) != case.id:
            findings.append(Finding("same image", case.image, *describe_duplicate(first), case.id))
        cases.append(facts)

    split = None
    ids = [case.id for case in cases]
    with _collect_errors(findings, "too few cases", survey.root):
        split = make_split(ids, Data(patients=patients))
    if not patients and (shared := describe_shared_patients(ids)):
        findings.append(Finding("patients", survey.root, *shared, level="warning"))
    if classes:
        with _collect_errors(findings, "labels", survey.root):
            require_one_value(classes, survey.root, {c.id: c.mask_values for c in cases if c.volumes is not None})
        findings += [*_missing_classes(survey.root, cases, classes, split), *_volume_outliers(cases, classes)]
    findings += [*_geometry_outliers(cases), *_absent_cases(survey.root, cases, findings)]
    findings.sort(key=lambda finding: finding.level)  # "error" before "warning"; stable within each
    return Inventory(survey.root, survey.layout.name, classes, tuple(cases), split, survey.unused, tuple(findings))


def _examine(case: Case, labels: Labels | None) -> tuple[CaseFacts, list[Finding]]:
    """Read a case and check it as `jaxla.data.prepared` does, but collect all errors."""
    facts = CaseFacts(case.id, case.image, case.mask)
    findings: list[Finding] = []
    image = mask = None
    with _collect_errors(findings, "image", case.image, case.id):
        image = read_image(case.image)
        findings += _header_warnings(image, case.id)
        geometry = slice_geometry(image.affine)
        facts = replace(
            facts,
            shape=image.array.shape,
            spacing=image.spacing,
            orientation="".join(nib.aff2axcodes(image.affine)),
            oblique=float(np.degrees(nib.affines.obliquity(image.affine)).max()),
            slice_axis=geometry.axis,
            slices=image.array.shape[geometry.order[0]],
            slice_spacing=geometry.spacing,
            image_sha256=hash_voxels(image.array),
        )
    with _collect_errors(findings, "mask", case.mask, case.id):
        mask = read_mask(case.mask)
        findings += _header_warnings(mask, case.id)
        values = np.unique(mask.array[mask.array != 0])[:MAX_MASK_VALUES]
        facts = replace(facts, mask_values=tuple(values.tolist()))
    if image is not None and mask is not None:
        with _collect_errors(findings, "grid", case.mask, case.id):
            require_same_grid(mask, image)
    if mask is not None and labels is not None:
        with _collect_errors(findings, "labels", case.mask, case.id):
            classes = labels.to_classes(mask.array, mask.path)
            ml = float(np.prod(mask.spacing)) / 1000
            volumes = {name: np.count_nonzero(classes == i) * ml for i, name in enumerate(labels.names, start=1)}
            facts = replace(facts, volumes=volumes)
    return facts, findings


def _header_warnings(volume: Volume, case: str) -> Iterator[Finding]:
    for warning in volume.warnings:
        yield Finding("header", volume.path, warning, "Correct the header if it is wrong.", case, "warning")


@contextlib.contextmanager
def _collect_errors(findings: list[Finding], kind: str, file: Path, case: str = "") -> Iterator[None]:
    """Turn an InputError within the context into a finding on `file`."""
    try:
        yield
    except InputError as error:
        findings.append(Finding(kind, file, error.problem, error.fix, case))


# --- comparisons of cases --------------------------------------------------------------------------------------------


def _missing_classes(root: Path, cases: list[CaseFacts], labels: Labels, split: Split | None) -> Iterator[Finding]:
    """Find empty masks, masks that lack a class, and classes that no mask or no training mask has."""
    checked = [case for case in cases if case.volumes is not None]
    present = [name for name in labels.names if any(case.volumes[name] for case in checked)]
    for name in labels.names if checked else ():
        with_class = {case.id for case in checked if case.volumes[name]}
        if not with_class:
            fix = f"Check the masks, or list their values in {option('data.labels')}."
            yield Finding("class", root, f"no mask contains {name}", fix)
        elif split and with_class.isdisjoint(split.train):
            examples = ", ".join(sorted(with_class)[:3])
            problem = f"no training case of the default split contains {name}, only {examples}"
            fix = f"Use another {option('data.split_seed')}, or your own {option('data.split')}."
            yield Finding("class", root, problem, fix, level="warning")
    for case in checked:
        missing = [name for name in present if not case.volumes[name]]
        if missing == present != []:
            fix = "Leave the case out if the mask is incomplete; training keeps it, as all background."
            yield Finding("empty mask", case.mask, "the mask is empty", fix, case.id, "warning")
        elif missing:
            problem = f"the mask contains no {', no '.join(missing)}"
            fix = "Complete the mask if this is a mistake."
            yield Finding("lacks a class", case.mask, problem, fix, case.id, "warning")


def _volume_outliers(cases: list[CaseFacts], labels: Labels) -> Iterator[Finding]:
    masks = {case.id: case.mask for case in cases}
    for name in labels.names:
        volumes = {case.id: case.volumes[name] for case in cases if case.volumes and case.volumes[name]}
        for case_id, z in find_volume_outliers(volumes).items():
            median = np.median(list(volumes.values()))
            problem = f"{name} has {volumes[case_id]:.3g} ml, the median is {median:.3g} ml (z {z:+.1f})"
            fix = "Check the mask, and the spacing in the header."
            yield Finding(VOLUME_OUTLIER, masks[case_id], problem, fix, case_id, "warning")


def find_volume_outliers(volumes: Mapping[str, float]) -> dict[str, float]:
    """Return case id -> modified z-score of the volumes, in ml and above 0, that are outliers by `OUTLIER_RULE`.

    On a logarithmic scale, a tenth of the median is as far from it as ten times the median.
    """
    if len(volumes) < MIN_OUTLIER_CASES:
        return {}
    logs = np.log(list(volumes.values()))
    deviation = max(float(median_abs_deviation(logs, scale="normal")), MIN_OUTLIER_DEVIATION)
    scores = (logs - np.median(logs)) / deviation
    return {case: float(z) for case, z in zip(volumes, scores, strict=True) if abs(z) > MAX_OUTLIER_Z}


def _geometry_outliers(cases: list[CaseFacts]) -> Iterator[Finding]:
    """Find cases with an unusual slice axis or spacing, and oblique ones."""
    read = [case for case in cases if case.slice_axis]
    if not read:
        return
    usual_axis, count = Counter(case.slice_axis for case in read).most_common(1)[0]
    same_axis = [case for case in read if case.slice_axis == usual_axis]
    median = tuple(median_low(case.slice_spacing[i] for case in same_axis) for i in range(3))
    for case in read:
        spacing = case.slice_spacing
        if case.slice_axis != usual_axis:
            here, elsewhere = f"(every {spacing[0]:.3g} mm)", f"{usual_axis} (every {median[0]:.3g} mm)"
            problem = f"slices lie along {case.slice_axis} {here}, in {count} other cases along {elsewhere}"
            fix = "Check the spacing in its header; if it is right, resample the scan or leave it out."
            yield Finding("slice axis", case.image, problem, fix, case.id, "warning")
        elif max(max(a / b, b / a) for a, b in zip(spacing, median, strict=True)) >= MAX_SPACING_RATIO:
            sides, median_sides = format_sides(spacing), format_sides(median)
            problem = f"slices, rows and columns are {sides} mm apart, the median is {median_sides} mm"
            fix = "Check the spacing in its header; if it is right, keep the scan."
            yield Finding("spacing", case.image, problem, fix, case.id, "warning")
        if case.oblique > MAX_OBLIQUE_DEGREES:
            problem = f"its axes are rotated {case.oblique:.0f}° from the patient's"
            fix = "Resample the scan unless all scans are rotated alike: slices follow the file's axes."
            yield Finding("oblique", case.image, problem, fix, case.id, "warning")


def format_sides(values: Iterable[float]) -> str:
    """Return shape or spacing as text: `0.625×0.625×2.5`."""
    return "×".join(f"{value:.3g}" for value in values)


def _absent_cases(root: Path, cases: list[CaseFacts], findings: list[Finding]) -> Iterator[Finding]:
    """Warn if dataset.json lists more cases than the folder holds, as after an interrupted download."""
    listed, count = listed_cases(root)
    found = {case.id for case in cases} | {finding.case for finding in findings}
    absent = [name for name in listed if name not in found]
    if absent or (not listed and count > len(found - {""})):
        missing = f" and {plural(len(absent) - 1, 'other')} are missing" if len(absent) > 1 else " is missing"
        detail = f"{absent[0]}{missing}" if absent else f"the folder holds {len(cases)}"
        problem = f"lists {count} training cases, but {detail}"
        fix = "Complete the download, unless cases were left out on purpose."
        yield Finding("missing cases", root / "dataset.json", problem, fix, level="warning")
