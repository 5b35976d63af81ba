"""The record of a run, `experiment.json`, and how two records differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_type_hints

import msgspec

from jaxla.cli.files import write_atomically
from jaxla.cli.json_files import RESTORE, check_types, describe_damage, read_json
from jaxla.config import METHOD_GROUPS, Data, Experiment, InputError, Method, option_groups, option_values
from jaxla.data.labels import Labels

RECORD = "experiment.json"
VERSION = 5
# For these options, the content of the files and the split are compared instead.
NOT_COMPARED = {
    "data.root", "data.image", "data.mask", "data.patients", "data.split", "model.weights", "model.plan"
}  # fmt: skip
NO_FILE = {"model.weights": "random", "model.plan": ""}  # values that name no file


@dataclass(frozen=True)
class Record:
    """The record of a run, as its folder stores it."""

    experiment: Experiment  # with every option resolved
    label: str  # the method's name, and the architecture if it is not the method's own
    network: str  # description of the network: label, origin of its weights, and whether they are trained
    input: str  # description of one input of the network
    unit: str  # description of what validation averages Dice over
    labels: Labels  # classes of the data set
    weights: str  # origin of the backbone: `random`, or the file's path
    weights_sha256: str  # hash of that file's data; "" for random weights
    split_sha256: str  # hash of the case ids in `split.json`
    data_sha256: str  # hash of the scans and masks of all cases
    command: str  # command that started the run
    begun: str  # local time of the start, ISO 8601
    environment: dict[str, Any]  # package versions, device and platform
    backbone_sha256: str = ""  # hash of the parameters of a random backbone that stays frozen; else ""
    resumed: tuple[dict[str, Any], ...] = ()  # time, environment and command of each time the run was resumed
    features: str = ""  # a sentence on how often the backbone ran: in every epoch, or once per slice
    features_cached: bool = False  # whether it ran once per slice
    fitted_epochs: int = 0  # epochs that fit into training.minutes; 0 without that option
    fitted_steps: int = 0  # steps of each of these epochs
    extent: float = 0.0  # side in mm of the square to which all slices are padded; 0 if each has its own square


class _Environment(TypedDict):
    versions: dict[str, str]
    device: str
    python: NotRequired[str]
    platform: NotRequired[str]
    processor: NotRequired[str]
    devices: NotRequired[int]
    processes: NotRequired[int]
    settings: NotRequired[dict[str, str]]


class _Session(TypedDict):
    begun: NotRequired[str]
    environment: NotRequired[_Environment]
    command: NotRequired[str]


class _Data(TypedDict):
    root: str


class _Training(TypedDict):
    epochs: int
    minutes: float
    checkpoint: str


class _Experiment(TypedDict):
    """The options that are read without importing the networks; `experiment_from_json` checks all of them."""

    name: str
    summary: str
    method: str
    seed: int
    fold: str
    data: _Data
    model: dict[str, Any]
    training: _Training


def _record_type() -> Any:
    """Return the type of the content of `experiment.json`: a TypedDict with the fields of `Record`."""
    hints = get_type_hints(Record)
    keys = {f.name: hints[f.name] if f.default is MISSING else NotRequired[hints[f.name]] for f in fields(Record)}
    parts = {"experiment": _Experiment, "environment": _Environment, "resumed": list[_Session]}
    return TypedDict("RecordContent", {"version": int, **keys, **parts})


def method_label(experiment: Experiment, methods: Mapping[str, Method]) -> str:
    """Return the method's name, and an architecture that is not its own: `dinov2_vitb14 with dinov3_vitb16`."""
    name, arch = experiment.method.name, experiment.method.model.arch
    return name if methods[name].model.arch == arch else f"{name} with {arch}"


def describe_network(experiment: Experiment, methods: Mapping[str, Method]) -> str:
    """Return the network in words: its label, the origin of its weights, and whether they are trained."""
    method = experiment.method
    model = experiment.method.model
    label = method_label(experiment, methods)
    if label == method.name != model.arch and "arch" in asdict(model):  # a network on a backbone
        label += f" on {model.arch}"
    origin = "random weights" if model.weights == "random" else Path(model.weights).name
    return f"{label} ({origin}, {'frozen' if model.backbone == 'frozen' else 'trained'})"


def write_record(folder: Path, record: Record) -> None:
    """Write `experiment.json`. Raises OSError if that is not possible."""
    content = {
        **vars(record),
        "version": VERSION,
        "experiment": experiment_to_json(record.experiment),
        "labels": asdict(record.labels),
    }
    write_atomically(folder / RECORD, json.dumps(content, indent=1) + "\n")


