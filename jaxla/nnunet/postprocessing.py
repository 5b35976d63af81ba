"""Whether a run keeps of its structures the largest connected part alone: what its validation cases say.

All structures together are tried first, then, where there are several, each by itself. A try is kept if the mean Dice
of the structures that it may change rises, and none's falls. Reference code: nnunetv2 2.8.1,
`determine_postprocessing`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.terminal import plural
from jaxla.config import InputError
from jaxla.distributed import barrier, gather, is_first
from jaxla.inference.postprocessing import keep_largest

log = logging.getLogger(__name__)

Tries = dict[str, list[float | None]]  # of a case: the Dice of every structure, for each way of keeping parts


def choose_largest(cases: Iterable[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str], path: Path) -> None:
    """Decide on validation cases which classes keep only their largest part, and write that to a file.

    Args:
        cases: id, predicted and reference classes [S, H, W] of this process's share of the cases.
        names: of the classes.
        path: of the file.
    """
    tries = {case_id: tries_of(predicted, reference, len(names)) for case_id, predicted, reference in cases}
    all_tries = {case_id: each for of_process in gather(tries) for case_id, each in of_process.items()}
    if is_first():
        write_choice(all_tries, names, path)
    barrier()


def join_folds(paths: Iterable[Path], names: Sequence[str], path: Path) -> None:
    """Decide on the validation cases of all folds together, from the files that `choose_largest` wrote for each."""
    tries = {case_id: each for fold in paths for case_id, each in json.loads(fold.read_text())["dice"].items()}
    write_choice(tries, names, path)


def read_largest(path: Path) -> tuple[tuple[int, ...], ...]:
    """Return the groups of classes whose largest connected part alone is kept; none if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return ()
    try:
        groups = json.loads(path.read_text())["groups"]
        return tuple(tuple(int(k) for k in group) for group in groups)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, f"damaged ({error!r})", "Restore it from a copy.") from error


def write_choice(tries: Mapping[str, Tries], names: Sequence[str], path: Path) -> None:
    """Write the chosen groups of classes, and the Dice scores that decided it."""
    groups = choose_groups(tries, len(names))
    content = {"groups": groups, "unit": "volume", "n": len(tries), "dice": tries}
    with report_os_errors("written", path, "Fix this and rerun with --resume."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    kept = ", then ".join(" and ".join(names[k - 1] for k in group) for group in groups)
    choice = f"only the largest connected part of {kept} is kept" if groups else "all connected parts are kept"
    log.info("postprocessing: %s (by the mean Dice of %s)", choice, plural(len(tries), "validation case"))


def tries_of(predicted: np.ndarray, reference: np.ndarray, count: int) -> Tries:
    """The Dice of each of `count` structures of a case, for each way of keeping parts."""
    together = [range(1, count + 1)]
    found = {"none": _dice(predicted, reference, count)}
    found["all"] = _dice(kept := keep_largest(predicted, together), reference, count)
    each = [[k] for k in range(1, count + 1)]
    found["each"] = _dice(keep_largest(predicted, each), reference, count)
    found["all, each"] = _dice(keep_largest(kept, each), reference, count)
    return found


def choose_groups(tries: Mapping[str, Tries], count: int) -> list[list[int]]:
    """The groups of classes of which the largest part alone is kept."""
    mean = {way: _mean([of_case[way] for of_case in tries.values()]) for way in next(iter(tries.values()))}
    groups, base = [], "none"
    if mean["all"].mean() > mean["none"].mean() and (mean["all"] >= mean["none"]).all():
        groups, base = [list(range(1, count + 1))], "all"
    each = "each" if base == "none" else "all, each"
    if count > 1:  # what is taken from one structure changes no other's Dice
        groups += [[k] for k in range(1, count + 1) if mean[each][k - 1] > mean[base][k - 1]]
    return groups


def _mean(dice: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Of each structure, over the cases that have one; NaN, which is neither more nor less, where none has."""
    values = np.array(dice, float)
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(0) / there.sum(0)


def _dice(predicted: np.ndarray, reference: np.ndarray, count: int) -> list[float | None]:
    """Of each structure; None where neither has it, which nnU-Net leaves out of its means."""
    values = []
    for k in range(1, count + 1):
        ours, theirs = predicted == k, reference == k
        voxels = int(ours.sum()) + int(theirs.sum())
        values.append(2 * int((ours & theirs).sum()) / voxels if voxels else None)
    return values
