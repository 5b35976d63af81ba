"""nnU-Net's postprocessing: keep only the largest connected component of structures if this raises the validation Dice.

The rule for all structures together is tried first. If there are several structures, the rule for each is tried next. A
rule is adopted if it raises the mean Dice of the structures that it may change, and lowers none. Reference code:
nnunetv2 2.8.1, `determine_postprocessing` and `remove_connected_components`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from scipy import ndimage

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.json_files import read_json
from jaxla.cli.terminal import plural
from jaxla.config import option
from jaxla.distributed import barrier, broadcast, gather, is_first

log = logging.getLogger(__name__)

Groups = tuple[tuple[int, ...], ...]  # groups of class indices of which the largest connected component is kept
Trials = dict[str, list[float | None]]  # Dice of each structure of one case, by rule


class _Largest(TypedDict):
    """The content that is read from the file of `write_choice`."""

    groups: list[list[int]]
    dice: dict[str, Trials]


def keep_largest(classes: np.ndarray, groups: Iterable[Sequence[int]]) -> np.ndarray:
    """Return classes [S, H, W] with only the largest connected component of each group.

    Components of equal size are all kept. Voxels are connected by faces, edges and corners.
    """
    kept = classes.copy()
    for group in groups:
        mask = np.isin(kept, list(group))
        parts, count = ndimage.label(mask, np.ones((3, 3, 3), bool))
        if count > 1:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0  # background
            kept[mask & (sizes < sizes.max())[parts]] = 0
    return kept


def choose_largest(cases: Iterable[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str], path: Path) -> Groups:
    """Choose the groups whose largest component is kept, by validation Dice; return and save them.

    Every process must call it. If the file exists, `cases` is not read.

    Args:
        cases: (case id, predicted classes, reference classes) of the cases of this process.
        names: names of the structures.
        path: the file that stores the choice.
    """
    if not broadcast(path.exists()):
        trials = {case: try_rules(predicted, reference, len(names)) for case, predicted, reference in cases}
        merged = {case: trial for process in gather(trials) for case, trial in process.items()}
        if is_first():
            write_choice(merged, names, path)
        barrier()
    return tuple(map(tuple, broadcast(read_groups(path) if is_first() else None)))


def try_rules(predicted: np.ndarray, reference: np.ndarray, count: int) -> Trials:
    """Return the Dice of each of `count` structures of a case under each rule."""
    each = [[k] for k in range(1, count + 1)]
    joint = keep_largest(predicted, [range(1, count + 1)])
    variants = {
        "none": predicted,
        "all": joint,
        "each": keep_largest(predicted, each),
        "all, each": keep_largest(joint, each),
    }
    return {rule: _dice(variant, reference, count) for rule, variant in variants.items()}


def choose_groups(trials: Mapping[str, Trials], count: int) -> list[list[int]]:
    """Return the groups of classes of which only the largest component is kept, given the trials by case id."""
    # The mean over the cases that have a structure; NaN, which is never greater, if none has it.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        dice = {rule: [trial[rule] for trial in trials.values()] for rule in next(iter(trials.values()))}
        mean = {rule: np.nanmean(np.array(values, float), axis=0) for rule, values in dice.items()}
    groups = []
    base = "none"
    if mean["all"].mean() > mean["none"].mean() and (mean["all"] >= mean["none"]).all():
        groups, base = [list(range(1, count + 1))], "all"
    each = "each" if base == "none" else "all, each"
    if count > 1:  # the rule for one structure does not change the Dice of the others
        groups += [[k] for k in range(1, count + 1) if mean[each][k - 1] > mean[base][k - 1]]
    return groups


def write_choice(trials: Mapping[str, Trials], names: Sequence[str], path: Path) -> None:
    """Write the chosen groups and the Dice behind them, and log the choice."""
    groups = choose_groups(trials, len(names))
    content = {"groups": groups, "unit": "volume", "n": len(trials), "dice": trials}
    with report_os_errors("written", path, f"Fix this and rerun with {option('resume')}."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    kept = ", then ".join(" and ".join(names[k - 1] for k in group) for group in groups)
    rule = f"keep only the largest connected component of {kept}" if groups else "keep all components"
    log.info("postprocessing: %s, by the mean Dice of %s", rule, plural(len(trials), "validation case"))


def read_trials(path: Path) -> dict[str, Trials]:
    """Return the Dice that was written for each case; raises as `read_json`."""
    return read_json(path, _Largest)["dice"]


def read_groups(path: Path) -> Groups:
    """Return the groups in a file, () if the file is missing; raise an InputError if it is damaged."""
    try:
        return tuple(map(tuple, read_json(path, _Largest)["groups"]))
    except FileNotFoundError:
        return ()


def _dice(predicted: np.ndarray, reference: np.ndarray, count: int) -> list[float | None]:
    """Return the Dice of each structure; None if neither mask has it, which nnU-Net excludes from its means."""
    values = []
    for k in range(1, count + 1):
        a, b = predicted == k, reference == k
        voxels = int(a.sum()) + int(b.sum())
        values.append(2 * int((a & b).sum()) / voxels if voxels else None)
    return values
