"""The patient-level split: 70 % training, 10 % validation, 20 % test; written to and read from `split.json`.

Patients are split, and then replaced by their cases. Without `data.patients`, each case is a patient. If there are few
patients and the method does not depend on validation, no validation patients are drawn; they are used for training.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from jaxla.cli.files import report_os_errors, write_atomically
from jaxla.cli.json_files import decode_json
from jaxla.cli.terminal import plural
from jaxla.config import ALL_CASES, Data, InputError, option
from jaxla.data.patients import group_by_patient
from jaxla.data.scan_files import compose_letters

FOLDS, FOLD_SEED = 5, 12345
FOLD_PARTS = ("train", "val")  # keys of each fold in nnU-Net's file
ALL_FOLDS = "all"  # value of the option `fold` for a run that trains every fold
MIN_PATIENTS_TO_VALIDATE = 15  # with fewer, validation patients are drawn only if the method depends on validation
PARTS = ("train", "val", "test", "unused")


@dataclass(frozen=True)
class Split:
    """Case ids of each part."""

    train: tuple[str, ...]  # a smaller training subset is the beginning of this list
    val: tuple[str, ...]
    test: tuple[str, ...]
    unused: tuple[str, ...] = ()  # training patients left out; kept so that one file serves all protocols

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Training, validation and test, and the unused patients if there are any, by name."""
        return {part: ids for part, ids in asdict(self).items() if ids or part != "unused"}

    @property
    def sha256(self) -> str:
        """Hash of the case ids and their order."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


class SplitFile(TypedDict):
    """The content of `split.json`; ids that look like numbers may be written as numbers."""

    train: list[str | int]
    val: NotRequired[list[str | int]]
    test: NotRequired[list[str | int]]
    unused: NotRequired[list[str | int]]


def make_split(ids: Sequence[str], protocol: Data, fold: str = "", needs_validation: bool = True) -> Split:
    """Draw a protocol's split from its seed, or read it from its file, and take a subset of the training patients.

    The subsets of one `subset_seed` are nested. Validation and test patients do not depend on the subset, and test
    patients do not depend on the fold.

    Args:
        ids: all cases of the data set.
        fold: number of the validation fold; empty or `ALL_FOLDS` keeps the split as it is.
        needs_validation: whether the method depends on validation cases.

    Raises:
        InputError: there are fewer patients than the protocol needs, or the split file does not fit the cases or
            separates the cases of one patient.
    """
    for name in ("split_seed", "subset_seed", "train_patients"):
        if (value := getattr(protocol, name)) < 0:
            raise InputError(option(f"data.{name}", value), "must not be negative", "Use 0 or a positive integer.")
    groups = group_by_patient(ids, protocol.patients)
    is_file = protocol.split not in ("", ALL_CASES)
    if folds := _read_folds(Path(protocol.split)) if is_file else []:
        split, groups = _fit_split(_choose_fold(folds, protocol, fold), groups, protocol)
    elif is_file:
        split, groups = _fit_split(read_split(Path(protocol.split), "data.split"), groups, protocol)
    else:
        split = _draw_split(list(groups), protocol, needs_validation)
    _require_possible_subset(split, protocol, fold)
    if not fold.isdecimal():
        split = _take_subset(split, protocol)
    elif not folds:
        split = _make_fold(split, int(fold))
    parts = (split.train, split.val, split.test, split.unused)
    return Split(*(tuple(case for patient in part for case in groups[patient]) for part in parts))


def _take_subset(split: Split, protocol: Data) -> Split:
    """Return the split with a subset of its training patients, by default all of them."""
    train = split.train
    count = protocol.train_patients
    if protocol.subset_seed:
        train = tuple(train[i] for i in np.random.default_rng(protocol.subset_seed).permutation(len(train)))
    count = count or max(1, math.floor(protocol.train_percent / 100 * len(train) + 0.5))
    return Split(train[:count], split.val, split.test, unused=train[count:])


def write_split(split: Split, path: Path) -> None:
    """Write `split.json`."""
    write_atomically(path, json.dumps(split.parts, indent=1) + "\n")


def read_split(path: Path, option_name: str) -> Split:
    """Read a split file, with its unused training patients among the training patients.

    Raises:
        InputError: the file cannot be read, or is not a split file. The error names the option `option_name`.
    """
    where = option(option_name, path)
    fix = "Pass a JSON file with the lists train, val and test of case ids."
    with report_os_errors("read", where, "Pass a split.json."):
        text = path.read_bytes()
    try:
        content = decode_json(text, dict[str, list[str | int]])
    except ValueError as error:
        raise InputError(where, f"not a split file ({error})", fix) from error
    if unknown := content.keys() - set(PARTS):
        raise InputError(where, f"has the unknown entry {min(unknown)!r}", fix)
    train, val, test, unused = (tuple(map(str, content.get(part, ()))) for part in PARTS)
    if not train:
        raise InputError(where, "its list train is empty or missing", fix)
    _require_unique([*train, *val, *test, *unused], where)
    return Split(train + unused, val, test)


def _require_possible_subset(split: Split, protocol: Data, fold: str) -> None:
    count, percent = protocol.train_patients, protocol.train_percent
    train, val, test = (len(part) for part in (split.train, split.val, split.test))
    count_option, percent_option = option("data.train_patients", count), option("data.train_percent", f"{percent:g}")
    cases = plural(train + val + test, "case")
    available = f"{plural(train, 'training patient')} (of {cases}, {val} for validation, {test} for testing)"
    too_few = f"there {'is' if train == 1 else 'are'} only {available}"
    for is_wrong, *error in (
        (not 0 < percent <= 100, percent_option, "must be above 0 and at most 100", "Use 100 for all patients."),
        (count and percent < 100, count_option, f"cannot be combined with {percent_option}", "Remove one of the two."),
        (count > train, count_option, too_few, "Add cases, or use fewer training patients."),
        (fold and count, option("fold", fold), "needs all training patients", f"Remove {count_option}."),
        (fold and percent < 100, option("fold", fold), "needs all training patients", f"Remove {percent_option}."),
        (fold and train + val < FOLDS, option("fold", fold),
            f"needs at least {FOLDS} training and validation patients, but there are {train + val}", "Add cases."),
    ):  # fmt: skip
        if is_wrong:
            raise InputError(*error)


def _make_fold(split: Split, fold: int) -> Split:
    """Return one of five folds of the training and validation patients.

    Source: nnU-Net, which draws them with scikit-learn's `KFold(5, shuffle=True, random_state=12345)`.
    """
    pool = sorted(split.train + split.val)
    order = np.arange(len(pool))
    np.random.RandomState(FOLD_SEED).shuffle(order)
    val = {pool[i] for i in np.array_split(order, FOLDS)[fold]}
    train = tuple(name for name in pool if name not in val)
    return Split(train, tuple(name for name in pool if name in val), split.test)


def _draw_split(ids: Sequence[str], protocol: Data, needs_validation: bool) -> Split:
    shuffled = [sorted(ids)[i] for i in np.random.default_rng(protocol.split_seed).permutation(len(ids))]
    if protocol.split == ALL_CASES:
        return Split(tuple(shuffled), (), ())
    test, val = (max(1, round(fraction * len(ids))) for fraction in (0.2, 0.1))
    is_useful = needs_validation or len(ids) >= MIN_PATIENTS_TO_VALIDATE
    if protocol.validation == "never" or (protocol.validation == "if_useful" and not is_useful):
        val = 0
    if len(ids) <= test + val:
        parts, least = ("training, validation and test", 3) if val else ("training and test", 2)
        problem = f"holds {plural(len(ids), 'patient')}, but {parts} need at least {least}"
        name = "data.phantom_cases" if protocol.root == "phantom" else "data.root"
        fix = f"Add cases, or use {option('data.split', ALL_CASES)} to train on all."
        raise InputError(option(name), problem, fix)
    val_ids, test_ids = sorted(shuffled[test : test + val]), sorted(shuffled[:test])
    return Split(tuple(shuffled[test + val :]), tuple(val_ids), tuple(test_ids))


def _read_folds(path: Path) -> list[Split]:
    """Return the folds of nnU-Net's `splits_final.json`, which have no test cases; an empty list for other files."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, list) or not all(isinstance(fold[p], list) for fold in content for p in FOLD_PARTS):
            return []
        return [Split(*(tuple(map(str, fold[part])) for part in FOLD_PARTS), test=()) for fold in content]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []  # `read_split` raises the error


