"""DINOv2 vision transformers (Oquab et al. 2023; reference code: facebookresearch/dinov2).

The blocks are one stacked module run by `jax.lax.scan`, so that forty of them compile as fast as twelve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.attention import attention

LAYER_NORM_EPSILON = 1e-6
INTERPOLATION_OFFSET = 0.1  # DINOv2 resizes its position grid by (n + 0.1) / grid, and so must whoever uses its weights


@dataclass(frozen=True)
class Variant:
    """One row of the table of architectures.

    Attributes:
        width: C, channels of a token.
        depth: number of blocks.
        heads: of the attention.
        patch: side of a patch in pixels.
        grid: side of the learned position grid in patches.
        licence: of the released weights; empty where none were released.
    """

    width: int
    depth: int
    heads: int
    patch: int = 14
    grid: int = 37
    licence: str = "Apache-2.0"


VARIANTS = {
    "dinov2_vits14": Variant(width=384, depth=12, heads=6),
    "dinov2_vitb14": Variant(width=768, depth=12, heads=12),
    "vit_mini8": Variant(width=128, depth=4, heads=2, patch=8, grid=12, licence=""),
}


class Features(NamedTuple):
    """A vision transformer's output tokens, after the final norm."""

    cls: jax.Array  # [B, C]
    registers: jax.Array  # [B, R, C]
    patches: jax.Array  # [B, h, w, C]


