"""A folder of scans -> its cases. Three layouts are recognised by themselves; see `LAYOUTS`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxla.config import InputError

log = logging.getLogger(__name__)

LAYOUTS = (
    "LAScarQS 2022 (task2/train_data/train_<n>/enhanced.nii.gz + atriumSegImgMO.nii.gz)",
    "Medical Decathlon or nnU-Net (dataset.json, imagesTr, labelsTr)",
    "flat pairs (<case>.nii.gz + <case>_mask.nii.gz in one folder, or images/<case>.nii.gz + labels/<case>.nii.gz)",
)
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
class Labels:
    """Which mask values are which class.

    Attributes:
        names: of the foreground classes; class c (1-based) is `names[c - 1]`.
        values: the mask values of each of them; None where any non-zero value is the one class.
        ignored: mask values that count as background.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...] | None = None
    ignored: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """Channels of the logits: 1 for one class (sigmoid), else background and classes (softmax)."""
        return 1 if len(self.names) == 1 else len(self.names) + 1

    def to_classes(self, mask: np.ndarray, source: Path) -> np.ndarray:
        """Mask values -> class indices (0 is background), uint8, same shape.

        Raises:
            InputError: `mask` holds a value that is no class.
        """
        if self.values is None:
            return (mask != 0).astype(np.uint8)
        classes = np.zeros(mask.shape, np.uint8)
        known = mask == 0
        for index, values in enumerate(self.values, start=1):
            of_class = np.isin(mask, values)
            classes[of_class] = index
            known |= of_class
        known |= np.isin(mask, self.ignored)
        if not known.all():
            beyond = np.unique(mask[~known])[:5].tolist()
            raise InputError(
                f"{source}: holds the label values {beyond} beyond the classes {self.describe()}; "
                "mend the mask, or name them with --data.labels (background:<value> leaves a value out)"
            )
        return classes

    def to_values(self, classes: np.ndarray) -> np.ndarray:
        """Class indices -> the values that this data set's masks use (the first one of each class)."""
        values = [0, *(v[0] for v in self.values)] if self.values else [0, 1]
        return np.array(values, np.uint8 if max(values) < 256 else np.int16)[classes]

    def describe(self) -> str:
        if self.values is None:
            return f"{self.names[0]}: any non-zero value"
        return ", ".join(
            f"{name}: {'/'.join(map(str, values))}" for name, values in zip(self.names, self.values, strict=True)
        )


@dataclass(frozen=True)
class Dataset:
    """The labelled cases of one folder."""

    root: Path
    layout: str
    cases: tuple[Case, ...]
    labels: Labels


