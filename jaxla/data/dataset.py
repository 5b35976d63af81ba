"""The data of an experiment: cases found, checked and prepared, and their patients split."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxla.cli.terminal import plural, track
from jaxla.config import Data, Experiment, InputError, Preprocessing, choices_by_validation, option
from jaxla.data.cases import Case, Dataset, find_cases
from jaxla.data.inputs import Canvas, smallest_extent, structure_extent
from jaxla.data.patients import describe_shared_patients
from jaxla.data.phantoms import ensure_phantoms
from jaxla.data.prepared import PreparedVolume, prepare_cases
from jaxla.data.split import ALL_FOLDS, FOLDS, Split, make_split

log = logging.getLogger(__name__)

FOREGROUND_MARGIN = 1.2  # side of the square with pad_to=foreground, relative to that of the structures


@dataclass(frozen=True)
class PreparedData:
    """A data set ready for training; `volumes` by case id, `fold` of cross-validation."""

    dataset: Dataset
    volumes: Mapping[str, PreparedVolume]
    split: Split
    fold: str = ""

    def for_fold(self, fold: str, experiment: Experiment) -> PreparedData:
        """Return the same data, split for one fold of cross-validation of an experiment."""
        return replace(self, split=split_cases([case.id for case in self.dataset.cases], experiment, fold), fold=fold)

    def select_volumes(self, ids: Iterable[str]) -> list[PreparedVolume]:
        """Return the volumes of these cases, in their order."""
        return [self.volumes[case_id] for case_id in ids]

    @property
    def used_volumes(self) -> list[PreparedVolume]:
        """The training, validation and test volumes."""
        return self.select_volumes(self.split.train + self.split.val + self.split.test)

    def canvas(self, preprocessing: Preprocessing) -> Canvas:
        """Return the square to which slices are padded or cropped."""
        if preprocessing.pad_to == "square":
            return Canvas(preprocessing.image_size)
        # the networks of all folds are tested together, so they share one square
        ids = self.split.train + self.split.val if self.fold else self.split.train
        volumes = self.select_volumes(ids)
        extent = smallest_extent((v.shape[1:], v.spacing[1:]) for v in volumes)
        if preprocessing.pad_to == "foreground":
            structures = max(structure_extent(v.mask, v.spacing[1:]) for v in volumes)
            extent = min(extent, FOREGROUND_MARGIN * structures)
        return Canvas(preprocessing.image_size, extent)

    @property
    def content_keys(self) -> dict[str, str]:
        """Case id -> hash of its scan, its mask and the labels."""
        return {case_id: volume.content_key for case_id, volume in self.volumes.items()}

    @property
    def sha256(self) -> str:
        """Hash of all cases and their content."""
        return hashlib.sha256(json.dumps(self.content_keys).encode()).hexdigest()


def prepare_data(
    experiment: Experiment,
    cache_dir: Path,
    select_local: Callable[[Sequence[Case]], Sequence[Case]] = lambda cases: cases,
) -> PreparedData:
    """Find, check and prepare the cases of an experiment, and split their patients.

    Args:
        select_local: selects the cases that this process prepares first, while other processes prepare others.

    Raises:
        InputError: data are missing or unusable, there are too few patients, or a class is in no training mask.
    """
    protocol, fold = experiment.data, experiment.fold
    if protocol.root == "phantom":  # check the split before making phantoms
        split_cases([f"train_{n + 1}" for n in range(protocol.phantom_cases)], experiment, fold)
    dataset = find_dataset(protocol, cache_dir)
    if not protocol.patients and (shared := describe_shared_patients([case.id for case in dataset.cases])):
        log.warning("%s: %s. %s", dataset.root, *shared)
    split = split_cases([case.id for case in dataset.cases], experiment, fold)
    prepared = prepare_cases(dataset, cache_dir, lambda cases: track(cases, "reading"), select_local(dataset.cases))
    data = PreparedData(dataset, {volume.id: volume for volume in prepared}, split, fold=fold)
    for k in map(str, range(FOLDS)) if fold == ALL_FOLDS else [fold]:
        require_classes(data.for_fold(k, experiment), protocol)
    _log_summary(data, f"{protocol.case_word}s")
    return data


def find_dataset(protocol: Data, cache_dir: Path, moved_to: str = "") -> Dataset:
    """Find the cases of a protocol in its folder, or in `moved_to` if it is given; raises as `find_cases`."""
    root = resolve_data_root(protocol, cache_dir, moved_to)
    return find_cases(root, protocol.all_labels, protocol.image, protocol.mask)


def split_cases(ids: Sequence[str], experiment: Experiment, fold: str = "") -> Split:
    """Return the split of an experiment's cases, see `make_split`.

    Raises:
        InputError: as `make_split`; or the method needs validation cases and the split has none.
    """
    protocol = experiment.data
    choices = choices_by_validation(experiment.method)
    split = make_split(ids, protocol, fold, needs_validation=bool(choices))
    if choices and not split.val and fold != ALL_FOLDS:
        name = "split" if protocol.split else "validation"
        deciding = " and ".join(option(option_name) for option_name in choices)
        fix = " ".join(option(option_name, value) for option_name, value in choices.items())
        where = option(f"data.{name}", getattr(protocol, name))
        problem = f"leaves no validation cases, which {experiment.method.name} needs for {deciding}"
        raise InputError(where, problem, f"Use {fix}, or another split.")
    return split


def resolve_data_root(protocol: Data, cache_dir: Path, moved_to: str = "") -> Path:
    """Return the folder of a protocol's scans, or `moved_to` if given; for the root `phantom`, make the phantoms."""
    root = moved_to or protocol.root
    if root == "phantom":
        return ensure_phantoms(cache_dir, protocol.phantom_size, protocol.phantom_cases)
    return Path(root)


