"""Map the tensors of nnU-Net's state dicts, in PyTorch's order, to our parameters.

Reference code: dynamic_network_architectures 0.4.4, `PlainConvUNet`. PyTorch saves a module under each of its
names: each layer again in `all_modules`, and the encoder again in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert_weights.layout import Row, convolution, norm
from convert_weights.tensors import Tensor
from jaxla.config import InputError
from jaxla.nnunet.plan import Configuration

STATE_DICT_KEY = "network_weights"  # in nnU-Net's checkpoints
LOGITS_WEIGHT = "decoder.seg_layers.0.weight"  # its first axis is the number of classes


def nnunet_rows(configuration: Configuration, outputs: int) -> list[Row]:
    """Return the rows of a network with one image channel and `outputs` logits, including background."""
    down = []
    inputs = 1
    stages = zip(configuration.features_per_stage, configuration.kernel_sizes, strict=True)
    for stage, (features, kernel) in enumerate(stages):
        for i in range(configuration.n_conv_per_stage[stage]):
            down += _unit(f"encoder.stages.{stage}.0.convs.{i}", f"down.{stage}.{i}", inputs, features, kernel)
            inputs = features
    decoder = [_copy(row, f"decoder.{row.theirs}") for row in down]
    join, up, logits = [], [], []
    for i, level in enumerate(reversed(range(configuration.n_stages - 1))):
        coarser, features = configuration.features_per_stage[level + 1], configuration.features_per_stage[level]
        inputs = 2 * features
        for j in range(configuration.n_conv_per_stage_decoder[i]):
            unit = f"decoder.stages.{i}.convs.{j}"
            join += _unit(unit, f"join.{i}.{j}", inputs, features, configuration.kernel_sizes[level])
            inputs = features
        strides = configuration.strides[level + 1]
        axes = (0, *range(2, 2 + len(strides)), 1)  # PyTorch's kernel is [in, out, *size], ours [in, *size, out]
        up.append(Row(f"decoder.transpconvs.{i}.weight", (coarser, features, *strides), f"up.{i}.kernel", axes))
        up.append(Row(f"decoder.transpconvs.{i}.bias", (features,), f"up.{i}.bias"))
        ones = (1,) * len(strides)
        logits += convolution(f"decoder.seg_layers.{i}", f"logits.{i}", features, outputs, ones, bias=True)
    return [*down, *decoder, *join, *up, *logits]


def read_output_count(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Return the number of channels of the logits; raise an InputError if the network was trained on regions."""
    if LOGITS_WEIGHT not in tensors or not tensors[LOGITS_WEIGHT].shape:
        problem = f"not an nnU-Net checkpoint ({LOGITS_WEIGHT} is missing)"
        raise InputError(path, problem, "Pass nnU-Net's checkpoint_final.pth as --source.")
    if (outputs := tensors[LOGITS_WEIGHT].shape[0]) < 2:
        problem = "trained on regions (it has a single output), which is not supported"
        raise InputError(path, problem, "Use a network trained on labels and background.")
    return outputs


def _unit(theirs: str, ours: str, inputs: int, outputs: int, kernel: Sequence[int]) -> Iterator[Row]:
    layers = (
        convolution(f"{theirs}.conv", f"{ours}.convolution", inputs, outputs, kernel, bias=True),
        norm(f"{theirs}.norm", f"{ours}.norm", outputs),
    )
    yield from (*layers[0], *layers[1])
    for i, rows in enumerate(layers):
        for row in rows:
            yield _copy(row, f"{theirs}.all_modules.{i}.{row.theirs.rpartition('.')[2]}")


def _copy(row: Row, theirs: str) -> Row:
    return row._replace(theirs=theirs, optional=True, copy_of=row.copy_of or row.theirs)
