"""The folder of a run: who may write it, and the record of what was run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxla.config import Experiment, InputError, experiment_from_json, experiment_to_json, require_writable
from jaxla.data.cases import Labels

RECORD = "experiment.json"
LOG = "train.log"
VERSION = 1
PACKAGES = (
    "jaxla",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "nibabel",
    "pillow",
)


@dataclass(frozen=True)
class Record:
    """What a run folder says of itself in `experiment.json`.

    Attributes:
        experiment: with every option resolved.
        labels: classes of the data set.
        weights: the backbone's origin: `random`, or the file's path.
        weights_sha256: of that file; empty for random weights.
        split_sha256: of the case ids in `split.json`.
        command: that started the run.
        environment: package versions, device and platform.
    """

    experiment: Experiment
    labels: Labels
    weights: str
    weights_sha256: str
    split_sha256: str
    command: str
    environment: dict[str, Any]


def require_free(folder: Path) -> None:
    """Check, leaving nothing behind, that a run can be written there.

    Raises:
        InputError: it holds a run or other files, or cannot be written.
    """
    if (folder / RECORD).exists():
        raise InputError(f"--run-dir={folder}: already holds a run; choose another folder or remove this one")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--run-dir={folder}: is not empty; choose another folder")
    require_writable("--run-dir", folder)


def create_run_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).touch(exist_ok=False)  # of two runs started at once, one gets it
    except FileExistsError as error:
        raise InputError(f"--run-dir={folder}: another run was started there just now; choose another") from error
    except OSError as error:
        raise InputError(f"--run-dir={folder}: cannot be written ({error.strerror}); choose another folder") from error


def environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
    }


def write_record(folder: Path, record: Record) -> None:
    labels = asdict(record.labels)
    content = {
        **vars(record),
        "version": VERSION,
        "experiment": experiment_to_json(record.experiment),
        "labels": labels,
    }
    beside = folder / f".{RECORD}"
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(folder / RECORD)


def read_record(folder: Path) -> Record:
    """What a run folder says of itself.

    Raises:
        InputError: `folder` holds no run, or one of a newer version.
    """
    try:
        content: dict[str, Any] = json.loads((folder / RECORD).read_text())
        if content.pop("version") > VERSION:
            raise InputError(f"{folder}: written by a newer version of this package; update it")
        return Record(
            **{
                **content,
                "experiment": experiment_from_json(content["experiment"]),
                "labels": _labels_from_json(content["labels"]),
            }
        )
    except OSError as error:
        raise InputError(f"{folder}: not a run folder (no {RECORD}); give the folder that training wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / RECORD}: damaged ({error!r})") from error


def _labels_from_json(content: Mapping[str, Any]) -> Labels:
    values = content["values"]
    return Labels(
        names=tuple(content["names"]),
        values=None if values is None else tuple(tuple(group) for group in values),
        ignored=tuple(content["ignored"]),
        one_value=content["one_value"],
    )