def read_record_json(folder: Path) -> dict[str, Any]:
    """Return the content of `experiment.json`, without importing the networks.

    Raises:
        InputError: `folder` holds no run, a damaged record, or a record of another version.
    """
    path = folder / RECORD
    try:
        content = read_json(path, dict[str, Any])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(folder, f"not a run folder (no {RECORD})", "Pass the folder that training wrote.") from error
    version = check_types(content.get("version"), int, path)
    if version > VERSION:
        raise InputError(folder, "written by a newer version of jaxla", "Update jaxla.")
    if version < VERSION:
        raise InputError(folder, "written by an earlier version of jaxla", "Use that version, or train again.")
    check_types(content, _record_type(), path)
    return content


def read_record(folder: Path) -> Record:
    """Return the record of a run; raises as `read_record_json`, and if the method is unknown."""
    from jaxla.experiments import METHODS  # imports the networks, and with them JAX

    content = read_record_json(folder)
    del content["version"]
    try:
        experiment = experiment_from_json(content["experiment"], METHODS)
        labels = labels_from_json(content["labels"])
        resumed = tuple(content.get("resumed", ()))
        return Record(**{**content, "experiment": experiment, "labels": labels, "resumed": resumed})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(folder / RECORD, f"damaged: {describe_damage(error)}", RESTORE) from error


def labels_from_json(content: Mapping[str, Any]) -> Labels:
    """Return the labels in a record; raise a ValueError if they do not name a class for each group of values."""
    labels = msgspec.convert(content, Labels)
    if not labels.names or (labels.values is not None and len(labels.values) != len(labels.names)):
        raise ValueError(f"{len(labels.names)} classes have {len(labels.values or ())} groups of mask values")
    return labels


def comparable_options(experiment: Experiment) -> dict[str, str]:
    """Return the options, by dotted name, that must be the same wherever a run is trained."""
    values = _all_options(experiment).items()
    return {name: format_value(value) for name, value in values if name not in NOT_COMPARED}


def _all_options(experiment: Experiment) -> dict[str, Any]:
    return {"exp": experiment.name, "method": experiment.method.name} | option_values(experiment)


def differences(current: Experiment, earlier: Experiment) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options in which two experiments differ: dotted name, current value, earlier value."""
    earlier_options = _all_options(earlier)
    for name, value in _all_options(current).items():
        earlier_value = earlier_options.get(name)
        if value != earlier_value and (name not in NOT_COMPARED or NO_FILE.get(name) in (value, earlier_value)):
            yield name, value, earlier_value


def format_value(value: Any) -> str:
    """Return an option's value as the command line takes it."""
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(str, value)) + "]"
    return "not given" if value in ("", None) else str(value)


def changed_case(earlier: Mapping[str, str], current: Mapping[str, str]) -> str:
    """Describe the first case whose hash has changed; "" if all are the same."""
    for name in sorted(set(earlier) | set(current)):
        if earlier.get(name) != current.get(name):
            is_known, is_present = name in earlier, name in current
            change = "new" if not is_known else "a different scan or mask" if is_present else "missing"
            return f"case {name} is {change}"
    return ""


def experiment_to_json(experiment: Experiment) -> dict[str, Any]:
    """Return an experiment as `experiment.json` stores it: with the same groups of options as the command line."""
    about = {"name": experiment.name, "summary": experiment.summary, "method": experiment.method.name}
    groups = {name: asdict(group) for name, group in option_groups(experiment).items()}
    return about | {"seed": experiment.seed, "fold": experiment.fold} | groups


def experiment_from_json(content: Mapping[str, Any], methods: Mapping[str, Method]) -> Experiment:
    """Return the experiment that `experiment_to_json` wrote; `methods` are all methods by name.

    Raises:
        KeyError, TypeError: the method is unknown, a group of options is missing, or an option is unknown.
        ValueError: an option's value has a different type.
    """

    def read(group: Any, values: Mapping[str, Any]) -> Any:
        if unknown := set(values) - {option.name for option in fields(group)}:
            raise KeyError(min(unknown))
        return msgspec.convert(values, type(group))

    own = methods[content["method"]]
    if surplus := {name for name in METHOD_GROUPS if getattr(own, name) is None} & set(content):
        raise KeyError(min(surplus))
    groups = {name: read(getattr(own, name), content[name]) for name in METHOD_GROUPS if getattr(own, name) is not None}
    about = {key: content[key] for key in ("name", "summary", "seed", "fold")}
    return Experiment(**about, data=read(Data(), content["data"]), method=replace(own, **groups))