class LayerScale(nnx.Module):
    """x · gamma, one gamma per channel."""

    def __init__(self, width: int) -> None:
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.heads = variant.heads
        self.qkv = _linear(variant.width, 3 * variant.width, dtype, rngs)
        self.projection = _linear(variant.width, variant.width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        return self.projection(attention(q, k, v).reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.expand = _linear(variant.width, 4 * variant.width, dtype, rngs)
        self.contract = _linear(4 * variant.width, variant.width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.contract(jax.nn.gelu(self.expand(x), approximate=False))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each scaled and added."""

    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(variant.width, dtype, rngs)
        self.attention = Attention(variant, dtype, rngs)
        self.scale1 = LayerScale(variant.width)
        self.norm2 = _norm(variant.width, dtype, rngs)
        self.mlp = Mlp(variant, dtype, rngs)
        self.scale2 = LayerScale(variant.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class VisionTransformer(nnx.Module):
    """Images [B, H, W, 3], ImageNet-normalised, to `Features`.

    Args:
        variant: row of `VARIANTS`.
        dtype: of the computation; parameters stay float32.
        remat: recompute the blocks' activations in the backward pass instead of keeping them.
    """

    def __init__(
        self, variant: Variant, *, dtype: jnp.dtype = jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.variant, self.dtype, self.remat = variant, dtype, remat
        normal = jax.nn.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(normal(rngs.params(), (variant.width,)))
        self.pos_cls = nnx.Param(normal(rngs.params(), (variant.width,)))
        self.pos_grid = nnx.Param(normal(rngs.params(), (variant.grid, variant.grid, variant.width)))
        self.patch_embed = _linear(variant.patch**2 * 3, variant.width, dtype, rngs)
        stack = nnx.vmap(lambda rngs: Block(variant, dtype, rngs))
        self.blocks = nnx.split_rngs(splits=variant.depth)(stack)(rngs)
        self.norm = _norm(variant.width, dtype, rngs)

    def __call__(self, images: jax.Array) -> Features:
        """All tokens after the final norm.

        Raises:
            ValueError: `images` is not [B, H, W, 3], or H or W is no multiple of the patch size.
        """
        self._check(images)
        return _features(*nnx.split(self), images)

    def intermediate(self, images: jax.Array, blocks: Sequence[int], norm: bool = False) -> tuple[jax.Array, ...]:
        """The patch tokens after each of the given blocks (0-based), [B, h, w, C] each.

        Args:
            norm: pass them through the final norm (DINOv2's `get_intermediate_layers(norm=True)`).

        Raises:
            ValueError: as for calling; or a block that does not exist.
        """
        self._check(images)
        if not all(0 <= block < self.variant.depth for block in blocks):
            raise ValueError(f"blocks {tuple(blocks)}: this backbone has blocks 0 to {self.variant.depth - 1}")
        return _intermediate(*nnx.split(self), images, tuple(blocks), norm)

    def embed(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> class token and patch tokens with their positions [B, 1 + h·w, C]."""
        batch, height, width, _ = images.shape
        patch = self.variant.patch
        h, w = height // patch, width // patch
        pixels = images.reshape(batch, h, patch, w, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = self.patch_embed(pixels.reshape(batch, h * w, -1))
        patches = patches + position_grid(self.pos_grid[...], h, w).reshape(h * w, -1).astype(self.dtype)
        cls = (self.cls_token[...] + self.pos_cls[...]).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, cls.size)), patches], axis=1)

    def run_blocks(self, tokens: jax.Array, keep: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
        """All blocks in turn; also the tokens after the blocks in `keep`, [len(keep), B, N, C].

        The kept tokens are written into one buffer that the scan carries: as scan outputs they would take the memory
        of all blocks.
        """
        block, parameters = nnx.split(self.blocks)
        kept = jnp.zeros((len(keep), *tokens.shape), tokens.dtype)
        numbers = jnp.arange(self.variant.depth)

        def step(carry: tuple, number_and_parameters: tuple) -> tuple:
            x, kept = carry
            number, parameters = number_and_parameters
            x = nnx.merge(block, parameters)(x)
            for slot, wanted in enumerate(keep):
                kept = kept.at[slot].set(jnp.where(number == wanted, x, kept[slot]))
            return (x, kept), None

        step = jax.checkpoint(step) if self.remat else step
        (tokens, kept), _ = jax.lax.scan(step, (tokens, kept), (numbers, parameters))
        return tokens, kept

    def to_map(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
        """Patch tokens of [B, 1 + h·w, C] -> [B, h, w, C]: token h·w are rows, then columns, of the image."""
        batch, height, width, _ = images.shape
        return tokens[:, 1:].reshape(batch, height // self.variant.patch, width // self.variant.patch, -1)

    def _check(self, images: jax.Array) -> None:
        if images.ndim != 4 or images.shape[-1] != 3:
            hint = "; channels come last here" if images.ndim == 4 and images.shape[1] == 3 else ""
            raise ValueError(f"images of shape {tuple(images.shape)}: expected [B, H, W, 3]{hint}")
        if any(side % self.variant.patch for side in images.shape[1:3]):
            raise ValueError(
                f"images of {images.shape[1]}×{images.shape[2]} pixels: sides must be multiples of {self.variant.patch}"
            )


# Jitted here rather than by the caller, so that plain calls do not compile the scan anew each time.


@partial(jax.jit, static_argnums=0)
def _features(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> Features:
    vit = nnx.merge(graph, state)
    tokens = vit.norm(vit.run_blocks(vit.embed(images))[0])
    return Features(tokens[:, 0], tokens[:, 1:1], vit.to_map(tokens, images))


@partial(jax.jit, static_argnums=(0, 3, 4))
def _intermediate(
    graph: nnx.GraphDef, state: nnx.State, images: jax.Array, blocks: tuple[int, ...], norm: bool
) -> tuple[jax.Array, ...]:
    vit = nnx.merge(graph, state)
    _, kept = vit.run_blocks(vit.embed(images), keep=blocks)
    return tuple(vit.to_map(vit.norm(tokens) if norm else tokens, images) for tokens in kept)


def position_grid(grid: jax.Array, h: int, w: int) -> jax.Array:
    """The learned position grid [G, G, C] at h × w patches, [h, w, C], as the reference code interpolates it.

    Bicubic with PyTorch's kernel, not antialiased, scaled by (n + 0.1) / G rather than n / G.
    """
    side = grid.shape[0]
    if (h, w) == (side, side):
        return grid
    scale = jnp.array([(n + INTERPOLATION_OFFSET) / side for n in (h, w)])
    return jax.image.scale_and_translate(
        grid, (h, w, grid.shape[-1]), (0, 1), scale, jnp.zeros(2), method="bicubic-pytorch", antialias=False,
        precision="highest",
    )  # fmt: skip


def _linear(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=jax.nn.initializers.truncated_normal(0.02), rngs=rngs)


def _norm(width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # the fast variance, E[x²] − E[x]², loses the digits that parity with the reference needs
    return nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, use_fast_variance=False, rngs=rngs)
