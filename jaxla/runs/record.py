"""The record of what was run, `experiment.json`, and in what two records differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxla.cli.files import write_atomically
from jaxla.config import Experiment, InputError, experiment_from_json
from jaxla.data.inputs import Canvas
from jaxla.data.labels import Labels
from jaxla.experiments import METHODS

RECORD = "experiment.json"
VERSION = 4
FEATURES_KEPT = "The frozen backbone's features were computed once per slice"  # how such a record's `features` begins
NOT_COMPARED = {"summary", "data.root", "data.split", "model.weights", "model.plan"}  # of files the content is compared
NO_FILE = {"model.weights": "random", "model.plan": ""}  # a value that is none


@dataclass(frozen=True)
class Record:
    """What a run folder says of itself in `experiment.json`.

    Attributes:
        experiment: with every option resolved.
        labels: classes of the data set.
        weights: the backbone's origin: `random`, or the file's path.
        weights_sha256: of that file's data; of a random backbone that stays frozen, of its parameters; else empty.
        split_sha256: of the case ids in `split.json`.
        data_sha256: of the scans and masks of all cases.
        command: that started the run.
        begun: when, in local time, ISO 8601.
        environment: package versions, device and platform.
        resumed: when, where and by what command it was gone on with, each time.
        features: a sentence on how the backbone was run: in every epoch, or once per slice.
        extent: mm a side of the square that slices are laid on; 0 where each has its own.
    """

    experiment: Experiment
    labels: Labels
    weights: str
    weights_sha256: str
    split_sha256: str
    data_sha256: str
    command: str
    begun: str
    environment: dict[str, Any]
    resumed: tuple[dict[str, Any], ...] = ()
    features: str = ""
    extent: float = 0.0

    @property
    def canvas(self) -> Canvas:
        """The square that slices are laid on before it is resized to the network's input."""
        return Canvas(self.experiment.preprocessing.image_size, self.extent)


def method_label(experiment: Experiment) -> str:
    """Its method's name, and beside it an architecture that is not its own: `dinov2_vitb14 with dinov3_vitb16`."""
    method, arch = METHODS.get(experiment.method), experiment.model.arch
    foreign = method is not None and method.model.arch != arch
    return f"{experiment.method} with {arch}" if foreign else experiment.method


def describe_backbone(experiment: Experiment) -> str:
    """The network in words, its backbone's origin, and whether it is trained: for whoever reads a result."""
    model = experiment.model
    origin = "random weights" if model.weights == "random" else Path(model.weights).name
    name = method_label(experiment)
    if name == experiment.method != model.arch:
        name += f" on {model.arch}"
    return f"{name} ({origin}, {'frozen' if model.backbone == 'frozen' else 'trained'})"


def write_record(folder: Path, record: Record) -> None:
    labels = asdict(record.labels)
    content = {
        **vars(record),
        "version": VERSION,
        "experiment": asdict(record.experiment),
        "labels": labels,
    }
    write_atomically(folder / RECORD, json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> Record:
    """What a run folder says of itself.

    Raises:
        InputError: `folder` holds no run, or one of a newer version.
    """
    try:
        content: dict[str, Any] = json.loads((folder / RECORD).read_text())
        version = content.pop("version")
        if version > VERSION:
            raise InputError(f"{folder}: written by a newer version of this package; update the one installed")
        if version < VERSION:
            raise InputError(f"{folder}: written by an earlier version of this package, which this one cannot read")
        for key in ("device", "versions"):
            content["environment"][key]
        return Record(
            **{
                **content,
                "experiment": experiment_from_json(content["experiment"]),
                "labels": _labels_from_json(content["labels"]),
                "resumed": tuple(content["resumed"]),
            }
        )
    except OSError as error:
        raise InputError(f"{folder}: not a run folder (no {RECORD}); give the folder that training wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / RECORD}: damaged ({error!r})") from error


def _labels_from_json(content: Mapping[str, Any]) -> Labels:
    values = content["values"]
    return Labels(
        names=tuple(content["names"]),
        values=None if values is None else tuple(tuple(group) for group in values),
        ignored=None if content["ignored"] is None else tuple(content["ignored"]),
        one_value=content["one_value"],
    )


def by_option(options: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """What `dataclasses.asdict` makes of an experiment, under the dotted names that the command line takes."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        found |= by_option(value, f"{within}{key}.") if isinstance(value, Mapping) else {within + key: value}
    return found


def options_of(experiment: Experiment) -> dict[str, str]:
    """Every option that must be the same wherever the run goes on, by its dotted name."""
    compared = {
        name: shown(v) for name, v in by_option(asdict(experiment)).items() if name not in NOT_COMPARED | {"name"}
    }
    return {"exp": experiment.name} | compared


def differences(now: Any, then: Any, within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The options in which two experiments, or the same part of both, differ: dotted name, and the value of each."""
    before = by_option(asdict(then), within)
    for option, a in by_option(asdict(now), within).items():
        b = before[option]
        if a != b and (option not in NOT_COMPARED or NO_FILE.get(option) in (a, b)):
            yield "exp" if option == "name" else option, a, b


def shown(value: Any) -> str:
    """An option's value for people; a list as the command line takes it."""
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple | list) else str(value) or "not given"


def changed_case(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What became of the first case whose hash is not what it was, in words; empty where all are the same."""
    for name in sorted(set(then) | set(now)):
        if then.get(name) != now.get(name):
            what = "new" if name not in then else "gone" if name not in now else "another scan or mask"
            return f"case {name} is {what}"
    return ""
