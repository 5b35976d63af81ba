"""Map the tensors of DINOv2 and DINOv3 checkpoints to our parameters, in the order of the authors' code.

Reference code: facebookresearch/dinov2 and facebookresearch/dinov3, `models/vision_transformer.py`.
"""

from __future__ import annotations

import numpy as np

from convert_weights.layout import Row, convolution, linear, norm, stacked, unused
from jaxla.models.backbones.vision_transformer import Variant

# The checkpoints of ViT-7B, and of ViT-L trained on satellite images, may contain a second final norm, which only
# pretraining uses.
SECOND_NORM_ARCHS = ("dinov3_vitl16", "dinov3_vit7b16")

# DINOv3's constants are the rotary periods and the mask of the QKV bias. Some checkpoints contain them in bfloat16.
CONSTANT_DTYPES = ("float32", "bfloat16")


def dinov2_rows(variant: Variant) -> list[Row]:
    c, positions = variant.width, (1, 1 + variant.grid**2, variant.width)
    return [
        Row("cls_token", (1, 1, c), "cls_token"),
        Row("pos_embed", positions, "pos_cls", theirs_index=np.s_[0, 0]),
        Row("pos_embed", positions, "pos_grid", theirs_index=np.s_[0, 1:]),
        *([Row("register_tokens", (1, variant.registers, c), "register_tokens")] if variant.registers else []),
        unused("mask_token", (1, c)),
        *convolution("patch_embed.proj", "patch_embed", 3, c, (variant.patch, variant.patch), bias=True),
        *stacked(_block(variant, linear("attn.qkv", "attention.qkv", c, 3 * c)), variant.depth),
        *norm("norm", "norm", c),
    ]


def dinov3_rows(arch: str, variant: Variant) -> list[Row]:
    c, head = variant.width, variant.width // variant.heads
    qkv = [
        Row("attn.qkv.weight", (3 * c, c), "attention.qkv.kernel", (1, 0)),
        Row("attn.qkv.bias", (3 * c,), "attention.qkv_bias"),
        Row("attn.qkv.bias_mask", (3 * c,), "attention.qkv_bias_mask", dtypes=CONSTANT_DTYPES),
    ]
    return [
        Row("cls_token", (1, 1, c), "cls_token"),
        Row("storage_tokens", (1, variant.registers, c), "register_tokens"),
        unused("mask_token", (1, c)),
        *convolution("patch_embed.proj", "patch_embed", 3, c, (variant.patch, variant.patch), bias=True),
        Row("rope_embed.periods", (head // 4,), "periods", dtypes=CONSTANT_DTYPES),
        *stacked(_block(variant, qkv[:1] if variant.qkv_bias == "none" else qkv), variant.depth),
        *norm("norm", "norm", c),
        *([unused(f"local_cls_norm.{name}", (c,)) for name in ("weight", "bias")] if arch in SECOND_NORM_ARCHS else []),
    ]


def _block(variant: Variant, qkv: list[Row]) -> list[Row]:
    c, h = variant.width, variant.hidden
    if variant.mlp == "gelu":
        mlp = linear("mlp.fc1", "mlp.expand", c, h) + linear("mlp.fc2", "mlp.contract", h, c)
    elif variant.grid:  # DINOv2, which alone has a position grid, stores gate and value in one layer
        mlp = linear("mlp.w12", "mlp.expand", c, 2 * h) + linear("mlp.w3", "mlp.contract", h, c)
    else:
        mlp = (
            linear("mlp.w1", "mlp.expand", c, h, ours_index=np.s_[..., :h])
            + linear("mlp.w2", "mlp.expand", c, h, ours_index=np.s_[..., h:])
            + linear("mlp.w3", "mlp.contract", h, c)
        )
    return [
        *norm("norm1", "norm1", c),
        *qkv,
        *linear("attn.proj", "attention.projection", c, c),
        Row("ls1.gamma", (c,), "scale1.gamma"),
        *norm("norm2", "norm2", c),
        *mlp,
        Row("ls2.gamma", (c,), "scale2.gamma"),
    ]
