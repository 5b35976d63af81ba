"""Map each of the authors' tensors to our parameters, by table rows that work in both directions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from types import EllipsisType
from typing import NamedTuple

import numpy as np

from convert_weights.tensors import Tensor
from jaxla.models.weights_format import UNUSED_PREFIX, StreamedArray

Index = EllipsisType | tuple


class Row(NamedTuple):
    """One of the authors' tensors, or a part of it, and our parameter for its values.

    An `optional` tensor may be missing, but only if all others of its group are missing too (see `accounting`).
    """

    theirs: str  # name of the authors' tensor
    shape: tuple[int, ...]  # shape of that tensor
    ours: str  # name of our parameter
    axes: tuple[int, ...] = ()  # the permutation of the authors' axes that gives ours; empty keeps their order
    theirs_index: Index = ...  # the part of the authors' tensor that this row maps
    ours_index: Index = ...  # where this part goes in our parameter, or in one block of it
    block: int | None = None  # index of the block in a parameter that stacks all blocks along its first axis
    dtypes: tuple[str, ...] = ("float32",)  # the dtypes that the authors' tensor may have
    optional: bool = False
    copy_of: str = ""  # name of the tensor that this one duplicates; both must be equal


def linear(theirs: str, ours: str, inputs: int, outputs: int, ours_index: Index = ...) -> list[Row]:
    """Return the rows of a linear layer; PyTorch's kernel is [out, in], Flax's [in, out]."""
    return [
        Row(f"{theirs}.weight", (outputs, inputs), f"{ours}.kernel", (1, 0), ours_index=ours_index),
        Row(f"{theirs}.bias", (outputs,), f"{ours}.bias", ours_index=ours_index),
    ]


def norm(theirs: str, ours: str, width: int) -> list[Row]:
    return [Row(f"{theirs}.weight", (width,), f"{ours}.scale"), Row(f"{theirs}.bias", (width,), f"{ours}.bias")]


def convolution(
    theirs: str, ours: str, inputs: int, outputs: int, kernel: Sequence[int], *, bias: bool = False
) -> list[Row]:
    """Return the rows of a convolution; PyTorch's kernel is [out, in, *size], Flax's [*size, in, out]."""
    axes = (*range(2, 2 + len(kernel)), 1, 0)
    rows = [Row(f"{theirs}.weight", (outputs, inputs, *kernel), f"{ours}.kernel", axes)]
    return [*rows, Row(f"{theirs}.bias", (outputs,), f"{ours}.bias")] if bias else rows


def batch_norm(theirs: str, ours: str, width: int) -> list[Row]:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [
        *(Row(f"{theirs}.{torch_name}", (width,), f"{ours}.{flax_name}") for torch_name, flax_name in names.items()),
        unused(f"{theirs}.num_batches_tracked", (), "int64"),
    ]


def unused(theirs: str, shape: tuple[int, ...], dtype: str = "float32") -> Row:
    """Return the row of a tensor that no forward pass uses; if the checkpoint has it, it is kept unchanged."""
    return Row(theirs, shape, f"{UNUSED_PREFIX}{theirs}", dtypes=(dtype,), optional=True)


def stacked(rows: Sequence[Row], depth: int) -> list[Row]:
    """Return the rows of all blocks, given the rows of one block."""
    return [
        row._replace(theirs=f"blocks.{i}.{row.theirs}", ours=f"blocks.{row.ours}", block=i)
        for i in range(depth)
        for row in rows
    ]


def to_ours(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StreamedArray]:
    """Return our parameters as streams, which read the authors' tensors one block of one parameter at a time.

    Args:
        tensors: the authors' tensors by name; those of optional rows may be missing.
        shapes: the shape of each of our parameters that a forward pass uses.
    """
    rows_by_parameter: dict[str, list[Row]] = {}
    for row in rows:
        if row.theirs in tensors and not row.copy_of:
            rows_by_parameter.setdefault(row.ours, []).append(row)
    streams = {}
    for name, parameter_rows in rows_by_parameter.items():
        shape = shapes.get(name, parameter_rows[0].shape)
        dtype = _saved_dtype(parameter_rows[0])
        streams[name] = StreamedArray(shape, dtype, partial(_chunks, parameter_rows, tensors, shape, dtype))
    return streams


def _chunks(
    rows: Sequence[Row], tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    for block, block_rows in groupby(rows, key=lambda row: row.block):
        chunk = np.empty(shape if block is None else shape[1:], dtype)
        for row in block_rows:
            values = tensors[row.theirs].read()[row.theirs_index]
            values = values.transpose(row.axes) if row.axes else values
            chunk[row.ours_index] = values.reshape(chunk[row.ours_index].shape)
        yield chunk


def to_theirs(
    rows: Sequence[Row], names: Collection[str], read: Callable[[str, int | None], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the authors' tensors in their order, one by one; `read` returns one of our parameters, or a block of it."""
    for theirs, tensor_rows in groupby(rows, key=lambda row: row.theirs):
        tensor_rows = list(tensor_rows)
        if tensor_rows[0].ours not in names:
            continue  # an optional tensor that the checkpoint lacked
        tensor = np.empty(tensor_rows[0].shape, _saved_dtype(tensor_rows[0]))
        for row in tensor_rows:
            values = read(row.ours, row.block)[row.ours_index]
            shape = tensor[row.theirs_index].shape
            if row.axes:
                values = values.reshape([shape[axis] for axis in row.axes]).transpose(np.argsort(row.axes))
            tensor[row.theirs_index] = values.reshape(shape)
        yield theirs, tensor


def _saved_dtype(row: Row) -> np.dtype:
    return np.dtype("int64" if row.dtypes == ("int64",) else "float32")  # bfloat16 is saved as float32
