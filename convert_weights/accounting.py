"""Identify a checkpoint's architecture, and require exactly its tensors, with the right shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from convert_weights.architectures import RELEASED, Architecture, architecture_rows
from convert_weights.checkpoint import SHARD, Checkpoint
from convert_weights.huggingface import hub_name, hub_shapes, to_authors
from convert_weights.layout import Row
from convert_weights.tensors import Tensor, summarize
from jaxla.config import InputError
from jaxla.models.backbones import TRANSFORMERS

AUTHORS, HUGGING_FACE = "authors' layout", "Hugging Face's layout"

# A checkpoint resembles an architecture if faults concern less than this fraction of its tensors.
MAX_FAULT_FRACTION = 0.1


class Expected(NamedTuple):
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool


class Reading(NamedTuple):
    """A checkpoint compared with one architecture in one layout."""

    arch: str
    layout: str
    tensors: Mapping[str, Tensor]
    expected: Mapping[str, Expected]

    def missing(self) -> list[str]:
        """Return the missing tensors; an optional one counts only if another of its group is present."""
        groups = {_group(name) for name, tensor in self.expected.items() if tensor.optional and name in self.tensors}
        return [
            name
            for name, tensor in self.expected.items()
            if name not in self.tensors and (not tensor.optional or _group(name) in groups)
        ]

    def unexpected(self) -> list[str]:
        return [name for name in self.tensors if name not in self.expected]

    def misshapen(self) -> list[str]:
        common = [name for name in self.expected if name in self.tensors]
        return [name for name in common if self.tensors[name].shape != self.expected[name].shape]

    def fault_count(self) -> int:
        return len(self.missing()) + len(self.unexpected()) + len(self.misshapen())

    def describe_faults(self) -> str:
        faults = []
        if names := self.missing():
            faults.append(f"{len(names)} of {len(self.expected)} tensors missing ({summarize(names)})")
        if names := self.unexpected():
            faults.append(f"{len(names)} unexpected ({summarize(names)})")
        if names := self.misshapen():
            shapes = (f"{name}: {self.tensors[name].shape}, expected {self.expected[name].shape}" for name in names)
            faults.append(f"{len(names)} with the wrong shape ({summarize(shapes)})")
        return ", ".join(faults)


def account_for(checkpoint: Checkpoint, architecture: Architecture) -> tuple[dict[str, Tensor], str]:
    """Return an architecture's tensors by their authors' names, and the layout of the checkpoint.

    Raises:
        InputError: the checkpoint holds another architecture; tensors are missing, unexpected, or of the wrong shape or
            dtype; or copies of one tensor differ.
    """
    arch, rows = architecture.name, architecture.rows
    readings = list(_readings(checkpoint))
    if arch not in RELEASED:
        readings.append(_authors_reading(checkpoint, arch, rows))
    best = min(readings, key=Reading.fault_count)
    requested = min((reading for reading in readings if reading.arch == arch), key=Reading.fault_count)
    if not requested.fault_count():
        _require_dtypes(checkpoint, requested)
        _require_equal_copies(checkpoint, rows)
        tensors = requested.tensors
        return dict(to_authors(rows, tensors) if requested.layout == HUGGING_FACE else tensors), requested.layout
    if not best.fault_count():
        raise InputError(
            checkpoint.path, f"contains {best.arch} ({best.layout}), not {arch}", f"Use --arch={best.arch}."
        )
    _require_no_prefix(checkpoint)
    _report_faults(checkpoint.path, requested, best)


def _report_faults(path: Path, requested: Reading, best: Reading) -> NoReturn:
    """Raise the InputError for a checkpoint that fits no architecture."""
    if SHARD.search(path.name):
        fix = "This is one of several shards. Give the *.index.json that lists them all"
    elif requested.arch not in RELEASED:
        fix = "Give the plan and the configuration of the training run"
    else:
        fix = "Download the released file again"
    if best.fault_count() < min(requested.fault_count(), MAX_FAULT_FRACTION * len(best.expected)):
        raise InputError(
            path,
            f"resembles {best.arch} ({best.layout}) more than {requested.arch}, but with {best.describe_faults()}",
            f"{fix}, and use --arch={best.arch}.",
        )
    raise InputError(
        path,
        f"not {requested.arch}: {requested.describe_faults()}",
        f"{fix}, or use the --arch of this file; --arch=list shows the names.",
    )


def _require_no_prefix(checkpoint: Checkpoint) -> None:
    """Raise an InputError if the tensors would fit an architecture without a common prefix, such as `backbone.`."""
    first = next(iter(checkpoint.tensors), "")
    candidates = [first[: i + 1] for i, letter in enumerate(first) if letter == "."]
    common = [prefix for prefix in candidates if all(name.startswith(prefix) for name in checkpoint.tensors)]
    prefix = max(common, default="")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items()}
    best = min(_readings(checkpoint._replace(tensors=tensors)), key=Reading.fault_count)
    if not best.fault_count():
        raise InputError(
            checkpoint.path,
            f"contains {best.arch} ({best.layout}), but all names begin with {prefix!r}",
            "Save its state dict without this prefix: "
            f"`{{name.removeprefix({prefix!r}): tensor for name, tensor in state.items()}}`.",
        )


def _readings(checkpoint: Checkpoint) -> Iterator[Reading]:
    """Compare a checkpoint with every released architecture in every layout."""
    hub_tensors = {hub_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    for arch in RELEASED:
        rows = architecture_rows(arch)
        yield _authors_reading(checkpoint, arch, rows)
        if arch not in TRANSFORMERS or len(hub_tensors) < len(checkpoint.tensors):
            continue
        shapes = hub_shapes(rows, hub_tensors)
        expected = {name: Expected(shape, ("float32",), optional) for name, (shape, optional) in shapes.items()}
        yield Reading(arch, HUGGING_FACE, hub_tensors, expected)


def _authors_reading(checkpoint: Checkpoint, arch: str, rows: Sequence[Row]) -> Reading:
    expected = {row.theirs: Expected(row.shape, row.dtypes, row.optional) for row in rows}
    return Reading(arch, AUTHORS, checkpoint.tensors, expected)


def _group(name: str) -> str:
    """Return the group of an optional tensor: its module, or one group for the batch counters of all modules."""
    module, _, kind = name.rpartition(".")
    return kind if kind == "num_batches_tracked" else module


def _require_dtypes(checkpoint: Checkpoint, reading: Reading) -> None:
    found = {name: reading.tensors[name].dtype for name in reading.expected if name in reading.tensors}
    wrong = [
        f"{name}: {dtype}, expected {' or '.join(reading.expected[name].dtypes)}"
        for name, dtype in found.items()
        if dtype not in reading.expected[name].dtypes
    ]
    if wrong:
        raise InputError(
            checkpoint.path,
            f"wrong dtype in {len(wrong)} of {len(found)} tensors ({summarize(wrong)})",
            "Use the file as it was released: a rounded copy does not give the authors' numbers.",
        )


def _require_equal_copies(checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
    tensors = checkpoint.tensors
    for row in rows:
        if not row.copy_of or row.theirs not in tensors:
            continue
        if not np.array_equal(tensors[row.copy_of].read(), tensors[row.theirs].read()):
            raise InputError(
                checkpoint.path,
                f"{row.copy_of} and {row.theirs} are copies of one tensor, but differ",
                "Copy the checkpoint again.",
            )
