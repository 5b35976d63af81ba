"""The layouts of data sets: rules for which scans are images, which are masks, and which belong together.

`LAYOUTS`, at the end of this file, lists the layouts that are recognised.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxla.config import InputError, option
from jaxla.data import dataset_json
from jaxla.data.formats import FORMATS, scan_extension
from jaxla.data.labels import Labels
from jaxla.data.scan_files import (
    KEEP_ONE,
    Finding,
    compose_letters,
    how_to_match_files,
    images_by_case,
    index_by_id,
    index_by_name,
    scan_name,
)

log = logging.getLogger(__name__)

MASK_SUFFIXES = ("_mask", "_seg", "_label", "_labels", "_gt")
IMAGE_FOLDERS = ("images", "imagesTr", "image")
MASK_FOLDERS = ("labels", "labelsTr", "masks", "label", "mask")
MASK_WORDS = r"masks?|segm?|segmentation|labels?|labelmap|gt|ground_?truth|annotation|dseg|laendo"
MASK_NAME = re.compile(rf"(?:.*[_.\-])?(?:{MASK_WORDS})", re.IGNORECASE)


class ScanPaths(NamedTuple):
    """The scans of a data set by case id, in the order of the cases."""

    images: dict[str, Path]
    masks: dict[str, Path]


class Layout(NamedTuple):
    """One way to lay out a data set in a folder.

    `find` takes the folder, all scans in it, a list of findings, and whether only labelled cases are wanted, as in
    training. It adds duplicate scans of a case to the findings, and finds nothing if the folder has a different layout.
    """

    name: str
    description: str  # which files it consists of, for messages
    find: Callable[[Path, Sequence[Path], list[Finding], bool], ScanPaths]
    labels: Callable[[Path], Labels]  # the mask values of each class, unless the user sets `data.labels`


NOTHING = ScanPaths({}, {})


# --- one folder for each case ----------------------------------------------------------------------------------------


def _make_fixed_names_finder(image: str, mask: str) -> Callable[[Path, Sequence[Path], list[Finding], bool], ScanPaths]:
    """Return the function `find` of a layout whose files have the same two names in every case's folder."""

    def find(root: Path, scans: Sequence[Path], findings: list[Finding], for_training: bool) -> ScanPaths:
        matching = [path for path in scans if scan_name(path) in (image, mask)]
        folders = _keep_official_cases(root, {path.parent for path in matching}, for_training)
        _require_different_names(root, folders)
        named = [(folder_name(path.parent), path) for path in matching if path.parent in folders]
        by_case = (
            index_by_id([(case, path) for case, path in named if scan_name(path) == name], findings)
            for name in (image, mask)
        )
        return ScanPaths(*({case: paths[case] for case in sorted(paths, key=_numeric_order)} for paths in by_case))

    return find


def _keep_official_cases(root: Path, folders: set[Path], for_training: bool) -> set[Path]:
    """Return the case folders in task2, if there is one, and for training those named train_<n>, if there are any."""
    inside = {folder for folder in folders if "task2" in folder.relative_to(root).parts}
    if inside and (skipped := folders - inside):
        log.info("%s: %d case folders outside task2 are not read (%s, …)", root, len(skipped), min(skipped))
        folders = inside
    labelled = {folder for folder in folders if folder_name(folder).startswith("train_")}
    if for_training and labelled and (skipped := folders - labelled):
        log.info("%s: %d folders not named train_<n> are not read (%s, …)", root, len(skipped), min(skipped))
        folders = labelled
    return folders


