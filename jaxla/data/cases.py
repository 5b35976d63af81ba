"""A folder of scans -> its cases. The layouts at the end of this file are recognised by themselves."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxla.config import InputError
from jaxla.data.labels import Labels, labels_of, parse_labels

log = logging.getLogger(__name__)

HOW_TO_GET_DATA = (
    "LAScarQS 2022 comes by registration at zmiclab.github.io/projects/lascarqs22; "
    "--data.root=phantom makes synthetic scans instead"
)
MASK_SUFFIXES = ("_mask", "_seg", "_label", "_labels", "_gt")
IMAGE_FOLDERS = ("images", "imagesTr", "image")
MASK_FOLDERS = ("labels", "labelsTr", "masks", "label", "mask")


@dataclass(frozen=True)
class Case:
    """One patient scan."""

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
    """Something about a folder of scans that a person should know.

    Attributes:
        kind: what was looked at, one word or two.
        file: which file, or folder where it concerns several.
        what: is wrong, or unusual.
        mend: how to mend it.
        case: id of the case it concerns, if any.
        level: training refuses an `error`; it accepts a `warning`, which a person should look at.
    """

    kind: str
    file: Path
    what: str
    mend: str
    case: str = ""
    level: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Survey:
    """What lies in a folder, whole or not.

    Attributes:
        layout: one of `LAYOUTS`, the first that finds something.
        cases: those with an image and a mask.
        findings: errors, on files that make no case.
    """

    root: Path
    layout: Layout
    cases: tuple[Case, ...]
    findings: tuple[Finding, ...]


class Layout(NamedTuple):
    """One way in which a data set lies in a folder, and its masks hold classes.

    Attributes:
        name: in short.
        description: for messages: which files.
        cases: those with an image and a mask; what makes none is added to the findings. None of either where the folder
            is not of this layout.
        images: case id -> scan, labelled or not, for prediction; what is ambiguous is added to the findings.
        labels: which mask values are which class, where the user does not say.
    """

    name: str
    description: str
    cases: Callable[[Path, list[Finding]], list[Case]]
    images: Callable[[Path, list[Finding]], dict[str, Path]]
    labels: Callable[[Path], Labels]


def find_cases(root: str | Path, labels: str = "") -> Dataset:
    """Find the labelled cases of a folder in any layout.

    Args:
        labels: which mask values are which class, as in `config.Data.labels`; empty takes them from the data set.

    Raises:
        InputError: no folder, no case, an image without mask or a mask without image.
    """
    survey = survey_cases(root)
    _raise_first(survey.findings)
    chosen = find_labels(survey, labels)
    log.info("%s: %d cases (%s); classes %s", survey.root, len(survey.cases), survey.layout.name, chosen.describe())
    return Dataset(survey.root, survey.layout.name, survey.cases, chosen)


def survey_cases(root: str | Path) -> Survey:
    """The cases of a folder in any layout, and all files that stand alone or stand for a case twice.

    Raises:
        InputError: no folder, nothing of any layout in it, or nothing that could be told apart into cases.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file; give a folder" if root.exists() else "no such folder"
        raise InputError(f"--data.root={root}: {what}. {HOW_TO_GET_DATA}")
    for layout in LAYOUTS:
        findings: list[Finding] = []
        cases = layout.cases(root, findings)
        if cases or findings:
            return Survey(root, layout, tuple(cases), tuple(findings))
    raise InputError(f"{root}: no case found; recognised layouts: {RECOGNISED}. {HOW_TO_GET_DATA}")


def find_labels(survey: Survey, labels: str = "") -> Labels:
    """Which mask values are which class: as `config.Data.labels` says it, or where that is empty as the data set does.

    Raises:
        InputError: `labels` is not of its form, or `dataset.json` says nothing usable.
    """
    return parse_labels(labels) if labels else survey.layout.labels(survey.root)


def find_images(root: str | Path) -> dict[str, Path]:
    """The images to predict: one file, the NIfTI files of a folder, or the images of a data set; case id -> path.

    Raises:
        InputError: nothing there.
    """
    root = Path(root)
    if root.is_file():
        return _by_id([root], [])
    if not root.is_dir():
        raise InputError(f"--input={root}: no such file or folder")
    for layout in LAYOUTS:
        findings: list[Finding] = []
        images = layout.images(root, findings)
        _raise_first(findings)
        if images:
            return images
    raise InputError(f"--input={root}: no .nii or .nii.gz file in this folder")


def find_masks(folder: Path, option: str) -> dict[str, Path]:
    """The NIfTI files of a folder of masks, by name without ending.

    Raises:
        InputError: no such folder, or two files of one name.
    """
    if not folder.is_dir():
        raise InputError(f"{option}={folder}: no such folder")
    findings: list[Finding] = []
    masks = _by_stem(_nifti_files(folder), findings)
    _raise_first(findings)
    return masks


