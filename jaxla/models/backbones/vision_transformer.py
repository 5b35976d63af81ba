"""The vision transformer that DINOv2 and DINOv3 share; what differs between their models is a row of a table.

The blocks are one stacked module run by `jax.lax.scan`, so that forty of them compile as fast as twelve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.distributed import replicate
from jaxla.models.ops import columns
from jaxla.models.ops.attention import attention
from jaxla.models.ops.images import require_images
from jaxla.models.ops.positions import Rotation, position_grid, rotary_periods, rotation


@dataclass(frozen=True)
class Variant:
    """One row of a family's table of architectures.

    Attributes:
        width: C, channels of a token.
        depth: number of blocks.
        heads: of the attention.
        hidden: channels within the MLP.
        patch: side of a patch in pixels.
        mlp: GELU between two layers, or SwiGLU: a third layer gates the first.
        grid: side of the learned position grid in patches; 0 where positions are rotary instead.
        antialias: whether the position grid is antialiased when it is resized.
        registers: R, tokens beside the class token that belong to no patch ("storage tokens" in DINOv3's code).
        qkv_bias: of the attention's input layer; `masked` multiplies it by a mask that comes with the weights.
        epsilon: of the layer norms.
        licence: of the released weights; empty where none were released.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    mlp: Literal["gelu", "swiglu"] = "gelu"
    grid: int = 0
    antialias: bool = False
    registers: int = 0
    qkv_bias: Literal["plain", "masked", "none"] = "plain"
    epsilon: float = 1e-6
    licence: str = ""


class Features(NamedTuple):
    """A vision transformer's output tokens, after the final norm."""

    cls: jax.Array  # [B, C]
    registers: jax.Array  # [B, R, C]
    patches: jax.Array  # [B, h, w, C]


class Buffer(nnx.Variable):
    """A constant that comes with the weights and is never trained."""


class LayerScale(nnx.Module):
    """x · gamma, one gamma per channel."""

    def __init__(self, width: int) -> None:
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width = variant.width
        self.heads = variant.heads
        self.qkv = _linear(width, 3 * width, dtype, rngs, bias=variant.qkv_bias == "plain")
        self.masked = variant.qkv_bias == "masked"
        if self.masked:
            self.qkv_bias = nnx.Param(jnp.zeros(3 * width))
            self.qkv_bias_mask = Buffer(jnp.repeat(jnp.array([1.0, 0.0, 1.0]), width))  # keys have no bias
        self.projection = _linear(width, width, dtype, rngs)

    def __call__(self, x: jax.Array, rotate: Rotation | None) -> jax.Array:
        """[B, N, C] -> [B, N, C]."""
        return (self.in_columns if jax.default_backend() == "cpu" else self.in_rows)(x, rotate)

    def in_rows(self, x: jax.Array, rotate: Rotation | None) -> jax.Array:
        # three products: cuDNN takes queries, keys and values apart, and to part them afterwards is a pass over all
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in self.each_of_qkv(x))
        if rotate is not None:
            q, k = rotate.rows(q), rotate.rows(k)
        return self.projection(attention(q, k, v).reshape(x.shape))

    def each_of_qkv(self, x: jax.Array) -> list[jax.Array]:
        """[B, N, C] -> three of [B, N, C]."""
        products = [x @ kernel for kernel in jnp.split(self.qkv.kernel[...].astype(x.dtype), 3, axis=1)]
        bias = self.qkv_bias * self.qkv_bias_mask if self.masked else self.qkv.bias
        if bias is None:
            return products
        return [y + part for y, part in zip(products, jnp.split(bias[...].astype(x.dtype), 3), strict=True)]

    def in_columns(self, x: jax.Array, rotate: Rotation | None) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = columns.enter(self.qkv, x)
        if self.masked:
            qkv = qkv + (self.qkv_bias * self.qkv_bias_mask).astype(qkv.dtype)[:, None]
        q, k, v = jnp.moveaxis(qkv.reshape(3, self.heads, -1, batch, tokens), 3, 1)
        if rotate is not None:
            q, k = rotate.columns(q), rotate.columns(k)
        attended = jnp.moveaxis(columns.attention(q, k, v), 0, 2).reshape(width, -1)
        return columns.leave(self.projection, attended, batch)


