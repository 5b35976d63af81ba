"""The patient-level split: 70 % training, 10 % validation, 20 % test; saved as `split.json` and accepted back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.config import Data, InputError

FOLDS, FOLD_SEED = 5, 12345
ALL_FOLDS = "all"  # what --fold is where a run trains them all


@dataclass(frozen=True)
class Split:
    """Case ids of each part; the training ids stand in the order in which smaller protocols take them.

    `unused` are the training patients that a smaller protocol leaves out: kept, so that the same split serves all.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The lists train, val and test, and unused where a smaller protocol leaves patients out."""
        return {part: ids for part, ids in asdict(self).items() if ids}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def make_split(ids: Sequence[str], protocol: Data, fold: str = "") -> Split:
    """A protocol's split: drawn from its seed or read from its file, with as many training patients as it asks for.

    The smaller protocols of one `subset_seed` are nested in the larger ones; validation and test patients are the same
    in all of them, whatever that seed. The test patients are the same in every fold too.

    Args:
        fold: number of the fold that validates, of five of the training and validation patients; else these stay.

    Raises:
        InputError: fewer patients than the protocol needs, or a split file that does not fit the cases.
    """
    split = _read_split(Path(protocol.split), ids) if protocol.split else _draw_split(ids, protocol.split_seed)
    wanted, percent, seed = protocol.train_patients, protocol.train_percent, protocol.subset_seed
    if wanted < 0:
        raise InputError(f"--data.train_patients={wanted}: must be 0 (all) or more")
    if not 0 < percent <= 100:
        raise InputError(f"--data.train_percent={percent:g}: must be above 0 and at most 100")
    if wanted and percent < 100:
        raise InputError(f"--data.train_patients={wanted} and --data.train_percent={percent:g}: give one of the two")
    if seed < 0:
        raise InputError(f"--data.subset_seed={seed}: must be 0 or more")
    if wanted > len(split.train):
        raise InputError(
            f"--data.train_patients={wanted}: there are {len(split.train)} training patients "
            f"(of {len(ids)} cases, {len(split.val)} validate and {len(split.test)} test); add cases or ask for fewer"
        )
    if fold and (wanted or percent < 100):
        raise InputError(
            "option --fold: folds take turns in training and validation, so it needs all training patients; leave out "
            "--data.train_patients and --data.train_percent, or take an experiment of all of them"
        )
    if fold and len(pool := split.train + split.val) < FOLDS:
        raise InputError(
            f"option --fold: {FOLDS} folds need as many patients that do not test, and there are {len(pool)}; add cases"
        )
    if fold.isdecimal():
        return _of_fold(split, int(fold))
    train = split.train
    if seed:
        train = tuple(train[i] for i in np.random.default_rng(seed).permutation(len(train)))
    wanted = wanted or max(1, math.floor(percent / 100 * len(train) + 0.5))
    return Split(train[:wanted], split.val, split.test, unused=train[wanted:])


def _of_fold(split: Split, fold: int) -> Split:
    """Five folds of the training and validation patients, drawn as nnU-Net draws its own (scikit-learn's `KFold`)."""
    pool = sorted(split.train + split.val)
    order = np.arange(len(pool))
    np.random.RandomState(FOLD_SEED).shuffle(order)
    val = set(np.array_split(order, FOLDS)[fold].tolist())
    return Split(
        train=tuple(name for i, name in enumerate(pool) if i not in val),
        val=tuple(name for i, name in enumerate(pool) if i in val),
        test=split.test,
    )


def write_split(split: Split, path: Path) -> None:
    """Write `split.json`."""
    write_atomically(path, json.dumps(split.parts, indent=1) + "\n")


def read_test_cases(path: Path) -> tuple[str, ...]:
    """The test cases of a split file."""
    return _read(path, "--cases").test


def _draw_split(ids: Sequence[str], seed: int) -> Split:
    if seed < 0:
        raise InputError(f"--data.split_seed={seed}: must be 0 or more")
    if len(ids) < 3:
        raise InputError(f"--data.root holds {len(ids)} patients; training, validation and test need at least 3")
    shuffled = [sorted(ids)[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    test = max(1, round(0.2 * len(ids)))
    val = max(1, round(0.1 * len(ids)))
    return Split(
        train=tuple(shuffled[test + val :]),
        val=tuple(sorted(shuffled[test : test + val])),
        test=tuple(sorted(shuffled[:test])),
    )


def _read_split(path: Path, ids: Sequence[str]) -> Split:
    split = _read(path, "--data.split")
    named = [*split.train, *split.val, *split.test]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InputError(f"--data.split={path}: case {twice[0]} stands in it twice; a patient must not cross splits")
    if unknown := sorted(set(named) - set(ids)):
        raise InputError(f"--data.split={path}: case {unknown[0]} is not in the data ({len(unknown)} such cases)")
    for part in ("train", "val", "test"):
        if not getattr(split, part):
            raise InputError(f"--data.split={path}: its list {part} is empty")
    return split


def _read(path: Path, option: str) -> Split:
    """A split file, its unused training patients back among the training ones."""
    with report_os_errors("read", f"{option}={path}"):
        written = path.read_bytes()
    try:
        content = json.loads(written)
        train, val, test = (tuple(map(str, content[part])) for part in ("train", "val", "test"))
        return Split(train + tuple(map(str, content.get("unused", ()))), val, test)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{option}={path}: not a split file: expected lists train, val, test of case ids") from error
