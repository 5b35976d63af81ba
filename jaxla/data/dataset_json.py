"""`dataset.json` of the Medical Decathlon and of nnU-Net: classes, channels and the cases that it lists."""

import json
from pathlib import Path
from typing import Any

from jaxla.config import InputError, option
from jaxla.data.labels import Labels, make_labels
from jaxla.data.scan_files import scan_name

FILE = "dataset.json"


def read_dataset_json(root: Path) -> dict[str, Any]:
    """Return the content of a folder's `dataset.json`.

    Raises:
        InputError: the file is missing, or does not hold a JSON object.
    """
    try:
        content = json.loads((root / FILE).read_bytes())  # bytes: JSON detects UTF-16 and a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(root, str(error)) from error
    if not isinstance(content, dict):
        raise _unreadable(root, "not a JSON object")
    return content


def read_labels(root: Path) -> Labels:
    """Return the classes: Decathlon writes {"1": "LA"}, nnU-Net {"LA": 1}.

    Raises:
        InputError: the file cannot be read, or does not name classes with one mask value each.
    """
    labels = read_dataset_json(root).get("labels")
    if not isinstance(labels, dict):
        raise _unreadable(root, "no labels" if labels is None else "labels is not a JSON object")
    values: dict[str, tuple[int, ...]] = {}
    for key, content in labels.items():
        if isinstance(content, list) or "ignore" in (key, content):
            fix = f"Set {option('data.labels')}."
            raise InputError(root / FILE, "overlapping and ignored labels are not supported", fix)
        is_decathlon = _label_value(key) is not None and isinstance(content, str)
        name, value = (content, _label_value(key)) if is_decathlon else (key, _label_value(content))
        if value is None:
            raise _unreadable(root, f"the label {key!r} has the value {content!r}, not a non-negative integer")
        if not name.strip() or not name.isprintable():
            raise _unreadable(root, f"the label name {name!r} is empty or not printable")
        name = "background" if value == 0 else name
        if name in values:
            raise InputError(root / FILE, f"the label {name!r} occurs twice", _fix())
        values[name] = (value,)
    return make_labels(values, str(root / FILE), _fix())


def channel_names(root: Path) -> list[str]:
    """Return the names of the channels; empty if the file has none, or cannot be read."""
    try:
        content = read_dataset_json(root)
    except InputError:
        return []
    channels = content.get("channel_names", content.get("modality"))
    return [str(name) for name in channels.values()] if isinstance(channels, dict) else []


def channel_name(root: Path) -> str:
    """Return the name of the scans' one channel; empty if the file has none."""
    return next(iter(channel_names(root)), "")


def listed_cases(root: Path) -> tuple[list[str], int]:
    """Return the ids and the number of the training cases that the file lists; [] and 0 if it lists none."""
    try:
        content = read_dataset_json(root)
    except InputError:
        return [], 0
    training, count = content.get("training"), content.get("numTraining")
    files = [entry.get("image") for entry in training if isinstance(entry, dict)] if isinstance(training, list) else []
    names = [scan_name(Path(file)) for file in files if isinstance(file, str)]
    return names, len(names) or (_label_value(count) or 0)


def _label_value(content: object) -> int | None:
    """Return a non-negative integer, which may be stored as a string or float; None for anything else."""
    if isinstance(content, str) and content.isascii() and content.isdecimal() and len(content) < 10:
        return int(content)
    if isinstance(content, float) and content.is_integer():
        content = int(content)
    return content if type(content) is int and content >= 0 else None  # a bool is an int for isinstance


def _unreadable(root: Path, problem: str) -> InputError:
    return InputError(root / FILE, f"not readable as a data set description ({problem})", _fix())


def _fix() -> str:
    return f"Correct the file, or set {option('data.labels')}."
