"""Folders of scans -> cases. `LAYOUTS`, at the end of this file, lists the layouts that are recognised."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxla.cli.terminal import plural
from jaxla.config import InputError, option
from jaxla.data.labels import Labels, make_labels, parse_labels

log = logging.getLogger(__name__)

MASK_SUFFIXES = ("_mask", "_seg", "_label", "_labels", "_gt")
IMAGE_FOLDERS = ("images", "imagesTr", "image")
MASK_FOLDERS = ("labels", "labelsTr", "masks", "label", "mask")
LASCARQS_IMAGE, LASCARQS_MASK = "enhanced.nii.gz", "atriumSegImgMO.nii.gz"


@dataclass(frozen=True)
class Case:
    """One patient scan and its mask."""

    id: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Dataset:
    """The labelled cases of one folder."""

    root: Path
    layout: str
    cases: tuple[Case, ...]
    labels: Labels


@dataclass(frozen=True)
class Finding:
    """Something unusual or wrong in a folder of scans; `problem` and `fix` as in `InputError`."""

    kind: str  # what was checked, in one or two words
    file: Path  # the file at fault, or the folder if several are
    problem: str
    fix: str
    case: str = ""  # id of the case, if there is one
    level: Literal["error", "warning"] = "error"  # an error stops training; a warning asks for a look


class Layout(NamedTuple):
    """One way to lay out a data set in a folder.

    `find_cases` and `find_images` add files without a partner, or two files for one case, to the findings. They return
    and add nothing if the folder has another layout.
    """

    name: str
    description: str  # which files it consists of, for messages
    find_cases: Callable[[Path, list[Finding]], list[Case]]  # the images with a mask
    find_images: Callable[[Path, list[Finding]], dict[str, Path]]  # case id -> scan, for prediction
    labels: Callable[[Path], Labels]  # the mask values of each class, for users who do not name them


@dataclass(frozen=True)
class Survey:
    """The contents of a folder, including faulty ones."""

    root: Path
    layout: Layout  # the first of `LAYOUTS` that finds something
    cases: tuple[Case, ...]  # the images with a mask
    findings: tuple[Finding, ...]  # errors on files that belong to no case


def find_cases(root: str | Path, labels: str = "") -> Dataset:
    """Find the labelled cases of a folder in any layout.

    Args:
        labels: mask values of each class, as in `config.Data.labels`; empty takes them from the data set.

    Raises:
        InputError: the folder is missing or holds no case, a label cannot be used, or an image or mask has no partner.
    """
    survey = survey_cases(root)
    _raise_first(survey.findings)
    chosen = parse_labels(labels) if labels else survey.layout.labels(survey.root)
    count = plural(len(survey.cases), "case")
    log.info("%s: %s (%s); classes %s", survey.root, count, survey.layout.name, chosen.describe())
    return Dataset(survey.root, survey.layout.name, survey.cases, chosen)


def survey_cases(root: str | Path) -> Survey:
    """Find the cases of a folder in any layout, and all files without a partner, and every second file of one case.

    Raises:
        InputError: there is no folder, or nothing of any layout in it, or its cases cannot be told apart.
    """
    root = Path(root)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "no such folder"
        raise InputError(option("data.root", root), problem, how_to_get_data())
    for layout in LAYOUTS:
        findings: list[Finding] = []
        cases = layout.find_cases(root, findings)
        if cases or findings:
            return Survey(root, layout, tuple(cases), tuple(findings))
    raise InputError(root, f"no case found; recognised layouts: {RECOGNISED_LAYOUTS}", how_to_get_data())


def how_to_get_data() -> str:
    """Return a sentence for errors about missing data."""
    phantoms = option("data.root", "phantom")
    return f"Get LAScarQS 2022 by registration at zmiclab.github.io/projects/lascarqs22, or use {phantoms}."


def find_images(root: str | Path) -> dict[str, Path]:
    """Return case id -> image to predict: one file, the NIfTI files of a folder, or the images of a data set.

    Raises:
        InputError: there is none.
    """
    root = Path(root)
    where, fix = option("input", root), "Name a NIfTI file, or a folder with NIfTI files."
    if root.is_file():
        return _by_name([root], [], CHANNEL)
    if not root.is_dir():
        raise InputError(where, "no such file or folder", fix)
    for layout in LAYOUTS:
        findings: list[Finding] = []
        images = layout.find_images(root, findings)
        _raise_first(findings)
        if images:
            return images
    raise InputError(where, "no .nii or .nii.gz file in this folder", fix)


def find_masks(folder: Path, option_name: str) -> dict[str, Path]:
    """Return the NIfTI files of a folder of masks, by name without ending.

    Raises:
        InputError: the folder is missing, or two files have the same name. The error names the option `option_name`.
    """
    if not folder.is_dir():
        raise InputError(option(option_name, folder), "no such folder", "Name a folder of masks.")
    findings: list[Finding] = []
    masks = _by_name(_nifti_files(folder), findings)
    _raise_first(findings)
    return masks


def masks_by_image(masks: dict[str, Path]) -> dict[str, Path]:
    """Return masks by the name of their image if all names end in one of `MASK_SUFFIXES`, otherwise nothing.

    Raises:
        InputError: two masks belong to one image.
    """
    findings: list[Finding] = []
    images, by_image = _images_and_masks(masks.values(), findings)
    _raise_first(findings)
    return {} if images else by_image


# --- LAScarQS 2022 ---------------------------------------------------------------------------------------------------

LASCARQS_FILES = f"LAScarQS 2022 (task2/train_data/train_<n>/{LASCARQS_IMAGE} + {LASCARQS_MASK})"


def _lascarqs_cases(root: Path, findings: list[Finding]) -> list[Case]:
    folders = _lascarqs_folders(root)
    labelled = [f for f in folders if f.name.startswith("train_")]
    if labelled and (skipped := [f for f in folders if f not in labelled]):
        log.info("%s: %d folders not named train_<n> are not read (%s, …)", root, len(skipped), skipped[0])
    folders = labelled or folders
    images, masks = ({f.name: f / n for f in folders if (f / n).exists()} for n in (LASCARQS_IMAGE, LASCARQS_MASK))
    paired = {case.id: case for case in _pair(images, masks, findings)}
    return [paired[f.name] for f in folders if f.name in paired]


def _lascarqs_images(root: Path, _: list[Finding]) -> dict[str, Path]:
    return {f.name: f / LASCARQS_IMAGE for f in _lascarqs_folders(root) if (f / LASCARQS_IMAGE).exists()}


def _lascarqs_folders(root: Path) -> list[Path]:
    """Return the case folders in numeric order; `root` may be any level of the tree."""
    root = root.resolve()  # so that a case folder given as "." has a name
    names = (LASCARQS_IMAGE, LASCARQS_MASK)
    folders = {path.parent for depth in range(5) for name in names for path in root.glob("*/" * depth + name)}
    if any("task2" in f.parts for f in folders) and (skipped := [f for f in folders if "task2" not in f.parts]):
        log.info("%s: %d case folders outside task2 are not read (%s, …)", root, len(skipped), sorted(skipped)[0])
        folders -= set(skipped)
    if len({f.name for f in folders}) < len(folders):
        raise InputError(root, "two case folders have the same name", "Name the folder of one data set.")
    return sorted(folders, key=lambda f: ([int(n) for n in re.findall(r"\d+", f.name)], f.name))


# --- Medical Decathlon and nnU-Net -----------------------------------------------------------------------------------

DECATHLON_FILES = "Medical Decathlon or nnU-Net (dataset.json, imagesTr, labelsTr)"


def _decathlon_cases(root: Path, findings: list[Finding]) -> list[Case]:
    where = root / "dataset.json"
    if not where.is_file():
        return []
    images = _decathlon_images(root, findings)
    if len(names := _channel_names(root)) > 1:
        problem = f"names {len(names)} image channels ({', '.join(names)}), but only one is supported"
        raise InputError(where, problem, "List one channel if the files hold only that one.")
    masks = _by_name(_nifti_files(root / "labelsTr"), findings)
    if not images and not masks:
        problem = "has a dataset.json but no image in imagesTr and no mask in labelsTr"
        raise InputError(root, problem, "Complete the data set, or name another folder.")
    return _pair(images, masks, findings)


def _decathlon_images(root: Path, findings: list[Finding]) -> dict[str, Path]:
    if not (root / "dataset.json").is_file():
        return {}
    files = _nifti_files(root / "imagesTr")
    if extra := [path for path in files if re.search(r"_000[1-9]$", _stem(path))]:  # nnU-Net's names of channels
        problem = "a second image channel, but only one is supported"
        raise InputError(extra[0], problem, "Move the other channels out of imagesTr.")
    return _by_name(files, findings, CHANNEL)


def _decathlon_labels(root: Path) -> Labels:
    where = root / "dataset.json"
    fix = f"Correct the file, or set {option('data.labels')}."
    try:
        labels = json.loads(where.read_text())["labels"]
        # Decathlon writes {"1": "LA"}, nnU-Net {"LA": 1}
        pairs = [(value, key) if isinstance(value, str) else (key, value) for key, value in labels.items()]
        if any(isinstance(value, list) or name == "ignore" for name, value in pairs):
            raise InputError(where, "overlapping and ignored labels are not supported", f"Set {option('data.labels')}.")
        named = [("background" if int(value) == 0 else name, (int(value),)) for name, value in pairs]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(where, f"not readable as a data set description ({error!r})", fix) from error
    if len(dict(named)) < len(named):
        raise InputError(where, "a label occurs twice", fix)
    return make_labels(dict(named), str(where), fix)


def channel_name(root: Path) -> str:
    """Return the name of the scans' one channel in `dataset.json`; empty if it has none."""
    return next(iter(_channel_names(root)), "")


