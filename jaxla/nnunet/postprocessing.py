"""Whether a run keeps of its structures the largest connected part alone: what its validation cases say.

All structures together are tried first, then, where there are several, each by itself. A try is kept if the mean Dice
of the structures that it may change rises, and none's falls. Reference code: nnunetv2 2.8.1,
`determine_postprocessing`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.terminal import plural, track
from jaxla.data.dataset import PreparedData
from jaxla.data.volumes import read_image, slice_geometry, to_slices
from jaxla.distributed import barrier, broadcast, gather, is_first, local_items
from jaxla.inference.postprocessing import keep_largest
from jaxla.inference.segment import make_segment
from jaxla.inference.trained import TrainedNetwork
from jaxla.runs.folder import LARGEST, read_largest

log = logging.getLogger(__name__)

Tries = dict[str, list[float | None]]  # of a case, for each way of keeping parts the Dice of every structure


def choose_largest(trained: TrainedNetwork, data: PreparedData, run_dir: Path) -> TrainedNetwork:
    """The trained network, with what its validation cases say; noted in the run's folder.

    Of several processes each segments its share of the cases.
    """
    if not broadcast((run_dir / LARGEST).exists()):
        segment, count = make_segment(replace(trained, largest=())), len(trained.record.labels.names)
        tries = {}
        for name in track(local_items(data.split.val), "validating"):
            prepared = data.volumes[name]
            volume = read_image(prepared.case.image)
            predicted = to_slices(segment(volume)[0], slice_geometry(volume.affine))
            tries[name] = tries_of(predicted, prepared.mask, count)
        of_all = {name: of_case for of_process in gather(tries) for name, of_case in of_process.items()}
        if is_first():
            keep_choice(of_all, trained.record.labels.names, run_dir)
        barrier()
    return replace(trained, largest=tuple(map(tuple, broadcast(read_largest(run_dir) if is_first() else None))))


def keep_choice(tries: Mapping[str, Tries], names: Sequence[str], run_dir: Path) -> None:
    """Note in a run's folder what the cases say, and the Dice that says it."""
    groups = choose_groups(tries, len(names))
    content = {"groups": groups, "unit": "volume", "n": len(tries), "dice": tries}
    with report_os_errors("written", run_dir / LARGEST, "mend that and go on with --resume"):
        (run_dir / LARGEST).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / LARGEST, json.dumps(content, indent=1) + "\n")
    what = ", then ".join(" and ".join(names[k - 1] for k in group) for group in groups)
    log.info(
        "postprocessing: %s (by the mean Dice of %s)",
        f"the largest connected part alone stays of {what}" if groups
        else "all parts stay, for the largest alone is not better", plural(len(tries), "validation case"),
    )  # fmt: skip


def read_tries(run_dir: Path) -> dict[str, Tries]:
    """What was noted of each case."""
    return json.loads((run_dir / LARGEST).read_text())["dice"]


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
