"""What is in a folder of scans, and what in it training would refuse or a person should look at.

Every case is read with the readers and checks of training, one at a time; of each only its facts are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

import nibabel as nib
import numpy as np
from scipy.stats import median_abs_deviation

from jaxla.config import Data, InputError
from jaxla.data.cases import Case, Finding, find_labels, survey_cases
from jaxla.data.labels import Labels, require_one_value
from jaxla.data.split import Split, make_split
from jaxla.data.volumes import Volume, read_image, read_mask, require_same_grid, slice_geometry, voxels_sha256

OUTLIER_Z = 3.5
OUTLIER_CASES = 5
OUTLIER_SPREAD = 0.1  # anatomy varies by more, so that few cases that happen to be alike make no outlier of the next
OUTLIER_RULE = (
    f"modified z-score of log volume beyond ±{OUTLIER_Z} (median, median absolute deviation of at least "
    f"{100 * OUTLIER_SPREAD:.0f} %), from {OUTLIER_CASES} cases on"
)
SPACING_FACTOR = 1.5
OBLIQUE_DEGREES = 15
VALUES_KEPT = 255  # label values of one mask; one with more is an image


@dataclass(frozen=True)
class CaseFacts:
    """One case as found; None where a file could not be read, or its mask's values are no classes.

    Attributes:
        shape: X, Y, Z as stored.
        spacing: mm along these axes.
        orientation: where these axes point to, such as RAS.
        oblique: degrees by which the axis that is turned most deviates from the patient's.
        slice_axis: anatomical name of the axis along which training takes slices.
        slices: number of them.
        slice_spacing: mm along slices, rows and columns.
        image_sha256: of the scan's voxels.
        mask_values: the values of the mask besides 0, at most `VALUES_KEPT`.
        volumes: ml of each foreground class.
    """

    id: str
    image: Path
    mask: Path
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    oblique: float | None = None
    slice_axis: str | None = None
    slices: int | None = None
    slice_spacing: tuple[float, float, float] | None = None
    image_sha256: str | None = None
    mask_values: tuple[int, ...] | None = None
    volumes: dict[str, float] | None = None


@dataclass(frozen=True)
class Inventory:
    """What lies in a folder.

    Attributes:
        layout: as `jaxla.data.cases.Survey` names it.
        labels: None where the data set does not say them; a finding tells why.
        cases: every image with a mask.
        split: the one that training draws by default; None where there are too few cases.
        unread: NIfTI files that belong to no case and that no finding names, such as unlabelled test images.
        findings: errors first.
    """

    root: Path
    layout: str
    labels: Labels | None
    cases: tuple[CaseFacts, ...]
    split: Split | None
    unread: tuple[Path, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        """What keeps training from starting."""
        return [finding for finding in self.findings if finding.level == "error"]


def take_inventory(
    root: str | Path, labels: str = "", track: Callable[[Sequence[Case]], Iterable[Case]] = iter
) -> Inventory:
    """Read every case of a folder and tell what training would refuse and what a person should look at.

    Memory holds one case at a time; nothing is written.

    Args:
        labels: which mask values are which class, as in `config.Data.labels`; empty takes them from the data set.
        track: wraps the iteration over cases, for a progress bar.

    Raises:
        InputError: no folder, no case that could be told from others, or `labels` is not of its form.
    """
    survey = survey_cases(root)
    findings = list(survey.findings)
    classes = None
    if labels:
        classes = find_labels(survey, labels)
    else:
        mend = "mend it, or choose classes with --data.labels"
        with _noting(findings, "labels", survey.root / "dataset.json", mend=mend):
            classes = find_labels(survey)

    cases: list[CaseFacts] = []
    case_of_image: dict[str, str] = {}
    for case in track(survey.cases):
        facts, of_case = _examine(case, classes)
        findings += of_case
        if facts.image_sha256 and (twin := case_of_image.setdefault(facts.image_sha256, case.id)) != case.id:
            mend = "remove one, a patient must not cross splits"
            findings.append(Finding("same image", case.image, f"the same image as case {twin}", mend, case.id))
        cases.append(facts)

    split = None
    with _noting(findings, "too few cases", survey.root):
        split = make_split([case.id for case in cases], Data())
    if classes:
        with _noting(findings, "labels", survey.root):
            require_one_value(classes, survey.root, {c.id: c.mask_values for c in cases if c.volumes is not None})
        findings += [*_missing_classes(survey.root, cases, classes, split), *_volume_outliers(cases, classes)]
    findings += [*_geometry_outliers(cases), *_not_here(survey.root, cases, findings)]
    findings.sort(key=lambda finding: finding.level)  # "error" before "warning", else as found
    return Inventory(
        root=survey.root,
        layout=survey.layout.name,
        labels=classes,
        cases=tuple(cases),
        split=split,
        unread=tuple(_unread(survey.root, cases, findings)),
        findings=tuple(findings),
    )


def _examine(case: Case, labels: Labels | None) -> tuple[CaseFacts, list[Finding]]:
    """Read a case and check it as `jaxla.data.prepared` does, but go on after what is wrong."""
    facts = CaseFacts(case.id, case.image, case.mask)
    findings: list[Finding] = []
    image: Volume | None = None
    mask: Volume | None = None
    with _noting(findings, "image", case.image, case.id):
        image = read_image(case.image)
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
            image_sha256=voxels_sha256(image.array),
        )
    with _noting(findings, "mask", case.mask, case.id):
        mask = read_mask(case.mask)
        found = np.unique(mask.array[mask.array != 0])[:VALUES_KEPT]
        facts = replace(facts, mask_values=tuple(found.tolist()))
    if image is not None and mask is not None:
        with _noting(findings, "grid", case.mask, case.id):
            require_same_grid(mask, image)
    if mask is not None and labels is not None:
        with _noting(findings, "labels", case.mask, case.id):
            classes = labels.to_classes(mask.array, mask.path)
            ml = float(np.prod(mask.spacing)) / 1000
            volumes = {name: np.count_nonzero(classes == i) * ml for i, name in enumerate(labels.names, start=1)}
            facts = replace(facts, volumes=volumes)
    return facts, findings


@contextlib.contextmanager
def _noting(
    findings: list[Finding], kind: str, file: Path, case: str = "", mend: str = "replace the file or leave the case out"
) -> Iterator[None]:
    """Take an InputError on `file` down as a finding, with `mend` where the error does not say how, and go on."""
    try:
        yield
    except InputError as error:
        message = str(error).removeprefix(f"{file}: ").removeprefix("--data.root ")
        what, _, said = message.rpartition("; ")  # an InputError reads "<file>: <what>; <how to mend it>"
        findings.append(Finding(kind, file, what or said, said if what else mend, case))


# --- what a person should look at ------------------------------------------------------------------------------------


def _missing_classes(root: Path, cases: list[CaseFacts], labels: Labels, split: Split | None) -> Iterator[Finding]:
    """Empty masks, masks that lack a class, and classes that no mask or no training mask has."""
    judged = [case for case in cases if case.volumes is not None]
    present = [name for name in labels.names if any(case.volumes[name] for case in judged)]
    for name in labels.names if judged else ():
        having = {case.id for case in judged if case.volumes[name]}
        if not having:
            what = f"no mask holds any {name}"
            yield Finding("class", root, what, "check the masks, or name their values with --data.labels")
        elif split and having.isdisjoint(split.train):
            what = f"no training patient of the default split has any {name}, only {', '.join(sorted(having)[:3])}"
            mend = "choose another with --data.split_seed, or give your own with --data.split"
            yield Finding("class", root, what, mend, level="warning")
    for case in judged:
        missing = [name for name in present if not case.volumes[name]]
        if missing == present != []:
            mend = "leave the case out unless that is so; training keeps it, as all background"
            yield Finding("empty mask", case.mask, "the mask is empty", mend, case.id, "warning")
        elif missing:
            what = f"the mask holds no {', no '.join(missing)}"
            yield Finding("lacks a class", case.mask, what, "complete it unless that is so", case.id, "warning")


def _volume_outliers(cases: list[CaseFacts], labels: Labels) -> Iterator[Finding]:
    for name in labels.names:
        volumes = {case.id: case.volumes[name] for case in cases if case.volumes and case.volumes[name]}
        outliers = outlying_volumes(volumes)
        for case in cases:
            if case.id in outliers:
                what = (
                    f"{name} of {volumes[case.id]:.3g} ml, where the median is {np.median(list(volumes.values())):.3g} "
                    f"ml (z {outliers[case.id]:+.1f})"
                )
                mend = "look at the mask and at the spacing in the header"
                yield Finding("volume", case.mask, what, mend, case.id, "warning")


def outlying_volumes(volumes: Mapping[str, float]) -> dict[str, float]:
    """The volumes that stand apart, by `OUTLIER_RULE`; logarithms, so that a tenth stands apart as ten times does.

    Args:
        volumes: case id -> ml, all above 0.

    Returns:
        Case id -> modified z-score.
    """
    if len(volumes) < OUTLIER_CASES:
        return {}
    logs = np.log(list(volumes.values()))
    spread = max(float(median_abs_deviation(logs, scale="normal")), OUTLIER_SPREAD)
    scores = (logs - np.median(logs)) / spread
    return {case: float(z) for case, z in zip(volumes, scores, strict=True) if abs(z) > OUTLIER_Z}


def _geometry_outliers(cases: list[CaseFacts]) -> Iterator[Finding]:
    """Cases cut along another axis than most, of very different spacing, or oblique."""
    read = [case for case in cases if case.slice_axis]
    if not read:
        return
    usual_axis, count = Counter(case.slice_axis for case in read).most_common(1)[0]
    alike = [case for case in read if case.slice_axis == usual_axis]
    usual = tuple(median_low(case.slice_spacing[i] for case in alike) for i in range(3))
    for case in read:
        spacing = case.slice_spacing
        if case.slice_axis != usual_axis:
            what = (
                f"slices would be taken along {case.slice_axis} (every {spacing[0]:.3g} mm), in {count} other cases "
                f"along {usual_axis} (every {usual[0]:.3g} mm)"
            )
            mend = "check the spacing in its header; if it is right, resample it with those slices or leave it out"
            yield Finding("slice axis", case.image, what, mend, case.id, "warning")
        elif max(max(a / b, b / a) for a, b in zip(spacing, usual, strict=True)) >= SPACING_FACTOR:
            what = f"spacing of slices, rows, columns {times(spacing)} mm, where the median is {times(usual)} mm"
            mend = "check the spacing in its header; if it is right, this is no fault"
            yield Finding("spacing", case.image, what, mend, case.id, "warning")
        if case.oblique > OBLIQUE_DEGREES:
            what = f"its axes are turned {case.oblique:.0f}° from the patient's"
            mend = "nothing if all scans are planned alike, for slices follow the file's axes; else resample it"
            yield Finding("oblique", case.image, what, mend, case.id, "warning")


def times(values: Iterable[float]) -> str:
    """`0.625×0.625×2.5`."""
    return "×".join(f"{value:.3g}" for value in values)


def _not_here(root: Path, cases: list[CaseFacts], findings: list[Finding]) -> Iterator[Finding]:
    """Whether a dataset.json speaks of more cases than are there, as after half a download."""
    try:
        described = json.loads((root / "dataset.json").read_text())
        listed = [re.sub(r"(\.nii)?(\.gz)?$", "", Path(entry["image"]).name) for entry in described.get("training", [])]
        count = len(listed) or int(described.get("numTraining", 0))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return  # training reads nothing of it but the labels
    here = {case.id for case in cases} | {finding.case for finding in findings}
    absent = [name for name in listed if name not in here]
    if absent or (not listed and count > len(here - {""})):
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        which = f"{absent[0]} is not here{more}" if absent else f"{len(cases)} are here"
        what = f"tells of {count} training cases; {which}"
        mend = "complete the download, unless cases were left out on purpose"
        yield Finding("not here", root / "dataset.json", what, mend, level="warning")


def _unread(root: Path, cases: list[CaseFacts], findings: list[Finding]) -> Iterator[Path]:
    known = {path.resolve() for case in cases for path in (case.image, case.mask)}
    known |= {finding.file.resolve() for finding in findings}
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith((".nii", ".nii.gz")) and not name.startswith(".") and path.resolve() not in known:
                yield path
