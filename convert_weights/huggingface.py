"""Hugging Face's checkpoints of DINOv2, with and without registers, and of DINOv3, seen as their authors' ones.

Reference code: transformers 4.56 to 5.23, `models/dinov2`, `models/dinov2_with_registers` and `models/dinov3_vit`. The
names here are those of the files on the hub, which version 5 still writes; version 5's names in memory, and names under
a prefix that says which model they belong to, are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from convert_weights.checkpoint import Tensor
from convert_weights.layout import Row

# The authors' module or tensor: Hugging Face's that make it up, in this order. N is the number of a block.
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
_DINOV2_IN_TWO = _DINOV2 | {"blocks.N.mlp.w12": ["encoder.layer.N.mlp.gate_proj", "encoder.layer.N.mlp.up_proj"]}
_DINOV3 = {
    "cls_token": ["embeddings.cls_token"],
    "storage_tokens": ["embeddings.register_tokens"],
    "mask_token": ["embeddings.mask_token"],
    "patch_embed.proj": ["embeddings.patch_embeddings"],
    "blocks.N.norm1": ["layer.N.norm1"],
    "blocks.N.attn.qkv": ["layer.N.attention.q_proj", "layer.N.attention.k_proj", "layer.N.attention.v_proj"],
    # a tensor's own name goes before its module's: the keys have no bias there
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
# Hugging Face keeps no rotary periods and no mask of the bias: its code computes the one and leaves out the other.
_COMPUTED = {
    "rope_embed.periods": lambda quarter: (100.0 ** (np.arange(quarter) / quarter)).astype(np.float32),
    "blocks.N.attn.qkv.bias_mask": lambda width: np.repeat(np.array([1, 0, 1], np.float32), width // 3),
}

# --- names -----------------------------------------------------------------------------------------------------------

_PREFIX = re.compile(r"^((dinov2|dinov2_with_registers|dinov3_vit|model)\.)+(?=embeddings\.|encoder\.|layer|norm\.)")
_IN_MEMORY = {  # within DINOv2's blocks, in version 5: on the hub
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def hub_name(name: str) -> str:
    """A tensor's name as it is on the hub; one that is not Hugging Face's stays as it is."""
    name = _PREFIX.sub("", name)
    if match := re.fullmatch(r"(encoder\.layer\.\d+)\.(\w+\.\w+)\.(weight|bias)", name):
        block, module, kind = match.groups()
        return f"{block}.{_IN_MEMORY.get(module, module)}.{kind}"
    return name


# --- tensors ---------------------------------------------------------------------------------------------------------


class _Recipe(NamedTuple):
    """One of the authors' tensors, and the hub names of what makes it up: None for zeros, nothing if it is computed."""

    row: Row
    parts: list[str | None]
    part_shape: tuple[int, ...]


def hub_shapes(rows: Sequence[Row], names: Collection[str]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """What Hugging Face's checkpoint of an architecture holds: hub name -> shape, and whether it may be lacking.

    Args:
        rows: the authors' tensors.
        names: the hub names that the file at hand holds, for there are two ways to keep a gated layer.
    """
    return {
        part: (recipe.part_shape, recipe.row.optional)
        for recipe in _recipes(rows, names)
        for part in recipe.parts
        if part is not None
    }


def as_authors(rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors, each put together when it is read.

    Args:
        tensors: Hugging Face's, by hub name; all that `hub_shapes` expects.
    """
    return {
        recipe.row.theirs: Tensor(recipe.row.shape, "float32", partial(_read, recipe, tensors))
        for recipe in _recipes(rows, tensors)
        if all(part is None or part in tensors for part in recipe.parts)  # else an optional one
    }


def _recipes(rows: Sequence[Row], names: Collection[str]) -> Iterator[_Recipe]:
    if any(row.theirs == "rope_embed.periods" for row in rows):
        table = _DINOV3
    else:
        table = _DINOV2_IN_TWO if any(".mlp.gate_proj." in name for name in names) else _DINOV2
    for row in {row.theirs: row for row in rows}.values():
        name, block = _split(row.theirs)
        module, _, kind = name.rpartition(".")
        if name in _COMPUTED:
            yield _Recipe(row, [], ())
            continue
        parts = table.get(name) or [f"{part}.{kind}" for part in table.get(module, [])]
        if not parts:
            continue  # of pretraining alone, which Hugging Face leaves out
        shape = (row.shape[0] // len(parts), *row.shape[1:])
        if table is _DINOV3 and name == "mask_token":
            shape = (1, *shape)
        yield _Recipe(row, [part and part.replace(".N.", f".{block}.") for part in parts], shape)


def _split(theirs: str) -> tuple[str, str]:
    """`blocks.7.norm1.weight` -> `blocks.N.norm1.weight`, `7`."""
    match = re.match(r"blocks\.(\d+)\.(.*)", theirs)
    return (f"blocks.N.{match[2]}", match[1]) if match else (theirs, "")


def _read(recipe: _Recipe, tensors: Mapping[str, Tensor]) -> np.ndarray:
    if not recipe.parts:
        return _COMPUTED[_split(recipe.row.theirs)[0]](recipe.row.shape[0])
    arrays = [
        np.zeros(recipe.part_shape, np.float32) if part is None else tensors[part].read() for part in recipe.parts
    ]
    return np.concatenate(arrays).reshape(recipe.row.shape)
