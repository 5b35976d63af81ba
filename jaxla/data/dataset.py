"""The data of a run: scans found, checked and prepared, and their patients divided."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jaxla.cli.terminal import plural, track
from jaxla.config import Data, Experiment, InputError, Preprocessing
from jaxla.data.cases import Dataset, find_cases
from jaxla.data.inputs import Canvas, smallest_extent
from jaxla.data.phantoms import cached_phantoms
from jaxla.data.prepared import PreparedVolume, prepare_cases
from jaxla.data.split import ALL_FOLDS, FOLDS, Split, make_split
from jaxla.distributed import is_first, local_items

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """A data set ready to train on."""

    dataset: Dataset
    volumes: Mapping[str, PreparedVolume]  # by case id
    split: Split
    fold: str = ""  # of cross-validation

    def for_fold(self, fold: str, protocol: Data) -> PreparedData:
        """Return the same data, split for one fold of cross-validation."""
        return replace(self, split=make_split([case.id for case in self.dataset.cases], protocol, fold), fold=fold)

    def of(self, ids: Iterable[str]) -> list[PreparedVolume]:
        return [self.volumes[name] for name in ids]

    @property
    def used(self) -> list[PreparedVolume]:
        """The volumes of the split's three parts."""
        return self.of(self.split.train + self.split.val + self.split.test)

    def canvas(self, preprocessing: Preprocessing) -> Canvas:
        """The square that slices are laid on before it is resized to the network's input."""
        if preprocessing.pad_to == "square":
            return Canvas(preprocessing.image_size)
        # of folds, whose networks are tested together, all must have one square
        ids = self.split.train + self.split.val if self.fold else self.split.train
        largest = smallest_extent((v.shape[1:], v.spacing[1:]) for v in self.of(ids))
        return Canvas(preprocessing.image_size, largest)

    @property
    def cases(self) -> dict[str, str]:
        """Case id -> a hash of its scan, its mask and the classes."""
        return {name: volume.content_key for name, volume in self.volumes.items()}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.cases).encode()).hexdigest()


def prepare_data(experiment: Experiment, cache_dir: Path) -> PreparedData:
    """Find, check and prepare the cases, and split their patients.

    Raises:
        InputError: no data, unusable data, too few patients, or a class that no training mask has.
    """
    protocol = experiment.data
    if protocol.root == "phantom":
        # too few? before making them
        make_split([f"train_{n + 1}" for n in range(protocol.phantom_cases)], protocol, experiment.fold)
    root = data_folder(protocol, cache_dir)
    dataset = find_cases(root, protocol.all_labels)
    split = make_split([case.id for case in dataset.cases], protocol, experiment.fold)
    prepared = prepare_cases(dataset, cache_dir, lambda cases: track(cases, "reading"), local_items(dataset.cases))
    data = PreparedData(dataset, {volume.id: volume for volume in prepared}, split, fold=experiment.fold)
    if experiment.fold == ALL_FOLDS:
        for k in range(FOLDS):
            of_fold = make_split([case.id for case in dataset.cases], protocol, str(k))
            require_classes(replace(data, split=of_fold, fold=str(k)), protocol)
    else:
        require_classes(data, protocol)
    training = data.of(split.train)
    if split.unused:
        log.info(
            "%d of %d training patients are left out by this protocol",
            len(split.unused),
            len(split.train + split.unused),
        )
    if outside := len(prepared) - sum(map(len, (split.train, split.val, split.test, split.unused))):
        log.info("%d cases are in no part of this split and are not used", outside)
    if empty := [v.id for v in prepared if not any(v.class_voxels[1:])]:
        log.info("%d cases have an empty mask and are kept: %s", len(empty), ", ".join(empty))
    log.info(
        "patients: %d training, %d validation, %d test; slices along the %s axis, %d for training",
        len(split.train), len(split.val), len(split.test),
        "/".join(sorted({v.slice_axis for v in prepared})), sum(v.shape[0] for v in training),
    )  # fmt: skip
    return data


def data_folder(protocol: Data, cache_dir: Path, elsewhere: str = "") -> Path:
    """Where the scans of a protocol lie, phantoms made where there are none; `elsewhere` if they were moved there."""
    root = elsewhere or protocol.root
    return (
        cached_phantoms(cache_dir, protocol.phantom_size, protocol.phantom_cases) if root == "phantom" else Path(root)
    )


def require_classes(data: PreparedData, protocol: Data) -> None:
    """Raise an InputError unless each class is in some training mask."""
    training = data.of(data.split.train)
    for index, name in enumerate(data.dataset.labels.names, start=1):
        if any(v.class_voxels[index] for v in training):
            continue
        if data.fold and any(v.class_voxels[index] for v in data.of(data.split.val)):
            raise InputError(
                f"option --fold: in fold {data.fold} the masks of all {len(training)} training patients hold no "
                f"{name}, for those that do validate; add cases with {name}, or leave --fold out"
            )
        if any(v.class_voxels[index] for v in data.of(data.split.unused)):
            raise InputError(
                f"{data.dataset.root}: the masks of the training patients that this protocol takes "
                f"({', '.join(data.split.train)}) hold no {name}; take others with another --data.subset_seed (now "
                f"{protocol.subset_seed}; of a study --seeds), or more of them"
            )
        raise InputError(
            f"{data.dataset.root}: the masks of all {len(training)} training patients hold no {name}; check the masks, "
            "or name their values with --data.labels"
        )


def say_what_is_cut(data: PreparedData, canvas: Canvas) -> None:
    cut = [v.id for v in data.used if canvas.frame(v.shape[1:], v.spacing[1:]).cuts]
    if cut and is_first():
        log.warning(
            "%s with slices larger than the largest training slice (%.0f mm): the network sees their centre, the rest "
            "is background: %s", plural(len(cut), "validation or test case"), canvas.extent, ", ".join(cut),
        )  # fmt: skip