def masks_by_image(masks: dict[str, Path]) -> dict[str, Path]:
    """Masks by the name of their image, where the names of all end in one of `MASK_SUFFIXES`; else none.

    Raises:
        InputError: two are of one image.
    """
    findings: list[Finding] = []
    images, by_image = _by_suffix(masks.values(), findings)
    _raise_first(findings)
    return {} if images else by_image


# --- LAScarQS 2022 ---------------------------------------------------------------------------------------------------


def _lascarqs_cases(root: Path, findings: list[Finding]) -> list[Case]:
    folders = _lascarqs_folders(root)
    labelled = [f for f in folders if f.name.startswith("train_")]
    if labelled and (others := [f for f in folders if f not in labelled]):
        log.info("%s: %d folders not named train_<n> are not read (%s, …)", root, len(others), others[0])
    cases = [Case(f.name, f / "enhanced.nii.gz", f / "atriumSegImgMO.nii.gz") for f in labelled or folders]
    images = {c.id: c.image for c in cases if c.image.exists()}
    paired = {c.id: c for c in _pair(images, {c.id: c.mask for c in cases if c.mask.exists()}, findings)}
    return [case for case in cases if case.id in paired]


def _lascarqs_images(root: Path, _: list[Finding]) -> dict[str, Path]:
    return {f.name: f / "enhanced.nii.gz" for f in _lascarqs_folders(root) if (f / "enhanced.nii.gz").exists()}


def _lascarqs_folders(root: Path) -> list[Path]:
    """The case folders, whatever level of the tree was given, in numeric order."""
    root = root.resolve()  # a case folder given as "." has a name too
    names = ("enhanced.nii.gz", "atriumSegImgMO.nii.gz")
    folders = {path.parent for depth in range(5) for name in names for path in root.glob("*/" * depth + name)}
    if any("task2" in f.parts for f in folders) and (others := [f for f in folders if "task2" not in f.parts]):
        log.info("%s: %d case folders outside task2 are not read (%s, …)", root, len(others), sorted(others)[0])
        folders -= set(others)
    if len({f.name for f in folders}) < len(folders):
        raise InputError(f"{root}: two case folders have one name; give the folder of one data set")
    return sorted(folders, key=lambda f: ([int(n) for n in re.findall(r"\d+", f.name)], f.name))


# --- Medical Decathlon and nnU-Net -----------------------------------------------------------------------------------


def _decathlon_cases(root: Path, findings: list[Finding]) -> list[Case]:
    if not (root / "dataset.json").is_file():
        return []
    files = _nifti_files(root / "imagesTr")
    _require_one_channel(files)
    if len(names := _channel_names(root)) > 1:
        raise InputError(
            f"{root / 'dataset.json'}: names {len(names)} image channels ({', '.join(names)}); this package reads "
            "scans of one channel: name that one alone, if it is the one that the files hold"
        )
    images, masks = _by_id(files, findings), _by_stem(_nifti_files(root / "labelsTr"), findings)
    if not images and not masks:
        raise InputError(f"{root}: has a dataset.json but no image in imagesTr and no mask in labelsTr")
    return _pair(images, masks, findings)


def _decathlon_images(root: Path, findings: list[Finding]) -> dict[str, Path]:
    if not (root / "dataset.json").is_file():
        return {}
    files = _nifti_files(root / "imagesTr")
    _require_one_channel(files)
    return _by_id(files, findings)


def _require_one_channel(files: Iterable[Path]) -> None:
    """Raise an InputError if there is a further channel, as nnU-Net names its files."""
    if further := [path for path in files if re.search(r"_000[1-9]$", _stem(path))]:
        raise InputError(f"{further[0]}: a second image channel; this package reads scans of one channel")


def _decathlon_labels(root: Path) -> Labels:
    where = root / "dataset.json"
    try:
        labels = json.loads(where.read_text())["labels"]
        # Decathlon writes {"1": "LA"}, nnU-Net {"LA": 1}
        pairs = [(value, key) if isinstance(value, str) else (key, value) for key, value in labels.items()]
        if any(isinstance(number, list) for _, number in pairs) or any(name == "ignore" for name, _ in pairs):
            raise InputError(f"{where}: overlapping and ignored labels are not read; choose classes with --data.labels")
        named = [("background" if int(number) == 0 else name, (int(number),)) for name, number in pairs]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not readable as a data set description ({error!r})") from error
    if len(dict(named)) < len(named):
        raise InputError(f"{where}: a label stands twice; mend it, or choose classes with --data.labels")
    return labels_of(dict(named), str(where))


def channel_name(root: Path) -> str:
    """What a `dataset.json` calls the scans' one channel; empty where it does not say."""
    return next(iter(_channel_names(root)), "")


