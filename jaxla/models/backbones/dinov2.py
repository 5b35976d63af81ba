"""The models of DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2023).

Reference code: facebookresearch/dinov2, `hub/backbones.py`. ViT-g has a SwiGLU MLP. Models with registers antialias
their position grid when they resize it, models without registers do not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxla.models.backbones.vision_transformer import Variant

_released = partial(Variant, patch=14, grid=37, licence="Apache-2.0")

_PLAIN = {
    "dinov2_vits14": _released(width=384, depth=12, heads=6, hidden=1536),
    "dinov2_vitb14": _released(width=768, depth=12, heads=12, hidden=3072),
    "dinov2_vitl14": _released(width=1024, depth=24, heads=16, hidden=4096),
    "dinov2_vitg14": _released(width=1536, depth=40, heads=24, hidden=4096, mlp="swiglu"),
}

VARIANTS = {
    **_PLAIN,
    **{f"{arch}_reg": replace(variant, registers=4, antialias=True) for arch, variant in _PLAIN.items()},
    # not one of DINOv2's models: a small one to train from random weights
    "vit_mini8": Variant(width=128, depth=4, heads=2, hidden=512, patch=8, grid=12),
}
