"""The scans of a folder: which paths are scans, and which case each file belongs to."""

import os
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxla.config import InputError, option
from jaxla.data.formats import EXTENSIONS, is_dicom_series, is_scan, is_special, scan_extension, strip_extension

# Extensions of scan formats that this package cannot read.
UNSUPPORTED_EXTENSIONS = (
    ".hdr", ".img", ".img.gz", ".mgz", ".mgh", ".mnc", ".gipl", ".gipl.gz", ".par", ".rec", ".dcm", ".ima",
    ".nii.bz2", ".nii.xz", ".nii.zip", ".nii.zst",
)  # fmt: skip

MAKE_READABLE = "Make the folder readable."
KEEP_ONE = "Move one of the two out of the folder."
CHANNEL_NAME = re.compile(r"(.+)_(\d{4})")  # nnU-Net names channel 1 of case X `X_0001`
MAX_CHANNELS = 4  # a longer series of numbers belongs to patients, not channels


@dataclass(frozen=True)
class Case:
    """One patient scan and its mask."""

    id: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Finding:
    """Something unusual or wrong in a folder of scans; `problem` and `fix` as in `InputError`."""

    kind: str  # what was checked, in one or two words
    file: Path  # the file at fault, or the folder if several are
    problem: str
    fix: str
    case: str = ""  # id of the case, if there is one
    level: Literal["error", "warning"] = "error"  # an error stops training; a warning does not


class FolderScans(NamedTuple):
    """The scans in a folder and its subfolders, sorted by path."""

    scans: list[Path]  # files and folders of DICOM slices
    unreadable: list[Path]  # scans in other formats, named pipes, and links to files or folders that do not exist


def list_scans(root: Path) -> FolderScans:
    """List the scans of a folder and its subfolders, except hidden ones.

    Links to folders are followed, unless the linked folder is listed under its own path or contains the link.

    Raises:
        InputError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk would skip the folder

    scans: list[Path] = []
    unreadable: list[Path] = []
    try:
        for name, folders, files in os.walk(root, followlinks=True, onerror=fail):
            folder = Path(name)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and not _is_repeated(folder / f, root))
            paths = [folder / file for file in files if not file.startswith(".")]
            # Opening every file to look for DICOM slices would be slow.
            may_be_series = any(not path.name.lower().endswith(EXTENSIONS) for path in paths)
            is_series = folder != root and may_be_series and is_dicom_series(folder)
            scans += [folder] if is_series else []
            for path in paths:
                if is_scan(path):
                    scans.append(path)
                elif _looks_like_scan(path, is_series):
                    unreadable.append(path)
    except OSError as error:
        raise InputError(error.filename, f"cannot be read ({error.strerror})", MAKE_READABLE) from error
    return FolderScans(sorted(scans), sorted(unreadable))


def _looks_like_scan(path: Path, in_series: bool) -> bool:
    """Return whether a file that is not read may be a scan; a DICOM series may hold files with any extension."""
    if is_dangling(path) or (scan_extension(path.name) and is_special(path)):
        return True
    return not in_series and path.name.lower().endswith(UNSUPPORTED_EXTENSIONS)


def _is_repeated(folder: Path, root: Path) -> bool:
    """Return whether a folder is a link to one that is listed by its own path in `root`, or that holds the link."""
    if not folder.is_symlink():
        return False
    real, real_root = folder.resolve(), root.resolve()
    if real.is_relative_to(real_root):
        return not any(part.startswith(".") for part in real.relative_to(real_root).parts)  # hidden ones are not listed
    return any(parent.resolve().is_relative_to(real) for parent in folder.parents)


def top_level_scans(folder: Path) -> list[Path]:
    """Return the scans directly in a folder, in order of their names."""
    return sorted(path for path in folder.iterdir() if is_scan(path))


def how_to_match_files() -> str:
    """Return the advice for files whose names do not show whether they are images or masks."""
    return f"If the names have another form, describe them with {option('data.image')} and {option('data.mask')}."


def is_dangling(path: Path) -> bool:
    """Return whether a path is a link to something that does not exist."""
    return path.is_symlink() and not os.path.exists(path)


def scan_name(path: Path) -> str:
    """Return the name of a scan without its extension."""
    return compose_letters(strip_extension(path.name))


def compose_letters(name: str) -> str:
    """Return a name in which each accented letter is a single character.

    Operating systems store such letters differently (`é`, or `e` and an accent), so an image and its mask may differ.
    """
    return unicodedata.normalize("NFC", name)


def index_by_name(paths: Iterable[Path], findings: list[Finding], suffixes: Iterable[str] = ()) -> dict[str, Path]:
    """Return the scans by name without extension and suffix; add a second scan with the same name to `findings`."""
    pattern = f"({'|'.join(map(re.escape, suffixes))})$"
    return index_by_id(((re.sub(pattern, "", scan_name(path)), path) for path in paths), findings)


def index_by_id(named: Iterable[tuple[str, Path]], findings: list[Finding], fix: str = KEEP_ONE) -> dict[str, Path]:
    """Return the scans by id, in order of the ids; add a second scan with the same id to `findings`."""
    scans: dict[str, Path] = {}
    for name, path in named:
        case_id = compose_letters(name)
        if case_id in scans:
            problem = f"belongs to the same case as {scans[case_id].name}"
            findings.append(Finding("two files", path, problem, fix, case_id))
        scans.setdefault(case_id, path)
    return dict(sorted(scans.items()))


def images_by_case(paths: Iterable[Path], masks: Container[str], findings: list[Finding]) -> dict[str, Path]:
    """Return the images by case id; add a second channel, or a second image of the same case, to `findings`.

    The number at the end of `X_0000` is a channel, as in nnU-Net, if there is a mask `X`. Without a mask `X` or
    `X_0000`, it is a channel if the numbers of `X` start at 0000 without gaps and there are at most four.

    Args:
        masks: ids of the cases that have a mask.
    """
    matches = {path: CHANNEL_NAME.fullmatch(scan_name(path)) for path in paths}
    numbers: dict[str, set[int]] = {}
    for match in matches.values():
        if match and match[0] not in masks:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    named = []
    for path, match in matches.items():
        if not match or match[0] in masks or not (match[1] in masks or _are_channels(numbers[match[1]])):
            named.append((scan_name(path), path))
        elif int(match[2]) == 0:
            named.append((match[1], path))
        else:
            problem = f"a second image channel of case {match[1]}, but only one is supported"
            fix = "Move the other channels out of the folder, or rename the scans if they are different patients."
            findings.append(Finding("channel", path, problem, fix, match[1]))
    return index_by_id(named, findings)


def _are_channels(numbers: set[int]) -> bool:
    return len(numbers) <= MAX_CHANNELS and numbers == set(range(len(numbers)))


def pair(images: Mapping[str, Path], masks: Mapping[str, Path], findings: list[Finding]) -> list[Case]:
    """Return the cases in the order of the images; add scans without a partner to `findings`."""
    for partner, files, partners in (("mask", images, masks), ("image", masks, images)):
        for name in sorted(set(files) - set(partners)):
            fix = f"Add the {partner}, or move this file out of the folder."
            fix += "" if partners else f" {how_to_match_files()}"
            findings.append(Finding(f"no {partner}", files[name], f"has no {partner}", fix, name))
    return [Case(name, path, masks[name]) for name, path in images.items() if name in masks]