class Mlp(nnx.Module):
    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.gated = variant.mlp == "swiglu"
        # where it is gated: the gate's channels, then those that it gates
        self.expand = _linear(variant.width, (2 if self.gated else 1) * variant.hidden, dtype, rngs)
        self.contract = _linear(variant.hidden, variant.width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, C] -> [B, N, C]."""
        return (self.in_columns if jax.default_backend() == "cpu" else self.in_rows)(x)

    def in_rows(self, x: jax.Array) -> jax.Array:
        return self.contract(self.activate(self.expand(x), channels=-1))

    def in_columns(self, x: jax.Array) -> jax.Array:
        return columns.leave(self.contract, self.activate(columns.enter(self.expand, x), channels=0), x.shape[0])

    def activate(self, x: jax.Array, channels: int) -> jax.Array:
        if self.gated:
            gate, x = jnp.split(x, 2, axis=channels)
            return jax.nn.silu(gate) * x
        # `jax.nn.gelu` takes erfc, which costs twice as much on CPU; PyTorch takes erf too
        return (0.5 * x * (1 + jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5))).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm attention and MLP, each scaled and added."""

    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(variant, dtype, rngs)
        self.attention = Attention(variant, dtype, rngs)
        self.scale1 = LayerScale(variant.width)
        self.norm2 = _norm(variant, dtype, rngs)
        self.mlp = Mlp(variant, dtype, rngs)
        self.scale2 = LayerScale(variant.width)

    def __call__(self, x: jax.Array, rotate: Rotation | None) -> jax.Array:
        x = x + self.scale1(self.attention(self.norm1(x), rotate))
        return x + self.scale2(self.mlp(self.norm2(x)))