def _channel_names(root: Path) -> list[str]:
    try:
        content = json.loads((root / "dataset.json").read_text())
        return list(map(str, content.get("channel_names", content.get("modality", {})).values()))
    except (OSError, ValueError, AttributeError):
        return []


# --- flat pairs ------------------------------------------------------------------------------------------------------

FLAT_PAIRS = "<case>.nii.gz + <case>_mask.nii.gz in one folder, or images/<case>.nii.gz + labels/<case>.nii.gz"
FLAT_FILES = f"flat pairs ({FLAT_PAIRS})"


def _flat_cases(root: Path, findings: list[Finding]) -> list[Case]:
    images, masks = _images_and_masks(_nifti_files(root), findings)
    if not images and not masks:
        images = _by_name(_nifti_files(root, IMAGE_FOLDERS), findings, CHANNEL)
        plain, suffixed = _images_and_masks(_nifti_files(root, MASK_FOLDERS), findings)
        masks = plain | suffixed
        for name in sorted(set(plain) & set(suffixed)):
            findings.append(Finding("two files", root, f"has two masks for case {name}", KEEP_ONE, name))
    return _pair(images, masks, findings)


def _flat_images(root: Path, findings: list[Finding]) -> dict[str, Path]:
    images, masks = _images_and_masks(_nifti_files(root), findings)
    for path in masks.values():
        log.info("%s: skipped, its name is the name of a mask", path)
    return images or _by_name(_nifti_files(root, IMAGE_FOLDERS), findings, CHANNEL)


