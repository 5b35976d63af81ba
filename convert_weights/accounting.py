"""Identify a checkpoint's architecture, and require exactly its tensors, with the right shapes and dtypes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from convert_weights.architectures import RELEASED, Architecture, architecture_rows
from convert_weights.checkpoint import SHARD, Checkpoint
from convert_weights.huggingface import hub_name, hub_shapes, to_authors
from convert_weights.layout import Row
from convert_weights.tensors import Tensor, join_first
from jaxla.config import InputError
from jaxla.models.backbones import TRANSFORMERS

AUTHORS, HUGGING_FACE = "authors' layout", "Hugging Face's layout"

# A checkpoint resembles an architecture if less than this fraction of its tensors have faults.
MAX_FAULT_FRACTION = 0.1


class Comparison(NamedTuple):
    """A checkpoint compared with one architecture in one layout."""

    arch: str
    layout: str
    tensors: Mapping[str, Tensor]
    expected: Mapping[str, Row]

    def missing(self) -> list[str]:
        """Return the missing tensors; an optional tensor counts only if another one of its group is present."""
        groups = {_group(name) for name, row in self.expected.items() if row.optional and name in self.tensors}
        lacking = {name: row for name, row in self.expected.items() if name not in self.tensors}
        return [name for name, row in lacking.items() if not row.optional or _group(name) in groups]

    def unexpected(self) -> list[str]:
        return [name for name in self.tensors if name not in self.expected]

    def misshapen(self) -> list[str]:
        tensors = self.tensors
        return [name for name, row in self.expected.items() if name in tensors and tensors[name].shape != row.shape]

    def fault_count(self) -> int:
        return len(self.missing()) + len(self.unexpected()) + len(self.misshapen())

    def describe_faults(self) -> str:
        faults = []
        if names := self.missing():
            faults.append(f"{len(names)} of {len(self.expected)} tensors missing ({join_first(names)})")
        if names := self.unexpected():
            faults.append(f"{len(names)} unexpected ({join_first(names)})")
        if names := self.misshapen():
            shapes = (f"{name}: {self.tensors[name].shape}, expected {self.expected[name].shape}" for name in names)
            faults.append(f"{len(names)} with the wrong shape ({join_first(shapes)})")
        return ", ".join(faults)


def identify_tensors(checkpoint: Checkpoint, architecture: Architecture) -> tuple[dict[str, Tensor], str]:
    """Return an architecture's tensors by their authors' names, and the layout of the checkpoint.

    Raises:
        InputError: the checkpoint contains another architecture; tensors are missing, unexpected, or of the wrong shape
            or dtype; or copies of the same tensor differ.
    """
    arch, rows = architecture.name, architecture.rows
    comparisons = list(_compare_all(checkpoint))
    if arch not in RELEASED:
        comparisons.append(_compare_in_authors_layout(checkpoint, arch, rows))
    best = min(comparisons, key=Comparison.fault_count)
    requested = min((comparison for comparison in comparisons if comparison.arch == arch), key=Comparison.fault_count)
    if not requested.fault_count():
        _require_dtypes(checkpoint, requested)
        _require_equal_copies(checkpoint, rows)
        tensors = requested.tensors
        return dict(to_authors(rows, tensors) if requested.layout == HUGGING_FACE else tensors), requested.layout
    if not best.fault_count():
        problem = f"contains {best.arch} ({best.layout}), not {arch}"
        raise InputError(checkpoint.path, problem, f"Use --arch={best.arch}.")
    _require_no_prefix(checkpoint)
    _report_faults(checkpoint.path, requested, best)


def _report_faults(path: Path, requested: Comparison, best: Comparison) -> NoReturn:
    """Raise the InputError for a checkpoint that fits no architecture."""
    if SHARD.search(path.name):
        fix = "This is one of several shards. Pass the *.index.json that lists all of them"
    elif requested.arch not in RELEASED:
        fix = "Pass the plan and the configuration of the training run"
    else:
        fix = "Download the released file again"
    if best.fault_count() < min(requested.fault_count(), MAX_FAULT_FRACTION * len(best.expected)):
        problem = f"resembles {best.arch} ({best.layout}) more than {requested.arch}, but with {best.describe_faults()}"
        raise InputError(path, problem, f"{fix}, and use --arch={best.arch}.")
    problem = f"not {requested.arch}: {requested.describe_faults()}"
    raise InputError(path, problem, f"{fix}, or use the --arch of this file; --arch=list shows the names.")


def _require_no_prefix(checkpoint: Checkpoint) -> None:
    """Raise an InputError if the tensors fit an architecture after removing a common prefix, such as `backbone.`."""
    prefix = os.path.commonprefix(list(checkpoint.tensors))  # noqa: RUF071  (names, not paths)
    prefix = prefix[: prefix.rfind(".") + 1]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items()}
    best = min(_compare_all(checkpoint._replace(tensors=tensors)), key=Comparison.fault_count)
    if not best.fault_count():
        code = f"{{name.removeprefix({prefix!r}): tensor for name, tensor in state.items()}}"
        problem = f"contains {best.arch} ({best.layout}), but all names begin with {prefix!r}"
        raise InputError(checkpoint.path, problem, f"Save its state dict without this prefix: `{code}`.")


def _compare_all(checkpoint: Checkpoint) -> Iterator[Comparison]:
    """Compare a checkpoint with every released architecture in every layout."""
    hub_tensors = {hub_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    for arch in RELEASED:
        rows = architecture_rows(arch)
        yield _compare_in_authors_layout(checkpoint, arch, rows)
        if arch not in TRANSFORMERS or len(hub_tensors) < len(checkpoint.tensors):
            continue
        shapes = hub_shapes(rows, hub_tensors).items()
        expected = {name: Row(name, shape, "", optional=optional) for name, (shape, optional) in shapes}
        yield Comparison(arch, HUGGING_FACE, hub_tensors, expected)


def _compare_in_authors_layout(checkpoint: Checkpoint, arch: str, rows: Sequence[Row]) -> Comparison:
    return Comparison(arch, AUTHORS, checkpoint.tensors, {row.theirs: row for row in rows})


def _group(name: str) -> str:
    """Return the group of an optional tensor: its module, or one group for the batch counters of all modules."""
    module, _, kind = name.rpartition(".")
    return kind if kind == "num_batches_tracked" else module


def _require_dtypes(checkpoint: Checkpoint, comparison: Comparison) -> None:
    found = {name: comparison.tensors[name].dtype for name in comparison.expected if name in comparison.tensors}
    wrong = [
        f"{name}: {dtype}, expected {' or '.join(comparison.expected[name].dtypes)}"
        for name, dtype in found.items()
        if dtype not in comparison.expected[name].dtypes
    ]
    if wrong:
        problem = f"wrong dtype in {len(wrong)} of {len(found)} tensors ({join_first(wrong)})"
        fix = "Use the file as it was released: a rounded copy does not give the authors' numbers."
        raise InputError(checkpoint.path, problem, fix)


def _require_equal_copies(checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
    tensors = checkpoint.tensors
    for row in rows:
        is_copy = row.copy_of and row.theirs in tensors
        if is_copy and not np.array_equal(tensors[row.copy_of].read(), tensors[row.theirs].read()):
            problem = f"{row.copy_of} and {row.theirs} are copies of the same tensor, but differ"
            raise InputError(checkpoint.path, problem, "Copy the checkpoint again.")