class VisionTransformer(nnx.Module):
    """Images [B, H, W, 3], ImageNet-normalised, to `Features`.

    Args:
        variant: row of `dinov2.VARIANTS` or `dinov3.VARIANTS`.
        dtype: of the computation; parameters stay float32.
        remat: recompute the blocks' activations in the backward pass instead of keeping them.
    """

    def __init__(
        self, variant: Variant, *, dtype: jnp.dtype = jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.variant, self.dtype, self.remat = variant, dtype, remat
        normal = jax.nn.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(normal(rngs.params(), (variant.width,)))
        if variant.registers:
            self.register_tokens = nnx.Param(normal(rngs.params(), (variant.registers, variant.width)))
        if variant.grid:
            self.pos_cls = nnx.Param(normal(rngs.params(), (variant.width,)))
            self.pos_grid = nnx.Param(normal(rngs.params(), (variant.grid, variant.grid, variant.width)))
        else:
            self.periods = Buffer(rotary_periods(variant.width // variant.heads))
        self.patch_embed = _linear(variant.patch**2 * 3, variant.width, dtype, rngs)
        stack = nnx.vmap(lambda rngs: Block(variant, dtype, rngs))
        self.blocks = nnx.split_rngs(splits=variant.depth)(stack)(rngs)
        self.norm = _norm(variant, dtype, rngs)

    def __call__(self, images: jax.Array) -> Features:
        """All tokens after the final norm.

        Raises:
            ValueError: `images` is not [B, H, W, 3] of floating point, or H or W is no multiple of the patch size.
        """
        require_images(images, self.variant.patch)
        return _features(*nnx.split(self), images)

    def intermediate(self, images: jax.Array, blocks: Iterable[int], norm: bool = False) -> tuple[jax.Array, ...]:
        """The patch tokens after each of the given blocks (0-based), [B, h, w, C] each.

        Args:
            norm: pass them through the final norm (the authors' `get_intermediate_layers(norm=True)`).

        Raises:
            ValueError: as for calling; or a block that does not exist.
        """
        require_images(images, self.variant.patch)
        blocks = tuple(blocks)
        if not all(0 <= block < self.variant.depth for block in blocks):
            raise ValueError(f"blocks {blocks}: this backbone has blocks 0 to {self.variant.depth - 1}")
        return _intermediate(*nnx.split(self), images, blocks, norm)

    def embed(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> class token, registers and patch tokens [B, 1 + R + h·w, C], with learned positions."""
        batch, patch = images.shape[0], self.variant.patch
        h, w = self.map_size(images)
        pixels = images.reshape(batch, h, patch, w, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = self.patch_embed(pixels.reshape(batch, h * w, -1))
        first = [self.cls_token[...][None]]
        if self.variant.grid:
            positions = position_grid(self.pos_grid[...], h, w, antialias=self.variant.antialias)
            patches = patches + positions.reshape(h * w, -1).astype(self.dtype)
            first = [first[0] + self.pos_cls[...]]
        if self.variant.registers:
            first.append(self.register_tokens[...])
        first = jnp.concatenate(first).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape)), patches], axis=1)

    def run_blocks(
        self, tokens: jax.Array, size: tuple[int, int], keep: Sequence[int] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """All blocks in turn on tokens of h, w = `size` patches; also the tokens after each block in `keep`.

        The kept tokens are written into one buffer that the scan carries: as scan outputs they would take the memory
        of all blocks.
        """
        rotate = None if self.variant.grid else rotation(self.periods[...], *size, tokens.shape[1] - size[0] * size[1])
        slots = sorted(set(keep))
        # blocks that nobody asked for write into the last place, one after the other
        slot_of = jnp.array([slots.index(i) if i in slots else len(slots) for i in range(self.variant.depth)])
        kept = jnp.zeros((len(slots) + 1, *tokens.shape), tokens.dtype) if slots else None
        block, parameters = nnx.split(self.blocks)

        def step(carry: tuple, slot_and_parameters: tuple) -> tuple:
            x, kept = carry
            slot, parameters = slot_and_parameters
            x = nnx.merge(block, replicate(parameters))(x, rotate)
            return (x, kept if kept is None else kept.at[slot].set(x)), None

        step = jax.checkpoint(step) if self.remat else step
        (tokens, kept), _ = jax.lax.scan(step, (tokens, kept), (slot_of, parameters))
        return tokens, tuple(kept[slots.index(i)] for i in keep)

    def map_size(self, images: jax.Array) -> tuple[int, int]:
        """h, w of the patches of images [B, H, W, 3]."""
        return images.shape[1] // self.variant.patch, images.shape[2] // self.variant.patch

    def to_map(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Patch tokens of [B, 1 + R + h·w, C] -> [B, h, w, C]: they are rows, then columns, of the image."""
        return tokens[:, 1 + self.variant.registers :].reshape(tokens.shape[0], *size, -1)


# Jitted here rather than by the caller, so that plain calls do not compile the scan anew each time.


@partial(jax.jit, static_argnums=0)
def _features(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> Features:
    vit = nnx.merge(graph, state)
    size = vit.map_size(images)
    tokens = vit.norm(vit.run_blocks(vit.embed(images), size)[0])
    return Features(tokens[:, 0], tokens[:, 1 : 1 + vit.variant.registers], vit.to_map(tokens, size))


@partial(jax.jit, static_argnums=(0, 3, 4))
def _intermediate(
    graph: nnx.GraphDef, state: nnx.State, images: jax.Array, blocks: tuple[int, ...], norm: bool
) -> tuple[jax.Array, ...]:
    vit = nnx.merge(graph, state)
    size = vit.map_size(images)
    _, kept = vit.run_blocks(vit.embed(images), size, keep=blocks)
    return tuple(vit.to_map(vit.norm(tokens) if norm else tokens, size) for tokens in kept)


def _linear(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    normal = jax.nn.initializers.truncated_normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=normal, rngs=rngs)


def _norm(variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # the fast variance, E[x²] − E[x]², loses the digits that parity with the reference needs
    return nnx.LayerNorm(variant.width, epsilon=variant.epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)
