"""The patient-level split: 70 % training, 10 % validation, 20 % test; saved as `split.json` and accepted back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxla.config import Data, InputError


@dataclass(frozen=True)
class Split:
    """Case ids of each part; the training ids stand in the order in which few-shot protocols take them."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def make_split(ids: Sequence[str], protocol: Data) -> Split:
    """A protocol's split: drawn from its seed or read from its file, with as many training patients as it asks for.

    The smaller protocols are nested in the larger ones; validation and test patients are the same in all of them.

    Raises:
        InputError: fewer patients than the protocol needs, or a split file that does not fit the cases.
    """
    split = _read_split(Path(protocol.split), ids) if protocol.split else _draw_split(ids, protocol.split_seed)
    wanted = protocol.train_patients
    if wanted < 0:
        raise InputError(f"--data.train_patients={wanted}: must be 0 (all) or more")
    if wanted > len(split.train):
        raise InputError(
            f"--data.train_patients={wanted}: there are {len(split.train)} training patients "
            f"(of {len(ids)} cases, {len(split.val)} validate and {len(split.test)} test); add cases or ask for fewer"
        )
    return Split(split.train[: wanted or None], split.val, split.test)


def write_split(split: Split, path: Path) -> None:
    path.write_text(json.dumps(asdict(split), indent=1) + "\n")


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
    try:
        content = json.loads(path.read_text())
        split = Split(**{part: tuple(map(str, content[part])) for part in ("train", "val", "test")})
    except OSError as error:
        raise InputError(f"--data.split={path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--data.split={path}: not a split file: expected lists train, val, test of case ids"
        ) from error
    named = [*split.train, *split.val, *split.test]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InputError(f"--data.split={path}: case {twice[0]} stands in it twice; a patient must not cross splits")
    if unknown := sorted(set(named) - set(ids)):
        raise InputError(f"--data.split={path}: case {unknown[0]} is not in the data ({len(unknown)} such cases)")
    for part in ("train", "val", "test"):
        if not getattr(split, part):
            raise InputError(f"--data.split={path}: its list {part} is empty")
    return split
