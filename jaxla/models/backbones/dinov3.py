"""The vision transformers of DINOv3 (Siméoni et al. 2025).

Reference code: facebookresearch/dinov3, `hub/backbones.py`. Positions are rotary and apply to patch tokens only. All
have four registers. The bias of queries, keys and values is multiplied by a mask from the checkpoint. The plus models
and ViT-7B have a SwiGLU MLP. Some checkpoints contain a second final norm (`local_cls_norm`), which only pretraining
uses.
"""

from __future__ import annotations

from functools import partial

from jaxla.models.backbones.vision_transformer import Variant

_released = partial(Variant, patch=16, registers=4, qkv_bias="masked", epsilon=1e-5, licence="DINOv3 License")

VARIANTS = {
    "dinov3_vits16": _released(width=384, depth=12, heads=6, hidden=1536),
    "dinov3_vits_plus16": _released(width=384, depth=12, heads=6, hidden=1536, mlp="swiglu"),
    "dinov3_vitb16": _released(width=768, depth=12, heads=12, hidden=3072),
    "dinov3_vitl16": _released(width=1024, depth=24, heads=16, hidden=4096),
    "dinov3_vith_plus16": _released(width=1280, depth=32, heads=20, hidden=5120, mlp="swiglu"),
    "dinov3_vit7b16": _released(width=4096, depth=40, heads=32, hidden=8192, mlp="swiglu", qkv_bias="none"),
}

HUB_SPELLINGS = {"dinov3_vits16plus": "dinov3_vits_plus16", "dinov3_vith16plus": "dinov3_vith_plus16"}