def _numeric_order(name: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", name)], name


def _find_patient_folders(root: Path, scans: Sequence[Path], findings: list[Finding], for_training: bool) -> ScanPaths:
    """Find one image and one mask in each folder; a mask has a name such as `mask`, `label` or `scan_seg`."""
    parents = {path.parent for path in scans}
    # A folder of DICOM slices may also hold the mask.
    by_folder = [(path if path in parents else path.parent, path) for path in scans]
    by_folder = [(folder, path) for folder, path in by_folder if folder != root or len(parents) == 1]
    masks = [(folder, path) for folder, path in by_folder if path != folder and MASK_NAME.fullmatch(scan_name(path))]
    images = [each for each in by_folder if each not in masks]
    image_count, mask_count = (Counter(folder for folder, _ in each) for each in (images, masks))
    allowed = (1,) if for_training else (0, 1)
    if not any(count == 1 and mask_count[folder] in allowed for folder, count in image_count.items()):
        return NOTHING
    _require_different_names(root, {folder for folder, _ in by_folder})
    files = ([(folder_name(folder), path) for folder, path in each] for each in (images, masks))
    return ScanPaths(*(index_by_id(each, findings, f"{KEEP_ONE} {how_to_match_files()}") for each in files))


def folder_name(folder: Path) -> str:
    """Return the name of a case's folder, which may be given as `.`."""
    return compose_letters(folder.name if folder.name not in ("", "..") else folder.resolve().name)


def _require_different_names(root: Path, folders: Iterable[Path]) -> None:
    by_folder_name: dict[str, Path] = {}
    for folder in sorted(folders):
        if (other := by_folder_name.setdefault(folder_name(folder), folder)) != folder:
            problem = f"two case folders have the same name ({other} and {folder})"
            raise InputError(root, problem, f"Pass the folder of a single data set. {how_to_match_files()}")


# --- BIDS ------------------------------------------------------------------------------------------------------------

DERIVED = r"_(?:space|res|den|label|desc|hemi)-[^_]+"  # parts that only the name of a mask has, not that of its scan


def _find_bids(root: Path, scans: Sequence[Path], findings: list[Finding], _: bool) -> ScanPaths:
    """Find scans in folders sub-…, with masks named …_mask, …_dseg or the like, next to them or in derivatives."""
    images, masks = [], []
    for path in scans:
        if not any(part.startswith("sub-") for part in path.relative_to(root).parts[:-1]):
            continue
        if match := re.fullmatch(r"(sub-[^_]+(?:_[^_-]+-[^_]+)*)_(.+)", scan_name(path)):
            is_mask = MASK_NAME.fullmatch(match[2])
            (masks if is_mask else images).append((re.sub(DERIVED, "", match[1]), path))
    return ScanPaths(*(index_by_id(each, findings, f"{KEEP_ONE} {how_to_match_files()}") for each in (images, masks)))


# --- Medical Decathlon and nnU-Net -----------------------------------------------------------------------------------


def _find_decathlon(root: Path, scans: Sequence[Path], findings: list[Finding], for_training: bool) -> ScanPaths:
    where = root / dataset_json.FILE
    if not where.is_file():
        return NOTHING
    names = dataset_json.channel_names(root)
    if for_training and len(names) > 1:
        problem = f"names {len(names)} image channels ({', '.join(names)}), but only one is supported"
        raise InputError(where, problem, "List one channel if the files hold only that one.")
    masks = index_by_name((path for path in scans if path.parent == root / "labelsTr"), findings)
    images = images_by_case((path for path in scans if path.parent == root / "imagesTr"), masks, findings)
    if for_training and not images and not masks:
        problem = "has a dataset.json, but imagesTr and labelsTr hold no scan"
        raise InputError(root, problem, f"Complete the data set. Formats: {FORMATS}. {how_to_match_files()}")
    return ScanPaths(images, masks)


# --- flat pairs ------------------------------------------------------------------------------------------------------

FLAT_PAIRS = "<case>.nii.gz + <case>_mask.nii.gz in one folder, or images/<case>.nii.gz + labels/<case>.nii.gz"


def _find_flat_pairs(root: Path, scans: Sequence[Path], findings: list[Finding], for_training: bool) -> ScanPaths:
    parents = {path.parent for path in scans}  # a folder with DICOM slices and a mask is a patient's folder
    in_root = [path for path in scans if path.parent == root and path not in parents]
    if len(in_root) == 2 and any(re.fullmatch(MASK_WORDS, scan_name(path), re.IGNORECASE) for path in in_root):
        return NOTHING  # the folder of one patient
    images, masks = images_and_masks(in_root, findings)
    if images or (masks and for_training):
        return ScanPaths(images, masks)
    files = [path for path in scans if path.parent in [root / name for name in MASK_FOLDERS]]
    plain = index_by_name((path for path in files if not scan_name(path).endswith(MASK_SUFFIXES)), findings)
    suffixed = index_by_name(
        (path for path in files if scan_name(path).endswith(MASK_SUFFIXES)), findings, MASK_SUFFIXES
    )
    masks = plain | suffixed
    files = [path for path in scans if path.parent in [root / name for name in IMAGE_FOLDERS]]
    images = images_by_case(files, masks, findings)
    for name in sorted(set(plain) & set(suffixed)):
        findings.append(Finding("two files", root, f"has two masks for case {name}", KEEP_ONE, name))
    return ScanPaths(images, masks)


def images_and_masks(paths: Iterable[Path], findings: list[Finding]) -> ScanPaths:
    """Return the images, and the masks, whose names end in one of `MASK_SUFFIXES`, by the name of their image."""
    masks, images = [], []
    for path in paths:
        (masks if scan_name(path).endswith(MASK_SUFFIXES) else images).append(path)
    by_image = index_by_name(masks, findings, MASK_SUFFIXES)
    return ScanPaths(images_by_case(images, by_image, findings), by_image)


# --- names given by the user -----------------------------------------------------------------------------------------


def make_pattern_layout(image: str, mask: str) -> Layout:
    """Return the layout of a data set whose images and masks match two patterns, relative to its folder.

    `*` stands for a part of the case id, `**` for any folders, `?` for one character. A pattern without an extension,
    or that ends in `.*`, matches every format.
    """

    def find(root: Path, scans: Sequence[Path], findings: list[Finding], for_training: bool) -> ScanPaths:
        _check_patterns(image, mask, for_training)
        masks = [(case_id, path) for path in scans if (case_id := _match(mask, path.relative_to(root)))]
        taken = {path for _, path in masks}
        images = [(i, path) for path in scans if path not in taken and (i := _match(image, path.relative_to(root)))]
        fix = "Write a * for each part of the path that differs between cases."
        return ScanPaths(index_by_id(images, findings, fix), index_by_id(masks, findings, fix))

    return Layout("given patterns", f"{image} + {mask}", find, _foreground_label)


def _check_patterns(image: str, mask: str, for_training: bool) -> None:
    given = [option(f"data.{name}", repr(value)) for name, value in (("image", image), ("mask", mask)) if value]
    where = " and ".join(given)
    example = "where * is the name of the case"
    if not image or (for_training and not mask):
        fix = f"Set both, for example {option('data.image')}='*/image.nii.gz' {option('data.mask')}='*/mask.nii.gz'"
        raise InputError(where, "the pattern of images or masks is missing", f"{fix}, {example}.")
    stars = [len(re.findall(r"(?<!\*)\*(?!\*)", _strip_any_extension(each))) for each in (image, mask) if each]
    if min(stars) < 1 or max(stars) != min(stars):
        fix = f"Use '*/image.nii.gz' and '*/mask.nii.gz', for example, {example}."
        raise InputError(where, "needs at least one *, and the same number for images and masks", fix)


def _strip_any_extension(pattern: str) -> str:
    return pattern.removesuffix(".*").rstrip("/")


def _match(pattern: str, path: Path) -> str:
    """Return the case id: the parts that `*` matches, joined by `_`; empty if the path does not match the pattern."""
    pattern = _strip_any_extension(pattern)
    name = scan_name(path)
    if scan_extension(pattern):
        name += scan_extension(path.name).lower()
        pattern = pattern.removesuffix(scan_extension(pattern)) + scan_extension(pattern).lower()
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "([^/]+)", "?": "[^/]"}
    words = re.split(r"(\*\*/|\*\*|\*|\?)", compose_letters(pattern))
    expression = "".join(special.get(word, re.escape(word)) for word in words)
    match = re.fullmatch(expression, compose_letters((path.parent / name).as_posix()))
    return "_".join(match.groups()) if match else ""