def require_classes(data: PreparedData, protocol: Data) -> None:
    """Raise an InputError unless each class occurs in a training mask."""
    split = data.split
    for index, name in enumerate(data.dataset.labels.names, start=1):
        parts = {part: data.select_volumes(ids) for part, ids in asdict(split).items()}
        has_class = {part: any(v.class_voxels[index] for v in volumes) for part, volumes in parts.items()}
        if has_class["train"]:
            continue
        problem = f"no training case contains {name}"
        if data.fold and has_class["val"]:
            rest = "validation or test set" if has_class["test"] else "validation set"
            problem += f"; every case with {name} is in the {rest}"
            raise InputError(f"fold {data.fold}", problem, f"Use another {option('fold')}.")
        if has_class["unused"]:
            problem += f" among the {len(split.train)} that this protocol uses ({', '.join(split.train)})"
            where = option("data.subset_seed", protocol.subset_seed)
            raise InputError(where, problem, "Use another seed, or more training patients.")
        problem = f"none of the {len(split.train)} training cases contains {name}"
        fix = f"Check the masks, or list their values in {option('data.labels')}."
        raise InputError(data.dataset.root, problem, fix)


def _log_summary(data: PreparedData, noun: str) -> None:
    """Log the sizes of the split; `noun` is the word for its cases."""
    split = data.split
    volumes = data.volumes.values()
    if split.unused:
        count = len(split.train + split.unused)
        log.info("%d of %d training %s are left out by this protocol", len(split.unused), count, noun)
    if unlisted := len(volumes) - len(split.train + split.val + split.test + split.unused):
        log.info("not used, because the split does not list them: %s", plural(unlisted, "case"))
    if empty := [v.id for v in volumes if not any(v.class_voxels[1:])]:
        log.info("%s with an empty mask, used as all background: %s", plural(len(empty), "case"), ", ".join(empty))
    log.info(
        "%s: %d training, %d validation, %d test; slices along the %s axis, %d for training",
        noun, len(split.train), len(split.val), len(split.test),
        "/".join(sorted({v.slice_axis for v in volumes})), sum(v.shape[0] for v in data.select_volumes(split.train)),
    )  # fmt: skip