# --- shared ----------------------------------------------------------------------------------------------------------

KEEP_ONE = "Move one of the two out of the folder."
CHANNEL = "_0000"  # how nnU-Net marks the first channel


def _pair(images: dict[str, Path], masks: dict[str, Path], findings: list[Finding]) -> list[Case]:
    """Return the cases in order of their ids; add files without a partner to `findings`."""
    for partner, files, partners in (("mask", images, masks), ("image", masks, images)):
        for name in sorted(set(files) - set(partners)):
            fix = f"Add the {partner}, or move this file out of the folder."
            findings.append(Finding(f"no {partner}", files[name], f"has no {partner}", fix, name))
    return [Case(name, images[name], masks[name]) for name in sorted(set(images) & set(masks))]


def _raise_first(findings: Sequence[Finding]) -> None:
    """Raise the first finding, if any, as an InputError that counts further files without a partner."""
    if not findings:
        return
    first = findings[0]
    more = sum(f.kind == first.kind for f in findings[1:]) if first.kind in ("no mask", "no image") else 0
    raise InputError(first.file, f"{first.problem}{f' (and {more} more)' if more else ''}", first.fix)


def _nifti_files(root: Path, folders: Sequence[str] = (".",)) -> list[Path]:
    files = []
    for folder in (root / name for name in folders):
        inside = folder.iterdir() if folder.is_dir() else ()
        files += sorted(p for p in inside if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith("."))
    return files


def _images_and_masks(paths: Iterable[Path], findings: list[Finding]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the images by name, and the masks, whose names end in one of `MASK_SUFFIXES`, by name of their image."""
    masks, images = [], []
    for path in paths:
        (masks if _stem(path).endswith(MASK_SUFFIXES) else images).append(path)
    return _by_name(images, findings, CHANNEL), _by_name(masks, findings, *MASK_SUFFIXES)


def _by_name(paths: Iterable[Path], findings: list[Finding], *suffixes: str) -> dict[str, Path]:
    """Return the files by name without ending and suffix; add a second file of one name to `findings`."""
    files: dict[str, Path] = {}
    for path in paths:
        name = re.sub(f"({'|'.join(suffixes)})$", "", _stem(path))
        if name in files:
            problem = f"belongs to the same case as {files[name].name}"
            findings.append(Finding("two files", path, problem, KEEP_ONE, name))
        files.setdefault(name, path)
    return files


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


# --- layouts, in the order in which they are tried -------------------------------------------------------------------

LAYOUTS = (
    Layout("LAScarQS", LASCARQS_FILES, _lascarqs_cases, _lascarqs_images, lambda root: Labels(("LA",))),
    Layout("dataset.json", DECATHLON_FILES, _decathlon_cases, _decathlon_images, _decathlon_labels),
    Layout("flat pairs", FLAT_FILES, _flat_cases, _flat_images, lambda root: Labels(("foreground",), one_value=True)),
)
RECOGNISED_LAYOUTS = "; ".join(layout.description for layout in LAYOUTS)
