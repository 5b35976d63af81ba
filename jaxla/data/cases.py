"""Folders of scans -> cases, and a reason for every scan that is not used."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import plural
from jaxla.config import InputError, option
from jaxla.data.formats import FORMATS, is_dicom_series, scan_extension
from jaxla.data.labels import Labels, parse_labels
from jaxla.data.layouts import (
    LAYOUTS,
    RECOGNISED_LAYOUTS,
    Layout,
    ScanPaths,
    folder_name,
    images_and_masks,
    make_pattern_layout,
)
from jaxla.data.scan_files import (
    MAKE_READABLE,
    Case,
    Finding,
    FolderScans,
    how_to_match_files,
    images_by_case,
    index_by_name,
    is_dangling,
    list_scans,
    pair,
    top_level_scans,
)

log = logging.getLogger(__name__)

MAX_NAMED = 3  # number of files that a log line lists


@dataclass(frozen=True)
class Dataset:
    """The labelled cases of one folder."""

    root: Path
    layout: str
    cases: tuple[Case, ...]
    labels: Labels


@dataclass(frozen=True)
class Survey:
    """The contents of a folder, including faulty ones."""

    root: Path
    layout: Layout  # the first of `LAYOUTS` that finds something, or the layout of the given patterns
    cases: tuple[Case, ...]  # the images with a mask
    findings: tuple[Finding, ...]  # errors on files that belong to no case
    unused: tuple[Path, ...]  # scans that belong to no case and have no finding, including those in unsupported formats


def find_cases(root: str | Path, labels: str = "", image: str = "", mask: str = "") -> Dataset:
    """Find the labelled cases of a folder in any layout.

    Args:
        labels: mask values of each class, as in `config.Data.labels`; empty takes them from the data set.
        image, mask: patterns of the files, as in `config.Data`; empty recognises the layout.

    Raises:
        InputError: the folder is missing or holds no case, a label cannot be used, or an image or mask has no partner.
    """
    survey = survey_cases(root, image, mask)
    _raise_first(survey.findings)
    chosen = parse_labels(labels) if labels else survey.layout.labels(survey.root)
    count = plural(len(survey.cases), "case")
    log.info("%s: %s (%s); classes %s", survey.root, count, survey.layout.name, chosen.describe())
    if survey.unused:
        names = list_names(survey.unused, survey.root)
        log.warning("%s: scans that belong to no case are not used (%d): %s", survey.root, len(survey.unused), names)
    return Dataset(survey.root, survey.layout.name, survey.cases, chosen)


def survey_cases(root: str | Path, image: str = "", mask: str = "") -> Survey:
    """Find the cases of a folder, all files without a partner, duplicate files of a case, and all other scans.

    Raises:
        InputError: the folder does not exist, has no known layout, or its cases cannot be told apart.
    """
    root = Path(root)
    with report_os_errors("read", option("data.root", root), MAKE_READABLE):
        if not root.is_dir():
            problem = "is a file, not a folder" if root.exists() else "no such folder"
            raise InputError(option("data.root", root), problem, how_to_get_data())
    content = list_scans(root)
    for layout in (make_pattern_layout(image, mask),) if image or mask else LAYOUTS:
        findings: list[Finding] = []
        paths = layout.find(root, content.scans, findings, True)
        findings += _dangling_links(paths)
        cases = pair(*paths, findings)
        if cases or findings:
            known = {file for files in paths for file in files.values()} | {finding.file for finding in findings}
            unused = sorted({*content.scans, *content.unreadable} - known)
            return Survey(root, layout, tuple(cases), tuple(findings), tuple(unused))
    raise _no_case(root, content, is_pattern=bool(image or mask))


def find_images(root: str | Path, image: str = "") -> dict[str, Path]:
    """Return case id -> image to predict: one file, one DICOM series, or the images of a folder in any layout.

    Args:
        image: pattern of the images in the folder, as in `config.Data`; empty recognises the layout.

    Raises:
        InputError: no image was found.
    """
    root = Path(root)
    where = option("input", root)
    fix = f"Pass a scan, or a folder of scans. Formats: {FORMATS}."
    with report_os_errors("read", where, MAKE_READABLE):
        if root.is_file():
            return images_by_case([root], (), [])
        if not root.is_dir():
            raise InputError(where, "no such file or folder", fix)
    if is_dicom_series(root):
        if others := list_scans(root).scans:
            names = list_names(others, root)
            log.warning("%s: read as one DICOM series; other scans are not read (%d): %s", root, len(others), names)
        return {folder_name(root): root}
    content = list_scans(root)
    for layout in (make_pattern_layout(image, ""),) if image else LAYOUTS:
        findings: list[Finding] = []
        images, masks = layout.find(root, content.scans, findings, False)
        findings += _dangling_links(ScanPaths(images, {}))
        _raise_first(findings)
        if images:
            _log_images(root, layout, images, masks, content)
            return images
    raise InputError(where, f"no image to segment; {_describe(content, root)}", fix)


def _log_images(
    root: Path, layout: Layout, images: dict[str, Path], masks: dict[str, Path], content: FolderScans
) -> None:
    """Log where images are read from, and what else the folder holds."""
    if masks:
        log.info("%s: masks are skipped (%d): %s", root, len(masks), list_names(masks.values(), root))
    unused = sorted({*content.scans, *content.unreadable} - {*images.values(), *masks.values()})
    if not unused:
        return
    folders = list_names({path.parent for path in images.values()}, root)
    other = next((path.parent for path in unused if path.parent.name == "imagesTs"), unused[0].parent)
    log.warning(
        "%s: %s read from %s (%s); other scans are not read (%d): %s. To read a folder of them, use %s.",
        root, plural(len(images), "image"), folders, layout.name, len(unused), list_names(unused, root),
        option("input", other),
    )  # fmt: skip


def find_masks(folder: Path, option_name: str) -> dict[str, Path]:
    """Return the masks directly in a folder, by name without extension.

    Raises:
        InputError: the folder is missing, or two files have the same name. The error names the option `option_name`.
    """
    where = option(option_name, folder)
    findings = []
    with report_os_errors("read", where, MAKE_READABLE):
        if not folder.is_dir():
            raise InputError(where, "no such folder", "Pass a folder of masks.")
        masks = index_by_name(top_level_scans(folder), findings)
    _raise_first(findings)
    return masks


def masks_by_image(masks: dict[str, Path]) -> dict[str, Path]:
    """Return image name -> mask if all names end in one of `MASK_SUFFIXES`, otherwise an empty dict.

    Raises:
        InputError: two masks belong to the same image.
    """
    findings: list[Finding] = []
    images, by_image = images_and_masks(masks.values(), findings)
    _raise_first(findings)
    return {} if images else by_image


def how_to_get_data() -> str:
    """Return a sentence for errors about missing data."""
    phantoms = option("data.root", "phantom")
    return f"Register for LAScarQS 2022 at zmiclab.github.io/projects/lascarqs22, or use {phantoms}."


def list_names(paths: Iterable[Path], root: Path) -> str:
    """Return the first few paths, relative to `root`, and how many more there are."""
    names = [str(path.relative_to(root)) for path in sorted(paths)]
    more = f", … {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _no_case(root: Path, content: FolderScans, is_pattern: bool) -> InputError:
    """Return the error for a folder without cases, which says what the folder holds and which options to set."""
    found = _describe(content, root)
    if is_pattern:
        fix = f"Correct the patterns, which are relative to {option('data.root')}."
        return InputError(root, f"no scan matches {option('data.image')} or {option('data.mask')}; {found}", fix)
    if not content.scans:
        problem = f"no case found; {found}; recognised layouts: {RECOGNISED_LAYOUTS}"
        return InputError(root, problem, f"Formats: {FORMATS}. {how_to_get_data()}")
    by_file_name: dict[str, list[Path]] = {}
    for path in content.scans:
        by_file_name.setdefault(path.name, []).append(path)
    common = sorted(by_file_name.values(), key=len, reverse=True)[:2]
    common.sort(key=lambda paths: (paths[0].is_file(), -paths[0].lstat().st_size))  # images are larger than masks
    patterns = [_pattern([path.relative_to(root) for path in paths]) for paths in common]
    examples = [f"{option(f'data.{name}')}='{p}'" for name, p in zip(("image", "mask"), patterns * 2, strict=False)]
    fix = f"{how_to_match_files()} For example: {' '.join(examples)}, where * is the name of the case."
    return InputError(root, f"no case found; {found}; recognised layouts: {RECOGNISED_LAYOUTS}", fix)


def _pattern(paths: Sequence[Path]) -> str:
    """Return a pattern for files with the same name: a `*` for each folder in which they differ."""
    if len({len(path.parts) for path in paths}) > 1:
        return f"**/*/{paths[0].name}"
    return "/".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*(p.parts for p in paths), strict=True))


def _describe(content: FolderScans, root: Path) -> str:
    """Return what a folder holds in words: `the folder holds 12 .nrrd files in 6 folders`."""
    kinds: dict[str, list[Path]] = {}
    for path in (*content.scans, *content.unreadable):
        extension = scan_extension(path.name).lower() or "".join(path.suffixes[-1:])
        kind = "DICOM series" if path.is_dir() else "broken link" if is_dangling(path) else f"{extension} file"
        kinds.setdefault(kind, []).append(path)
    if not kinds:
        return "the folder holds no scan"
    counts = (f"{len(p)} {kind if kind.endswith('s') else kind + 's' * (len(p) > 1)}" for kind, p in kinds.items())
    folders = {path.parent for paths in kinds.values() for path in paths}
    return f"the folder holds {', '.join(counts)} in {plural(len(folders), 'folder')}"


def _dangling_links(paths: ScanPaths) -> list[Finding]:
    """Return a finding for each link to a file that does not exist."""
    findings = []
    for files in paths:
        for name, path in files.items():
            if is_dangling(path):
                problem = f"a link to {os.readlink(path)}, which does not exist"
                findings.append(Finding("broken link", path, problem, "Restore that file, or remove the link.", name))
    return findings


def _raise_first(findings: Sequence[Finding]) -> None:
    """Raise the first finding, if any, as an InputError that counts further files without a partner."""
    if not findings:
        return
    first = findings[0]
    problem, role = first.problem, {"no mask": "image", "no image": "mask"}.get(first.kind)
    if role and (others := sum(finding.kind == first.kind for finding in findings[1:])):
        problem = f"this {role} and {plural(others, 'other')} have {first.kind}"
    raise InputError(first.file, problem, first.fix)
