"""Where each of the authors' tensors stands among this package's parameters: rows of a table, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from types import EllipsisType
from typing import NamedTuple

import numpy as np

from convert_weights.checkpoint import Tensor
from jaxla.models.weights_format import UNUSED, Streamed

Index = EllipsisType | tuple


class Row(NamedTuple):
    """One of the authors' tensors, or a part of one, and the place of its numbers among ours.

    Attributes:
        theirs: name of the authors' tensor.
        shape: its shape.
        ours: name of our parameter.
        axes: the order in which our place runs through the axes of their part; empty is their own order.
        part: of their tensor.
        place: in our parameter, or in one block of it.
        block: which block of a parameter that stacks all blocks along its first axis; None where it stacks none.
        dtypes: in which their tensor may come.
        optional: whether a checkpoint may lack it, with all others of its group (`accounting`).
        copy_of: name of the tensor that is saved here once more; its numbers must be equal.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: str
    axes: tuple[int, ...] = ()
    part: Index = ...
    place: Index = ...
    block: int | None = None
    dtypes: tuple[str, ...] = ("float32",)
    optional: bool = False
    copy_of: str = ""


# --- rows that families share ----------------------------------------------------------------------------------------


def linear(theirs: str, ours: str, inputs: int, outputs: int, place: Index = ...) -> list[Row]:
    """PyTorch's kernel is [out, in], Flax's [in, out]."""
    return [
        Row(f"{theirs}.weight", (outputs, inputs), f"{ours}.kernel", (1, 0), place=place),
        Row(f"{theirs}.bias", (outputs,), f"{ours}.bias", place=place),
    ]


def norm(theirs: str, ours: str, width: int) -> list[Row]:
    return [Row(f"{theirs}.weight", (width,), f"{ours}.scale"), Row(f"{theirs}.bias", (width,), f"{ours}.bias")]


def convolution(theirs: str, ours: str, inputs: int, outputs: int, side: int) -> list[Row]:
    """PyTorch's kernel is [out, in, height, width], Flax's [height, width, in, out]."""
    return [Row(f"{theirs}.weight", (outputs, inputs, side, side), f"{ours}.kernel", (2, 3, 1, 0))]


def batch_norm(theirs: str, ours: str, width: int) -> list[Row]:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [
        *(Row(f"{theirs}.{name}", (width,), f"{ours}.{here}") for name, here in names.items()),
        unused(f"{theirs}.num_batches_tracked", (), "int64"),
    ]


def unused(theirs: str, shape: tuple[int, ...], dtype: str = "float32") -> Row:
    """A tensor that no forward pass here reads: kept as it is, where the checkpoint has it."""
    return Row(theirs, shape, f"{UNUSED}{theirs}", dtypes=(dtype,), optional=True)


def stacked(rows: Sequence[Row], depth: int) -> list[Row]:
    """The rows of one block -> those of all blocks."""
    return [
        row._replace(theirs=f"blocks.{i}.{row.theirs}", ours=f"blocks.{row.ours}", block=i)
        for i in range(depth)
        for row in rows
    ]


# --- both directions -------------------------------------------------------------------------------------------------


def to_ours(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Streamed]:
    """The authors' tensors as our parameters, read one block of one parameter at a time.

    Args:
        tensors: every one of the rows' but optional ones.
        shapes: of our parameters, those that are unused apart.
    """
    made: dict[str, list[Row]] = {}
    for row in rows:
        if row.theirs in tensors and not row.copy_of:
            made.setdefault(row.ours, []).append(row)
    streams = {}
    for name, of_name in made.items():
        shape = shapes.get(name, of_name[0].shape)
        dtype = _dtype_here(of_name[0])
        streams[name] = Streamed(shape, dtype, partial(_chunks, of_name, tensors, shape, dtype))
    return streams


def _chunks(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    for block, of_block in groupby(rows, key=lambda row: row.block):
        chunk = np.empty(shape if block is None else shape[1:], dtype)
        for row in of_block:
            part = tensors[row.theirs].read()[row.part]
            turned = part.transpose(row.axes) if row.axes else part
            chunk[row.place] = turned.reshape(chunk[row.place].shape)
        yield chunk


def to_theirs(
    rows: Sequence[Row], held: Collection[str], read: Callable[[str, int | None], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters as the authors' tensors, in the authors' order, one at a time.

    Args:
        held: the names of our parameters.
        read: one of them, or one block of it.
    """
    for theirs, of_tensor in groupby(rows, key=lambda row: row.theirs):
        of_tensor = list(of_tensor)
        if of_tensor[0].ours not in held:
            continue  # an optional one, which the checkpoint lacked
        tensor = np.empty(of_tensor[0].shape, _dtype_here(of_tensor[0]))
        for row in of_tensor:
            place = read(row.ours, row.block)[row.place]
            if row.axes:
                sides = tensor[row.part].shape
                place = place.reshape([sides[axis] for axis in row.axes]).transpose(np.argsort(row.axes))
            tensor[row.part] = place.reshape(tensor[row.part].shape)
        yield theirs, tensor


def _dtype_here(row: Row) -> np.dtype:
    return np.dtype("int64" if row.dtypes == ("int64",) else "float32")  # bfloat16 comes as float32
