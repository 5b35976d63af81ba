"""DINOv2's PyTorch parameters <-> this package's, as one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jaxla.models.vision_transformer import Variant

# Parameters that a checkpoint may hold and that no forward pass without masking uses.
IGNORED = ("mask_token",)

BLOCK = {  # ours: the reference's, within one block
    "norm1.scale": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.qkv.kernel": "attn.qkv.weight",
    "attention.qkv.bias": "attn.qkv.bias",
    "attention.projection.kernel": "attn.proj.weight",
    "attention.projection.bias": "attn.proj.bias",
    "scale1.gamma": "ls1.gamma",
    "norm2.scale": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.expand.kernel": "mlp.fc1.weight",
    "mlp.expand.bias": "mlp.fc1.bias",
    "mlp.contract.kernel": "mlp.fc2.weight",
    "mlp.contract.bias": "mlp.fc2.bias",
    "scale2.gamma": "ls2.gamma",
}
REST = {
    "cls_token": "cls_token",
    "pos_cls": "pos_embed",
    "pos_grid": "pos_embed",
    "patch_embed.kernel": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    "norm.scale": "norm.weight",
    "norm.bias": "norm.bias",
}


def reference_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that the reference checkpoint holds, the ignored ones apart."""
    c, p = variant.width, variant.patch
    of_block = {
        "norm1.weight": (c,), "norm1.bias": (c,),
        "attn.qkv.weight": (3 * c, c), "attn.qkv.bias": (3 * c,),
        "attn.proj.weight": (c, c), "attn.proj.bias": (c,),
        "ls1.gamma": (c,),
        "norm2.weight": (c,), "norm2.bias": (c,),
        "mlp.fc1.weight": (4 * c, c), "mlp.fc1.bias": (4 * c,),
        "mlp.fc2.weight": (c, 4 * c), "mlp.fc2.bias": (c,),
        "ls2.gamma": (c,),
    }  # fmt: skip
    blocks = {f"blocks.{i}.{name}": shape for i in range(variant.depth) for name, shape in of_block.items()}
    return {
        "cls_token": (1, 1, c), "pos_embed": (1, 1 + variant.grid**2, c),
        "patch_embed.proj.weight": (c, 3, p, p), "patch_embed.proj.bias": (c,),
        **blocks,
        "norm.weight": (c,), "norm.bias": (c,),
    }  # fmt: skip


def from_reference(reference: Mapping[str, np.ndarray], variant: Variant) -> dict[str, np.ndarray]:
    """The reference's parameters under this package's names, shapes and stacking."""
    ours = {name: _REST_LAYOUT.get(name, _layout)(reference[theirs], variant) for name, theirs in REST.items()}
    for name, theirs in BLOCK.items():
        of_each = [_layout(reference[f"blocks.{i}.{theirs}"], variant) for i in range(variant.depth)]
        ours[f"blocks.{name}"] = np.stack(of_each)
    return ours


def _layout(array: np.ndarray, variant: Variant) -> np.ndarray:
    """PyTorch's [out, in] -> Flax's [in, out]; vectors as they are."""
    return np.ascontiguousarray(array.T)


_REST_LAYOUT: dict[str, Callable[[np.ndarray, Variant], np.ndarray]] = {
    "cls_token": lambda a, v: a[0, 0],
    "pos_cls": lambda a, v: a[0, 0],
    "pos_grid": lambda a, v: a[0, 1:].reshape(v.grid, v.grid, v.width),
    # a patch's pixels are flattened as rows, columns, channels
    "patch_embed.kernel": lambda a, v: np.ascontiguousarray(a.transpose(2, 3, 1, 0)).reshape(-1, v.width),
}