# --- layouts, in the order in which they are tried -------------------------------------------------------------------


def _atrium_label(root: Path) -> Labels:
    return Labels(("LA",))


def _foreground_label(root: Path) -> Labels:
    return Labels(("foreground",), one_value=True)


LASCARQS_IMAGE, LASCARQS_MASK = "enhanced", "atriumSegImgMO"
LASCARQS_FILES = f"LAScarQS 2022 (task2/train_data/train_<n>/{LASCARQS_IMAGE}.nii.gz + {LASCARQS_MASK}.nii.gz)"
LA2018_FILES = "LA challenge 2018 (<case>/lgemri.nrrd + laendo.nrrd)"
DECATHLON_FILES = "Medical Decathlon or nnU-Net (dataset.json, imagesTr, labelsTr)"
BIDS_FILES = "BIDS (sub-<n>/…/sub-<n>_ses-<m>_<scan>.nii.gz + …_mask.nii.gz)"

LAYOUTS = (
    Layout("LAScarQS", LASCARQS_FILES, _make_fixed_names_finder(LASCARQS_IMAGE, LASCARQS_MASK), _atrium_label),
    Layout("LA 2018", LA2018_FILES, _make_fixed_names_finder("lgemri", "laendo"), _atrium_label),
    Layout("dataset.json", DECATHLON_FILES, _find_decathlon, dataset_json.read_labels),
    Layout("flat pairs", f"flat pairs ({FLAT_PAIRS})", _find_flat_pairs, _foreground_label),
    Layout("BIDS", BIDS_FILES, _find_bids, _foreground_label),
    Layout("patient folders", "<case>/image.nii.gz + <case>/mask.nii.gz", _find_patient_folders, _foreground_label),
)
RECOGNISED_LAYOUTS = "; ".join(layout.description for layout in LAYOUTS)
