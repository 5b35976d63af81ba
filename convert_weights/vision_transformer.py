"""DINOv2's and DINOv3's released checkpoints: their tensors in their authors' order, and where each stands among ours.

Reference code: facebookresearch/dinov2 and facebookresearch/dinov3, `models/vision_transformer.py`.
"""

from __future__ import annotations

import numpy as np

from convert_weights.layout import Row, linear, norm, stacked, unused
from jaxla.models.backbones.vision_transformer import Variant

# In whose checkpoints of DINOv3 there may be a second final norm, which serves pretraining alone: all of the 7B, and
# those of ViT-l that were trained on satellite images.
SECOND_NORM = ("dinov3_vitl16", "dinov3_vit7b16")

# DINOv3's constants were rounded to bfloat16 before they were released.
CONSTANT = ("float32", "bfloat16")


def dinov2_rows(variant: Variant) -> list[Row]:
    c, positions = variant.width, (1, 1 + variant.grid**2, variant.width)
    return [
        Row("cls_token", (1, 1, c), "cls_token"),
        Row("pos_embed", positions, "pos_cls", part=np.s_[0, 0]),
        Row("pos_embed", positions, "pos_grid", part=np.s_[0, 1:]),
        *([Row("register_tokens", (1, variant.registers, c), "register_tokens")] if variant.registers else []),
        unused("mask_token", (1, c)),
        *_patch_embedding(variant),
        *stacked(_block(variant, linear("attn.qkv", "attention.qkv", c, 3 * c)), variant.depth),
        *norm("norm", "norm", c),
    ]


def dinov3_rows(arch: str, variant: Variant) -> list[Row]:
    c, head = variant.width, variant.width // variant.heads
    qkv = [
        Row("attn.qkv.weight", (3 * c, c), "attention.qkv.kernel", (1, 0)),
        Row("attn.qkv.bias", (3 * c,), "attention.qkv_bias"),
        Row("attn.qkv.bias_mask", (3 * c,), "attention.qkv_bias_mask", dtypes=CONSTANT),
    ]
    return [
        Row("cls_token", (1, 1, c), "cls_token"),
        Row("storage_tokens", (1, variant.registers, c), "register_tokens"),
        unused("mask_token", (1, c)),
        *_patch_embedding(variant),
        Row("rope_embed.periods", (head // 4,), "periods", dtypes=CONSTANT),
        *stacked(_block(variant, qkv[:1] if variant.qkv_bias == "none" else qkv), variant.depth),
        *norm("norm", "norm", c),
        *([unused(f"local_cls_norm.{name}", (c,)) for name in ("weight", "bias")] if arch in SECOND_NORM else []),
    ]


def _patch_embedding(variant: Variant) -> list[Row]:
    c, p = variant.width, variant.patch
    return [
        # ours multiplies a patch's pixels as rows, columns, channels
        Row("patch_embed.proj.weight", (c, 3, p, p), "patch_embed.kernel", (2, 3, 1, 0)),
        Row("patch_embed.proj.bias", (c,), "patch_embed.bias"),
    ]


def _block(variant: Variant, qkv: list[Row]) -> list[Row]:
    c, h = variant.width, variant.hidden
    if variant.mlp == "gelu":
        mlp = linear("mlp.fc1", "mlp.expand", c, h) + linear("mlp.fc2", "mlp.contract", h, c)
    elif variant.grid:  # DINOv2: gate and gated in one
        mlp = linear("mlp.w12", "mlp.expand", c, 2 * h) + linear("mlp.w3", "mlp.contract", h, c)
    else:
        mlp = (
            linear("mlp.w1", "mlp.expand", c, h, place=np.s_[..., :h])
            + linear("mlp.w2", "mlp.expand", c, h, place=np.s_[..., h:])
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
