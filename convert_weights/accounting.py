"""Which architecture a checkpoint holds, and whether it is all there: no tensor lacking, extra or of another kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from convert_weights.architectures import RELEASED, Architecture, rows_of
from convert_weights.checkpoint import SHARD, Checkpoint, Tensor, some
from convert_weights.huggingface import as_authors, hub_name, hub_shapes
from convert_weights.layout import Row
from jaxla.config import InputError
from jaxla.models.backbones import TRANSFORMERS

AUTHORS, HUGGING_FACE = "authors' layout", "Hugging Face's layout"

# A checkpoint that differs by more from each architecture, as a share of its parameters, looks like none.
FAMILIAR = 0.1


class Expected(NamedTuple):
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    optional: bool


class Reading(NamedTuple):
    """A checkpoint taken for one architecture in one layout."""

    arch: str
    layout: str
    tensors: Mapping[str, Tensor]
    expected: Mapping[str, Expected]

    def lacking(self) -> list[str]:
        """A tensor that may be lacking is lacking where others of its group are there."""
        groups = {_group(name) for name, of_name in self.expected.items() if of_name.optional and name in self.tensors}
        return [
            name
            for name, of_name in self.expected.items()
            if name not in self.tensors and (not of_name.optional or _group(name) in groups)
        ]

    def extra(self) -> list[str]:
        return [name for name in self.tensors if name not in self.expected]

    def misshapen(self) -> list[str]:
        shared = [name for name in self.expected if name in self.tensors]
        return [name for name in shared if self.tensors[name].shape != self.expected[name].shape]

    def faults(self) -> int:
        return len(self.lacking()) + len(self.extra()) + len(self.misshapen())


def account_for(checkpoint: Checkpoint, architecture: Architecture) -> tuple[dict[str, Tensor], str]:
    """The tensors of an architecture's checkpoint by their authors' names, and the layout in which the file has them.

    Raises:
        InputError: it holds another architecture, or tensors are lacking, extra, of another shape or dtype, or differ
            from their copies.
    """
    arch, rows = architecture.name, architecture.rows
    readings = list(_readings(checkpoint))
    if arch not in RELEASED:
        readings.append(_as_authors_have_it(checkpoint, arch, rows))
    best = min(readings, key=Reading.faults)
    asked = min((reading for reading in readings if reading.arch == arch), key=Reading.faults)
    if not asked.faults():
        _require_dtypes(checkpoint, asked)
        _require_equal_copies(checkpoint, rows)
        of_authors = as_authors(rows, asked.tensors) if asked.layout == HUGGING_FACE else asked.tensors
        return dict(of_authors), asked.layout
    if not best.faults():
        raise InputError(f"{checkpoint.path}: holds {best.arch} ({best.layout}), not {arch}; pass --arch={best.arch}")
    _require_no_prefix(checkpoint)
    if SHARD.search(checkpoint.path.name):
        mend = "it is one of several shards: give the *.index.json that names them all"
    elif arch not in RELEASED:
        mend = "give the plan and the configuration that it was trained with"
    else:
        mend = "download the released file again"
    if best.faults() < asked.faults() and best.faults() < FAMILIAR * len(best.expected):
        raise InputError(
            f"{checkpoint.path}: looks like {best.arch} ({best.layout}), not {arch}; but of {best.arch} too it "
            f"{_describe(best)}; {mend}, and pass --arch={best.arch}"
        )
    raise InputError(
        f"{checkpoint.path}: not {arch}: it {_describe(asked)}; {mend}, or pass the --arch that it holds; --arch=list "
        "names them"
    )


def _require_no_prefix(checkpoint: Checkpoint) -> None:
    """Raise an InputError if only what all names begin with, as `backbone.`, keeps the tensors from fitting."""
    first = next(iter(checkpoint.tensors), "")
    starts = [first[: i + 1] for i, letter in enumerate(first) if letter == "."]
    prefix = max((start for start in starts if all(name.startswith(start) for name in checkpoint.tensors)), default="")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items()}
    best = min(_readings(checkpoint._replace(tensors=tensors)), key=Reading.faults)
    if not best.faults():
        raise InputError(
            f"{checkpoint.path}: holds {best.arch} ({best.layout}), but all names begin with {prefix!r}; save its "
            f"state dict without that: {{name.removeprefix({prefix!r}): tensor for name, tensor in state.items()}}"
        )


def _readings(checkpoint: Checkpoint) -> Iterator[Reading]:
    by_hub_name = {hub_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    for arch in RELEASED:
        rows = rows_of(arch)
        yield _as_authors_have_it(checkpoint, arch, rows)
        if arch not in TRANSFORMERS or len(by_hub_name) < len(checkpoint.tensors):
            continue
        shapes = hub_shapes(rows, by_hub_name)
        expected = {name: Expected(shape, ("float32",), optional) for name, (shape, optional) in shapes.items()}
        yield Reading(arch, HUGGING_FACE, by_hub_name, expected)


def _as_authors_have_it(checkpoint: Checkpoint, arch: str, rows: Sequence[Row]) -> Reading:
    """A checkpoint taken for an architecture in its authors' layout."""
    expected = {row.theirs: Expected(row.shape, row.dtypes, row.optional) for row in rows}
    return Reading(arch, AUTHORS, checkpoint.tensors, expected)


def _group(name: str) -> str:
    """Of tensors that may be lacking: those of one module come together, and so do the batch counters of all."""
    module, _, kind = name.rpartition(".")
    return kind if kind == "num_batches_tracked" else module


def _describe(reading: Reading) -> str:
    said = []
    if names := reading.lacking():
        said.append(f"lacks {len(names)} of its {len(reading.expected)} tensors ({some(names)})")
    if names := reading.extra():
        said.append(f"has {len(names)} too many ({some(names)})")
    if names := reading.misshapen():
        shapes = (f"{name}: {reading.tensors[name].shape}, expected {reading.expected[name].shape}" for name in names)
        said.append(f"has {len(names)} of another shape ({some(shapes)})")
    return ", ".join(said)


def _require_dtypes(checkpoint: Checkpoint, reading: Reading) -> None:
    held = {name: reading.tensors[name].dtype for name in reading.expected if name in reading.tensors}
    wrong = [
        f"{name}: {dtype}, expected {' or '.join(reading.expected[name].dtypes)}"
        for name, dtype in held.items()
        if dtype not in reading.expected[name].dtypes
    ]
    if wrong:
        raise InputError(
            f"{checkpoint.path}: {len(wrong)} of its {len(held)} tensors are of another dtype ({some(wrong)}); a copy "
            "in it would not give the authors' numbers: take the file as it was released"
        )


def _require_equal_copies(checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
    tensors = checkpoint.tensors
    for row in rows:
        if not row.copy_of or row.theirs not in tensors:
            continue
        if not np.array_equal(tensors[row.copy_of].read(), tensors[row.theirs].read()):
            raise InputError(
                f"{checkpoint.path}: {row.copy_of} and {row.theirs} are one module's and differ; copy the checkpoint "
                "again"
            )
