"""DINOv3 ViT-7B, which is too large for a test: all shapes against the authors' code, and tokens of two blocks."""

from dataclasses import replace

import numpy as np
from flax import nnx

from convert_weights.architectures import architecture_rows
from jaxla.models.backbones import VARIANTS, build_backbone
from jaxla.models.weights import parameter_shapes
from tests.golden.errors import beyond_bounds, live_errors
from tests.golden.fake_weights import fake_image
from tests.golden.live import live_model, live_tokens
from tests.tiny import tiny_backbone

SEVEN_BILLION = VARIANTS["dinov3_vit7b16"]

# From the authors' code: embedding 4096, 32 heads, FFN ratio 3 with `swiglu64` (8192 = 4096 · 3 · 2/3, a multiple
# of 64 already), no bias of queries, keys and values and hence no mask, a second final norm for local crops.
AUTHORS_BLOCK = {
    "norm1.weight": (4096,),
    "norm1.bias": (4096,),
    "attn.qkv.weight": (12288, 4096),
    "attn.proj.weight": (4096, 4096),
    "attn.proj.bias": (4096,),
    "ls1.gamma": (4096,),
    "norm2.weight": (4096,),
    "norm2.bias": (4096,),
    "mlp.w1.weight": (8192, 4096),
    "mlp.w1.bias": (8192,),
    "mlp.w2.weight": (8192, 4096),
    "mlp.w2.bias": (8192,),
    "mlp.w3.weight": (4096, 8192),
    "mlp.w3.bias": (4096,),
    "ls2.gamma": (4096,),
}
AUTHORS_SHAPES = {
    "cls_token": (1, 1, 4096),
    "storage_tokens": (1, 4, 4096),
    "patch_embed.proj.weight": (4096, 3, 16, 16),
    "patch_embed.proj.bias": (4096,),
    "rope_embed.periods": (32,),
    **{f"blocks.{i}.{name}": shape for i in range(40) for name, shape in AUTHORS_BLOCK.items()},
    "norm.weight": (4096,),
    "norm.bias": (4096,),
}
OUR_SHAPES = {
    "cls_token": (4096,),
    "register_tokens": (4, 4096),
    "periods": (32,),
    "patch_embed.kernel": (16 * 16 * 3, 4096),
    "patch_embed.bias": (4096,),
    "blocks.norm1.scale": (40, 4096),
    "blocks.norm1.bias": (40, 4096),
    "blocks.attention.qkv.kernel": (40, 4096, 12288),
    "blocks.attention.projection.kernel": (40, 4096, 4096),
    "blocks.attention.projection.bias": (40, 4096),
    "blocks.scale1.gamma": (40, 4096),
    "blocks.norm2.scale": (40, 4096),
    "blocks.norm2.bias": (40, 4096),
    "blocks.mlp.expand.kernel": (40, 4096, 2 * 8192),
    "blocks.mlp.expand.bias": (40, 2 * 8192),
    "blocks.mlp.contract.kernel": (40, 8192, 4096),
    "blocks.mlp.contract.bias": (40, 4096),
    "blocks.scale2.gamma": (40, 4096),
    "norm.scale": (4096,),
    "norm.bias": (4096,),
}


def test_parameters_have_the_authors_number_and_shapes():
    abstract = nnx.eval_shape(lambda: build_backbone("dinov3_vit7b16", rngs=nnx.Rngs(0)))
    assert parameter_shapes(abstract) == OUR_SHAPES
    theirs, ours = (sum(int(np.prod(shape)) for shape in shapes.values()) for shapes in (AUTHORS_SHAPES, OUR_SHAPES))
    assert theirs == ours == 6_716_031_008


def test_conversion_expects_the_authors_tensors():
    unused = {"mask_token": (1, 4096), "local_cls_norm.weight": (4096,), "local_cls_norm.bias": (4096,)}
    assert {row.theirs: row.shape for row in architecture_rows("dinov3_vit7b16")} == AUTHORS_SHAPES | unused


def test_two_blocks_equal_live_pytorch():
    vit = tiny_backbone(variant=replace(SEVEN_BILLION, depth=2))  # 340 million parameters
    for scale in (vit.blocks.scale1, vit.blocks.scale2):  # keeps the standard deviation of tokens near 1
        scale.gamma.set_value(0.3 * scale.gamma[...])
    images = fake_image(64, 96, batch=2).transpose(0, 2, 3, 1)
    # measured: at most 4.8e-6 (max abs) and 6.7e-7 (relative L2)
    assert not beyond_bounds(live_errors(vit, images, *live_tokens(live_model(vit), images)))
