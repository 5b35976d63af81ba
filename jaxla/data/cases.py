"""A folder of scans -> its cases. Three layouts are recognised by themselves; see `LAYOUTS`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
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
        one_value: where any non-zero value is the class, a mask must not hold two different ones.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...] | None = None
    ignored: tuple[int, ...] = ()
    one_value: bool = False

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
            if self.one_value and len(found := np.unique(mask[mask != 0])) > 1:
                raise InputError(
                    f"{source}: holds the label values {found[:5].tolist()}; say which is which class, "
                    f"such as --data.labels='a:{found[0]};b:{found[1]}'"
                )
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
        dtype = next(t for t in (np.uint8, np.int16, np.int32) if max(values) <= np.iinfo(t).max)
        return np.array(values, dtype)[classes]

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
        what = "is a file; give a folder" if root.exists() else "no such folder"
        raise InputError(f"--data.root={root}: {what}. {HOW_TO_GET_DATA}")
    layouts = {  # the first one that finds something is taken
        "LAScarQS": (_lascarqs_cases, lambda root: Labels(("LA",))),
        "dataset.json": (_decathlon_cases, _decathlon_labels),
        "flat pairs": (_flat_cases, lambda root: Labels(("foreground",), one_value=True)),
    }
    found = next(((name, cases) for name, (read, _) in layouts.items() if (cases := read(root))), None)
    if found is None:
        raise InputError(f"{root}: no case found; recognised layouts: {'; '.join(LAYOUTS)}. {HOW_TO_GET_DATA}")
    layout, cases = found
    own_labels = layouts[layout][1]
    chosen = parse_labels(labels) if labels else own_labels(root)
    log.info("%s: %d cases (%s); classes %s", root, len(cases), layout, chosen.describe())
    return Dataset(root, layout, tuple(cases), chosen)


def find_images(root: str | Path) -> dict[str, Path]:
    """The images to predict: one file, the NIfTI files of a folder, or the images of a data set; case id -> path.

    Raises:
        InputError: nothing there.
    """
    root = Path(root)
    if root.is_file():
        return _by_id([root])
    if not root.is_dir():
        raise InputError(f"--input={root}: no such file or folder")
    images = {f.name: f / "enhanced.nii.gz" for f in _lascarqs_folders(root) if (f / "enhanced.nii.gz").exists()}
    if not images:
        images, masks = _by_suffix(_nifti_files(root))
        for path in masks.values():
            log.info("%s: not predicted, its name is that of a mask", path)
    images = images or _by_id(path for name in IMAGE_FOLDERS for path in _nifti_files(root / name))
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


def _lascarqs_cases(root: Path) -> list[Case]:
    folders = _lascarqs_folders(root)
    labelled = [f for f in folders if f.name.startswith("train_")]
    if labelled and (others := [f for f in folders if f not in labelled]):
        log.info("%s: %d folders not named train_<n> are not read (%s, …)", root, len(others), others[0])
    cases = [Case(f.name, f / "enhanced.nii.gz", f / "atriumSegImgMO.nii.gz") for f in labelled or folders]
    _require_pairs({c.id: c.image for c in cases if c.image.exists()}, {c.id: c.mask for c in cases if c.mask.exists()})
    return cases


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


def _decathlon_cases(root: Path) -> list[Case]:
    if not (root / "dataset.json").is_file():
        return []
    files = _nifti_files(root / "imagesTr")
    if further := [path for path in files if re.search(r"_000[1-9]$", _stem(path))]:
        raise InputError(f"{further[0]}: a second image channel; this package reads scans of one channel")
    images, masks = _by_id(files), _by_stem(_nifti_files(root / "labelsTr"))
    if not images and not masks:
        raise InputError(f"{root}: has a dataset.json but no image in imagesTr and no mask in labelsTr")
    return _require_pairs(images, masks)


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
    return _labels_of(dict(named), str(where))


# --- flat pairs ------------------------------------------------------------------------------------------------------


def _flat_cases(root: Path) -> list[Case]:
    images, masks = _by_suffix(_nifti_files(root))
    if not images and not masks:
        images = _by_id(path for name in IMAGE_FOLDERS for path in _nifti_files(root / name))
        in_mask_folders = [path for name in MASK_FOLDERS for path in _nifti_files(root / name)]
        plain, suffixed = _by_suffix(in_mask_folders)
        masks = plain | suffixed
        if len(masks) < len(in_mask_folders):
            raise InputError(
                f"{root}: two masks belong to one case ({sorted(set(plain) & set(suffixed))[0]}); keep one"
            )
    return _require_pairs(images, masks)


# --- shared ----------------------------------------------------------------------------------------------------------


def _require_pairs(images: dict[str, Path], masks: dict[str, Path]) -> list[Case]:
    """The cases, in order of their ids; an InputError if an image or a mask stands alone."""
    for kind, has, lacks in (("mask", images, masks), ("image", masks, images)):
        if alone := sorted(set(has) - set(lacks)):
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise InputError(f"{has[alone[0]]}: no {kind} belongs to it{more}; add the {kind} or take this file out")
    return [Case(name, images[name], masks[name]) for name in sorted(images)]


def _nifti_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [p for p in folder.iterdir() if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith(".")]
    return sorted(files)


def _by_suffix(paths: Iterable[Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images, and masks by the name of their image: whose names end in one of `MASK_SUFFIXES`."""
    paths = list(paths)
    masks = [path for path in paths if _stem(path).endswith(MASK_SUFFIXES)]
    suffix = re.compile("|".join(f"{s}$" for s in MASK_SUFFIXES))
    return _by_id(p for p in paths if p not in masks), _unambiguous((suffix.sub("", _stem(p)), p) for p in masks)


def _by_id(paths: Iterable[Path]) -> dict[str, Path]:
    return _unambiguous((_stem(path).removesuffix("_0000"), path) for path in paths)


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    return _unambiguous((_stem(path), path) for path in paths)


def _unambiguous(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, path in named:
        if name in files:
            raise InputError(f"{path}: stands for the same case as {files[name].name}; keep one of them")
        files[name] = path
    return files


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
