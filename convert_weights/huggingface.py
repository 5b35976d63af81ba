"""Translate Hugging Face's checkpoints of DINOv2, with and without registers, and DINOv3 into their authors' layout.

Reference code: transformers 4.56 to 5.23, `models/dinov2`, `models/dinov2_with_registers` and `models/dinov3_vit`. The
tables use the names in the Hub's files, which version 5 still writes. Version 5's names in memory, and names with a
model prefix, are also accepted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from convert_weights.layout import Row
from convert_weights.tensors import Tensor

# The authors' module or tensor -> the Hugging Face modules or tensors to concatenate, in order. N is a block's index.
_DINOV2 = {
    "cls_token": ["embeddings.cls_token"],
    "pos_embed": ["embeddings.position_embeddings"],
    "register_tokens": ["embeddings.register_tokens"],
    "mask_token": ["embeddings.mask_token"],
    "patch_embed.proj": ["embeddings.patch_embeddings.projection"],
    "blocks.N.norm1": ["encoder.layer.N.norm1"],
    "blocks.N.attn.qkv": [f"encoder.layer.N.attention.attention.{name}" for name in ("query", "key", "value")],
    "blocks.N.attn.proj": ["encoder.layer.N.attention.output.dense"],
    "blocks.N.ls1.gamma": ["encoder.layer.N.layer_scale1.lambda1"],
    "blocks.N.norm2": ["encoder.layer.N.norm2"],
    "blocks.N.mlp.fc1": ["encoder.layer.N.mlp.fc1"],
    "blocks.N.mlp.fc2": ["encoder.layer.N.mlp.fc2"],
    "blocks.N.mlp.w12": ["encoder.layer.N.mlp.weights_in"],
    "blocks.N.mlp.w3": ["encoder.layer.N.mlp.weights_out"],
    "blocks.N.ls2.gamma": ["encoder.layer.N.layer_scale2.lambda1"],
    "norm": ["layernorm"],
}
_DINOV2_SPLIT_GATE = _DINOV2 | {"blocks.N.mlp.w12": ["encoder.layer.N.mlp.gate_proj", "encoder.layer.N.mlp.up_proj"]}
_DINOV3 = {
    "cls_token": ["embeddings.cls_token"],
    "storage_tokens": ["embeddings.register_tokens"],
    "mask_token": ["embeddings.mask_token"],
    "patch_embed.proj": ["embeddings.patch_embeddings"],
    "blocks.N.norm1": ["layer.N.norm1"],
    "blocks.N.attn.qkv": ["layer.N.attention.q_proj", "layer.N.attention.k_proj", "layer.N.attention.v_proj"],
    # A tensor's entry overrides its module's: Hugging Face's key projection has no bias.
    "blocks.N.attn.qkv.bias": ["layer.N.attention.q_proj.bias", None, "layer.N.attention.v_proj.bias"],  # None: zeros
    "blocks.N.attn.proj": ["layer.N.attention.o_proj"],
    "blocks.N.ls1.gamma": ["layer.N.layer_scale1.lambda1"],
    "blocks.N.norm2": ["layer.N.norm2"],
    "blocks.N.mlp.fc1": ["layer.N.mlp.up_proj"],
    "blocks.N.mlp.fc2": ["layer.N.mlp.down_proj"],
    "blocks.N.mlp.w1": ["layer.N.mlp.gate_proj"],
    "blocks.N.mlp.w2": ["layer.N.mlp.up_proj"],
    "blocks.N.mlp.w3": ["layer.N.mlp.down_proj"],
    "blocks.N.ls2.gamma": ["layer.N.layer_scale2.lambda1"],
    "norm": ["norm"],
}
# Hugging Face's files lack the rotary periods, which its code computes, and the bias mask, which it does not use.
_COMPUTED = {
    "rope_embed.periods": lambda quarter: (100.0 ** (np.arange(quarter) / quarter)).astype(np.float32),
    "blocks.N.attn.qkv.bias_mask": lambda width: np.repeat(np.array([1, 0, 1], np.float32), width // 3),
}

_PREFIX = re.compile(r"^((dinov2|dinov2_with_registers|dinov3_vit|model)\.)+(?=embeddings\.|encoder\.|layer|norm\.)")
_MEMORY_TO_HUB = {  # modules of DINOv2's blocks: version 5's name in memory -> name on the hub
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def hub_name(name: str) -> str:
    """Return a tensor's name on the hub; names that are not Hugging Face's are returned unchanged."""
    name = _PREFIX.sub("", name)
    if match := re.fullmatch(r"(encoder\.layer\.\d+)\.(\w+\.\w+)\.(weight|bias)", name):
        block, module, kind = match.groups()
        return f"{block}.{_MEMORY_TO_HUB.get(module, module)}.{kind}"
    return name


class _Recipe(NamedTuple):
    """How to make one of the authors' tensors: concatenate its parts, or compute it if it has none."""

    row: Row
    parts: list[str | None]  # hub names of tensors; None stands for zeros
    part_shape: tuple[int, ...]


def hub_shapes(rows: Sequence[Row], names: Collection[str]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Return the shape of each tensor in an architecture's Hugging Face checkpoint, and whether it is optional.

    The hub `names` in the checkpoint determine how it stores a gated layer.
    """
    return {
        part: (recipe.part_shape, recipe.row.optional)
        for recipe in _recipes(rows, names)
        for part in recipe.parts
        if part is not None
    }


def to_authors(rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the authors' tensors, each assembled on demand from the tensors that `hub_shapes` lists."""
    return {
        recipe.row.theirs: Tensor(recipe.row.shape, "float32", partial(_read, recipe, tensors))
        for recipe in _recipes(rows, tensors)
        if all(part is None or part in tensors for part in recipe.parts)  # skips missing optional tensors
    }


def _recipes(rows: Sequence[Row], names: Collection[str]) -> Iterator[_Recipe]:
    if any(row.theirs == "rope_embed.periods" for row in rows):
        table = _DINOV3
    else:
        table = _DINOV2_SPLIT_GATE if any(".mlp.gate_proj." in name for name in names) else _DINOV2
    for row in {row.theirs: row for row in rows}.values():
        name, block = _split_block(row.theirs)
        module, _, kind = name.rpartition(".")
        if name in _COMPUTED:
            yield _Recipe(row, [], ())
            continue
        parts = table.get(name) or [f"{part}.{kind}" for part in table.get(module, [])]
        if not parts:
            continue  # used in pretraining only; Hugging Face does not save it
        shape = (row.shape[0] // len(parts), *row.shape[1:])
        if table is _DINOV3 and name == "mask_token":
            shape = (1, *shape)
        yield _Recipe(row, [part and part.replace(".N.", f".{block}.") for part in parts], shape)


def _split_block(theirs: str) -> tuple[str, str]:
    """Split `blocks.7.norm1.weight` into `blocks.N.norm1.weight` and `7`."""
    match = re.match(r"blocks\.(\d+)\.(.*)", theirs)
    return (f"blocks.N.{match[2]}", match[1]) if match else (theirs, "")


def _read(recipe: _Recipe, tensors: Mapping[str, Tensor]) -> np.ndarray:
    if not recipe.parts:
        return _COMPUTED[_split_block(recipe.row.theirs)[0]](recipe.row.shape[0])
    arrays = [
        np.zeros(recipe.part_shape, np.float32) if part is None else tensors[part].read() for part in recipe.parts
    ]
    return np.concatenate(arrays).reshape(recipe.row.shape)