def find_cases(root: str | Path, labels: str = "") -> Dataset:
    """Find the labelled cases of a folder in any of the three layouts.

    Args:
        labels: which mask values are which class, as in `config.Data.labels`; empty takes them from the data set.

    Raises:
        InputError: no folder, no case, an image without mask or a mask without image.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--data.root={root}: no such folder. {HOW_TO_GET_DATA}")
    readers = {"LAScarQS": _lascarqs, "dataset.json": _decathlon, "flat pairs": _flat_pairs}
    found = {layout: cases for layout, read in readers.items() if (cases := read(root)) is not None}
    if not found:
        raise InputError(f"{root}: no case found; recognised layouts: {'; '.join(LAYOUTS)}. {HOW_TO_GET_DATA}")
    layout, (cases, own_labels) = next(iter(found.items()))
    chosen = parse_labels(labels) if labels else own_labels
    log.info("%s: %d cases (%s); classes %s", root, len(cases), layout, chosen.describe())
    return Dataset(root, layout, tuple(cases), chosen)


def find_images(root: str | Path) -> dict[str, Path]:
    """The images to predict: one file, the NIfTI files of a folder, or the images of a data set; case id -> path.

    Raises:
        InputError: nothing there.
    """
    root = Path(root)
    if root.is_file():
        return {_stem(root): root}
    if not root.is_dir():
        raise InputError(f"--input={root}: no such file or folder")
    images = {}
    for path in _nifti_files(root):
        if _stem(path).endswith(MASK_SUFFIXES):
            log.info("%s: not predicted, its name is that of a mask", path)
        else:
            images[_case_id(path)] = path
    images = images or {folder.name: folder / "enhanced.nii.gz" for folder in _lascarqs_folders(root)}
    images = images or {_case_id(path): path for name in IMAGE_FOLDERS for path in _nifti_files(root / name)}
    if not images:
        raise InputError(f"--input={root}: no .nii or .nii.gz file in this folder")
    return images


def parse_labels(text: str) -> Labels:
    """`LA:1`, `anterior:1;posterior:2`, `hippocampus:1,2`, `LA:1;background:2,3` -> Labels.

    Raises:
        InputError: not of that form, or a value is named twice.
    """
    how = f"--data.labels={text!r}: expected name:value[,value…] with ';' between classes, such as LA:1 or a:1;b:2"
    names, values = [], []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([\w -]+?)\s*:\s*(\d+(?:\s*,\s*\d+)*)\s*", part)
        if not match:
            raise InputError(how)
        names.append(match[1])
        values.append(tuple(int(value) for value in match[2].split(",")))
    flat = [value for group in values for value in group]
    if len(set(flat)) < len(flat) or len(set(names)) < len(names):
        raise InputError(f"{how}; a name or value stands twice")
    return _labels_of(dict(zip(names, values, strict=True)), how)


def _labels_of(named: dict[str, Sequence[int]], where: str) -> Labels:
    ignored = tuple(value for value in named.get("background", ()) if value != 0)
    classes = {name: tuple(values) for name, values in named.items() if name != "background"}
    if not classes:
        raise InputError(f"{where}: names no class but the background")
    if any(0 in values for values in classes.values()):
        raise InputError(f"{where}: the value 0 is the background and cannot be a class")
    return Labels(tuple(classes), tuple(classes.values()), ignored)


# --- LAScarQS 2022 ---------------------------------------------------------------------------------------------------


def _lascarqs(root: Path) -> tuple[list[Case], Labels] | None:
    folders = _lascarqs_folders(root)
    if not folders:
        return None
    cases = [Case(f.name, f / "enhanced.nii.gz", f / "atriumSegImgMO.nii.gz") for f in folders]
    _require_pairs({c.id: c.image for c in cases if c.image.exists()}, {c.id: c.mask for c in cases if c.mask.exists()})
    return cases, Labels(("LA",))


def _lascarqs_folders(root: Path) -> list[Path]:
    """The case folders, whatever level of the tree was given, in numeric order."""
    names = ("enhanced.nii.gz", "atriumSegImgMO.nii.gz")
    folders = {path.parent for depth in range(5) for name in names for path in root.glob("*/" * depth + name)}
    if any("task2" in f.parts for f in folders) and (others := [f for f in folders if "task2" not in f.parts]):
        log.info("%s: %d case folders outside task2 are not read (%s, …)", root, len(others), sorted(others)[0])
        folders -= set(others)
    if len({f.name for f in folders}) < len(folders):
        raise InputError(f"{root}: two case folders have one name; give the folder of one data set")
    return sorted(folders, key=lambda f: ([int(n) for n in re.findall(r"\d+", f.name)], f.name))


# --- Medical Decathlon and nnU-Net -----------------------------------------------------------------------------------


def _decathlon(root: Path) -> tuple[list[Case], Labels] | None:
    description = root / "dataset.json"
    if not description.is_file():
        return None
    try:
        content = json.loads(description.read_text())
        labels = _decathlon_labels(content["labels"], description)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{description}: not readable as a data set description ({error!r})") from error
    images: dict[str, Path] = {}
    for path in _nifti_files(root / "imagesTr"):
        if re.search(r"_000[1-9]$", _stem(path)):
            raise InputError(f"{path}: a second image channel; this package reads scans of one channel")
        images[_case_id(path)] = path
    masks = {_stem(path): path for path in _nifti_files(root / "labelsTr")}
    if not images and not masks:
        raise InputError(f"{root}: has a dataset.json but no image in imagesTr and no mask in labelsTr")
    _require_pairs(images, masks)
    return [Case(name, images[name], masks[name]) for name in sorted(images)], labels


def _decathlon_labels(labels: dict, where: Path) -> Labels:
    named: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():  # Decathlon writes {"1": "LA"}, nnU-Net {"LA": 1}
        name, number = (value, key) if isinstance(value, str) else (key, value)
        if isinstance(number, list) or name in named:
            raise InputError(f"{where}: overlapping or repeated labels are not read; choose classes with --data.labels")
        named[name] = (int(number),)
    zero = [name for name, values in named.items() if values == (0,)]
    named = {"background" if name in zero else name: values for name, values in named.items()}
    return _labels_of(named, str(where))


# --- flat pairs ------------------------------------------------------------------------------------------------------


def _flat_pairs(root: Path) -> tuple[list[Case], Labels] | None:
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in _nifti_files(root):
        suffix = next((s for s in MASK_SUFFIXES if _stem(path).endswith(s)), None)
        if suffix:
            masks[_stem(path).removesuffix(suffix)] = path
        else:
            images[_case_id(path)] = path
    if not images and not masks:
        images = {_case_id(path): path for name in IMAGE_FOLDERS for path in _nifti_files(root / name)}
        masks = {}
        for path in (path for name in MASK_FOLDERS for path in _nifti_files(root / name)):
            suffix = next((s for s in MASK_SUFFIXES if _stem(path).endswith(s)), "")
            masks[_stem(path).removesuffix(suffix)] = path
    if not images and not masks:
        return None
    _require_pairs(images, masks)
    return [Case(name, images[name], masks[name]) for name in sorted(images)], Labels(("foreground",))


# --- shared ----------------------------------------------------------------------------------------------------------


def _require_pairs(images: dict[str, Path], masks: dict[str, Path]) -> None:
    for kind, has, lacks in (("mask", images, masks), ("image", masks, images)):
        if alone := sorted(set(has) - set(lacks)):
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise InputError(f"{has[alone[0]]}: no {kind} belongs to it{more}; add the {kind} or take this file out")


def _nifti_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith(".")]
    return sorted(files)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _case_id(path: Path) -> str:
    return _stem(path).removesuffix("_0000")
