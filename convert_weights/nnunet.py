"""nnU-Net's state dicts: their tensors in PyTorch's order, and where each stands among our parameters.

Reference code: dynamic_network_architectures 0.4.4, `PlainConvUNet`. A module that stands under several names is saved
under each of them: a layer again in `all_modules`, the encoder again in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert_weights.checkpoint import Tensor
from convert_weights.layout import Row
from jaxla.config import InputError
from jaxla.nnunet.plan import Configuration

STATE = "network_weights"  # under which it stands in nnU-Net's checkpoints
LAST_LOGITS = "decoder.seg_layers.0.weight"  # whose first axis is the number of classes


def nnunet_rows(c: Configuration, heads: int) -> list[Row]:
    """The rows of a network of one image channel.

    Args:
        heads: channels of the logits, background among them.
    """
    down, inputs = [], 1
    for stage, (features, kernel) in enumerate(zip(c.features_per_stage, c.kernel_sizes, strict=True)):
        for i in range(c.n_conv_per_stage[stage]):
            down += _unit(f"encoder.stages.{stage}.0.convs.{i}", f"down.{stage}.{i}", inputs, features, kernel)
            inputs = features
    decoder = [_copy(row, f"decoder.{row.theirs}") for row in down]
    join, up, logits = [], [], []
    for i, level in enumerate(reversed(range(c.n_stages - 1))):
        below, features = c.features_per_stage[level + 1], c.features_per_stage[level]
        inputs = 2 * features
        for j in range(c.n_conv_per_stage_decoder[i]):
            unit = f"decoder.stages.{i}.convs.{j}"
            join += _unit(unit, f"join.{i}.{j}", inputs, features, c.kernel_sizes[level])
            inputs = features
        strides = c.strides[level + 1]
        axes = (0, *range(2, 2 + len(strides)), 1)  # PyTorch's kernel is [in, out, …], ours [in, …, out]
        up.append(Row(f"decoder.transpconvs.{i}.weight", (below, features, *strides), f"up.{i}.kernel", axes))
        up.append(Row(f"decoder.transpconvs.{i}.bias", (features,), f"up.{i}.bias"))
        logits += _convolution(f"decoder.seg_layers.{i}", f"logits.{i}", features, heads, (1,) * len(strides))
    return [*down, *decoder, *join, *up, *logits]


def heads_of(tensors: Mapping[str, Tensor], path: Path) -> int:
    """How many channels the logits have.

    Raises:
        InputError: the checkpoint holds no such layer, or it was trained on regions.
    """
    if LAST_LOGITS not in tensors or not tensors[LAST_LOGITS].shape:
        raise InputError(f"{path}: not nnunet: it has no {LAST_LOGITS}; give nnU-Net's checkpoint_final.pth")
    if (heads := tensors[LAST_LOGITS].shape[0]) < 2:
        raise InputError(f"{path}: has one output, of regions; this package reads networks of labels, with background")
    return heads


def _unit(theirs: str, ours: str, inputs: int, outputs: int, kernel: Sequence[int]) -> Iterator[Row]:
    convolution = _convolution(f"{theirs}.conv", f"{ours}.convolution", inputs, outputs, kernel)
    names = {"weight": "scale", "bias": "bias"}
    norm = [Row(f"{theirs}.norm.{name}", (outputs,), f"{ours}.norm.{here}") for name, here in names.items()]
    yield from (*convolution, *norm)
    for i, rows in enumerate((convolution, norm)):
        for row in rows:
            name = row.theirs.rpartition(".")[2]
            yield _copy(row, f"{theirs}.all_modules.{i}.{name}")


def _copy(row: Row, theirs: str) -> Row:
    return row._replace(theirs=theirs, optional=True, copy_of=row.copy_of or row.theirs)


def _convolution(theirs: str, ours: str, inputs: int, outputs: int, kernel: Sequence[int]) -> list[Row]:
    axes = (*range(2, 2 + len(kernel)), 1, 0)  # PyTorch's kernel is [out, in, …], Flax's […, in, out]
    return [
        Row(f"{theirs}.weight", (outputs, inputs, *kernel), f"{ours}.kernel", axes),
        Row(f"{theirs}.bias", (outputs,), f"{ours}.bias"),
    ]