def _channel_names(root: Path) -> list[str]:
    try:
        content = json.loads((root / "dataset.json").read_text())
        return list(map(str, content.get("channel_names", content.get("modality", {})).values()))
    except (OSError, ValueError, AttributeError):
        return []


# --- flat pairs ------------------------------------------------------------------------------------------------------


def _flat_cases(root: Path, findings: list[Finding]) -> list[Case]:
    images, masks = _by_suffix(_nifti_files(root), findings)
    if not images and not masks:
        images = _by_id((path for name in IMAGE_FOLDERS for path in _nifti_files(root / name)), findings)
        plain, suffixed = _by_suffix((path for name in MASK_FOLDERS for path in _nifti_files(root / name)), findings)
        masks = plain | suffixed
        for name in sorted(set(plain) & set(suffixed)):
            findings.append(Finding("two files", root, f"two masks belong to one case ({name})", "keep one", name))
    return _pair(images, masks, findings)


def _flat_images(root: Path, findings: list[Finding]) -> dict[str, Path]:
    images, masks = _by_suffix(_nifti_files(root), findings)
    for path in masks.values():
        log.info("%s: not predicted, its name is that of a mask", path)
    return images or _by_id((path for name in IMAGE_FOLDERS for path in _nifti_files(root / name)), findings)


# --- shared ----------------------------------------------------------------------------------------------------------


def _pair(images: dict[str, Path], masks: dict[str, Path], findings: list[Finding]) -> list[Case]:
    """The cases, in order of their ids; what stands alone is added to `findings`."""
    for kind, has, lacks in (("mask", images, masks), ("image", masks, images)):
        for name in sorted(set(has) - set(lacks)):
            what, mend = f"no {kind} belongs to it", f"add the {kind} or take this file out"
            findings.append(Finding(f"no {kind}", has[name], what, mend, name))
    return [Case(name, images[name], masks[name]) for name in sorted(set(images) & set(masks))]


def _raise_first(findings: Sequence[Finding]) -> None:
    """Raise the first finding, if any, as an InputError; of files that stand alone it says how many there are."""
    if not findings:
        return
    first = findings[0]
    more = sum(f.kind == first.kind for f in findings[1:]) if first.kind in ("no mask", "no image") else 0
    raise InputError(f"{first.file}: {first.what}{f' (and {more} more)' if more else ''}; {first.mend}")


def _nifti_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith(".")]
    return sorted(files)


def _by_suffix(paths: Iterable[Path], findings: list[Finding]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images, and masks by the name of their image: whose names end in one of `MASK_SUFFIXES`."""
    paths = list(paths)
    masks = [path for path in paths if _stem(path).endswith(MASK_SUFFIXES)]
    suffix = re.compile("|".join(f"{s}$" for s in MASK_SUFFIXES))
    images = _by_id((p for p in paths if p not in masks), findings)
    return images, _unambiguous(((suffix.sub("", _stem(p)), p) for p in masks), findings)


def _by_id(paths: Iterable[Path], findings: list[Finding]) -> dict[str, Path]:
    return _unambiguous(((_stem(path).removesuffix("_0000"), path) for path in paths), findings)


def _by_stem(paths: Iterable[Path], findings: list[Finding]) -> dict[str, Path]:
    return _unambiguous(((_stem(path), path) for path in paths), findings)


def _unambiguous(named: Iterable[tuple[str, Path]], findings: list[Finding]) -> dict[str, Path]:
    """The files by name; a second one of a name is added to `findings`."""
    files: dict[str, Path] = {}
    for name, path in named:
        if name in files:
            what = f"stands for the same case as {files[name].name}"
            findings.append(Finding("two files", path, what, "keep one of them", name))
        else:
            files[name] = path
    return files


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


# --- layouts, in the order in which they are tried -------------------------------------------------------------------

LAYOUTS = (
    Layout(
        "LAScarQS",
        "LAScarQS 2022 (task2/train_data/train_<n>/enhanced.nii.gz + atriumSegImgMO.nii.gz)",
        _lascarqs_cases,
        _lascarqs_images,
        lambda root: Labels(("LA",)),
    ),
    Layout(
        "dataset.json",
        "Medical Decathlon or nnU-Net (dataset.json, imagesTr, labelsTr)",
        _decathlon_cases,
        _decathlon_images,
        _decathlon_labels,
    ),
    Layout(
        "flat pairs",
        "flat pairs (<case>.nii.gz + <case>_mask.nii.gz in one folder, or images/<case>.nii.gz + labels/<case>.nii.gz)",
        _flat_cases,
        _flat_images,
        lambda root: Labels(("foreground",), one_value=True),
    ),
)
RECOGNISED = "; ".join(layout.description for layout in LAYOUTS)