def _choose_fold(folds: Sequence[Split], protocol: Data, fold: str) -> Split:
    """Return a fold of `splits_final.json`; for a run of all folds, the first one."""
    where = option("data.split", protocol.split)
    if not fold:
        fix = f"Choose one with {option('fold', 0)}, or train all with {option('fold', ALL_FOLDS)}."
        raise InputError(where, f"holds {plural(len(folds), 'fold')} without test cases", fix)
    if fold == ALL_FOLDS and len(folds) != FOLDS:
        problem = f"holds {plural(len(folds), 'fold')}, but {option('fold', ALL_FOLDS)} trains {FOLDS}"
        raise InputError(where, problem, f"Train each fold with {option('fold', '0')} and so on.")
    index = 0 if fold == ALL_FOLDS else int(fold)
    if index >= len(folds):
        raise InputError(option("fold", fold), f"{where} holds only {plural(len(folds), 'fold')}", "Use another fold.")
    return folds[index]


def _require_unique(named: Sequence[str], where: str) -> None:
    if duplicates := sorted({case for case in named if named.count(case) > 1}):
        raise InputError(where, f"lists case {duplicates[0]} twice", "List each case once.")


def _fit_split(
    split: Split, groups: Mapping[str, Sequence[str]], protocol: Data
) -> tuple[Split, dict[str, Sequence[str]]]:
    """Check that a split of cases fits the patients, patient -> cases.

    Returns:
        The split of the patients, and the cases of each patient that the split lists.
    """
    where = option("data.split", protocol.split)
    parts = {part: [compose_letters(case) for case in getattr(split, part)] for part in ("train", "val", "test")}
    named = [case for cases in parts.values() for case in cases]
    _require_unique(named, where)
    patient_of_case = {case: patient for patient, cases in groups.items() for case in cases}
    if unknown := sorted(set(named) - set(patient_of_case)):
        problem = f"case {unknown[0]} is not in the data set ({plural(len(unknown), 'such case')})"
        raise InputError(where, problem, "Use the split of this data set.")
    patients = {part: list(dict.fromkeys(patient_of_case[case] for case in cases)) for part, cases in parts.items()}
    for a, b in itertools.combinations(parts, 2):
        if shared := [patient for patient in patients[a] if patient in patients[b]]:
            case_a, case_b = (next(c for c in parts[part] if patient_of_case[c] == shared[0]) for part in (a, b))
            problem = f"separates the scans of patient {shared[0]}: {case_a} is in {a}, {case_b} in {b}"
            raise InputError(where, problem, "Move all scans of a patient to the same list.")
    listed = {patient: [case for case in named if patient_of_case[case] == patient] for patient in groups}
    return Split(*(tuple(patients[part]) for part in parts)), listed
