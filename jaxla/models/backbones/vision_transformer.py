"""The vision transformer of DINOv2 and DINOv3. A `Variant` holds the differences between the models.

The blocks are one stacked module run by `jax.lax.scan`, so that 40 blocks compile as fast as 12.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.mesh import replicate
from jaxla.models.ops.attention import attention
from jaxla.models.ops.images import require_images
from jaxla.models.ops.positions import Rotation, resize_grid, rotary_periods, rotary_rotation


@dataclass(frozen=True)
class Variant:
    """One architecture."""

    width: int  # C, channels of a token
    depth: int  # number of blocks
    heads: int  # number of attention heads
    hidden: int  # channels inside the MLP
    patch: int  # side of a patch in pixels
    mlp: Literal["gelu", "swiglu"] = "gelu"  # with `swiglu` a third layer gates the first
    grid: int = 0  # side of the learned position grid in patches, 0 for rotary positions
    antialias: bool = False  # whether resizing the position grid antialiases it
    registers: int = 0  # R, tokens without a patch besides the class token ("storage tokens" in DINOv3's code)
    qkv_bias: Literal["plain", "masked", "none"] = "plain"  # `masked` multiplies it by a mask from the weights file
    epsilon: float = 1e-6  # added to the variance in layer norms
    licence: str = ""  # licence of the released weights, empty if none were released


class Features(NamedTuple):
    """The tokens of a vision transformer after the final norm."""

    cls: jax.Array  # [B, C]
    registers: jax.Array  # [B, R, C]
    patches: jax.Array  # [B, h, w, C]


class Buffer(nnx.Variable):
    """A constant from the weights file that is never trained."""


class LayerScale(nnx.Module):
    """Multiply each channel by its gamma."""

    def __init__(self, width: int) -> None:
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma.astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width = variant.width
        self.heads = variant.heads
        self.qkv = _linear(width, 3 * width, dtype, rngs, bias=variant.qkv_bias == "plain")
        self.masked = variant.qkv_bias == "masked"
        if self.masked:
            self.qkv_bias = nnx.Param(jnp.zeros(3 * width))
            self.qkv_bias_mask = Buffer(jnp.repeat(jnp.array([1.0, 0.0, 1.0]), width))  # keys have no bias
        self.projection = _linear(width, width, dtype, rngs)

    def __call__(self, x: jax.Array, rotation: Rotation | None) -> jax.Array:
        """Apply attention to tokens [B, N, C]."""
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in self.project_qkv(x))
        if rotation is not None:
            q, k = rotation.rotate(q), rotation.rotate(k)
        return self.projection(attention(q, k, v).reshape(x.shape))

    def project_qkv(self, x: jax.Array) -> list[jax.Array]:
        """Return the queries, keys and values of tokens [B, N, C], each [B, N, C].

        Computes three matrix products, because splitting the result of one would take another pass over it.
        """
        products = [x @ kernel for kernel in jnp.split(self.qkv.kernel[...].astype(x.dtype), 3, axis=1)]
        bias = self.qkv_bias * self.qkv_bias_mask if self.masked else self.qkv.bias
        if bias is None:
            return products
        return [y + part for y, part in zip(products, jnp.split(bias[...].astype(x.dtype), 3), strict=True)]


class Mlp(nnx.Module):
    """Two linear layers with GELU or SwiGLU between them."""

    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.gated = variant.mlp == "swiglu"
        # SwiGLU: the channels of the gate, then the channels that it multiplies
        self.expand = _linear(variant.width, (2 if self.gated else 1) * variant.hidden, dtype, rngs)
        self.contract = _linear(variant.hidden, variant.width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the MLP to tokens [B, N, C]."""
        x = self.expand(x)
        if self.gated:
            gate, x = jnp.split(x, 2, axis=-1)
            return self.contract(jax.nn.silu(gate) * x)
        # PyTorch's GELU uses erf too; `jax.nn.gelu` uses erfc, which takes twice as long on CPU
        return self.contract((0.5 * x * (1 + jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5))).astype(x.dtype))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each scaled and added to its input."""

    def __init__(self, variant: Variant, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(variant, dtype, rngs)
        self.attention = Attention(variant, dtype, rngs)
        self.scale1 = LayerScale(variant.width)
        self.norm2 = _norm(variant, dtype, rngs)
        self.mlp = Mlp(variant, dtype, rngs)
        self.scale2 = LayerScale(variant.width)

    def __call__(self, x: jax.Array, rotation: Rotation | None) -> jax.Array:
        """Apply the block to tokens [B, N, C]."""
        x = x + self.scale1(self.attention(self.norm1(x), rotation))
        return x + self.scale2(self.mlp(self.norm2(x)))


class VisionTransformer(nnx.Module):
    """Map ImageNet-normalised images [B, H, W, 3] to `Features`.

    Args:
        dtype: dtype of the computation; parameters stay float32.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
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
        """Return all tokens after the final norm.

        Raises:
            ValueError: `images` is not [B, H, W, 3] floating point, or H or W is not a multiple of the patch size.
        """
        require_images(images, self.variant.patch)
        return _features(*nnx.split(self), images)

    def intermediate(self, images: jax.Array, blocks: Iterable[int], norm: bool = False) -> tuple[jax.Array, ...]:
        """Return the patch tokens [B, h, w, C] after each of the given blocks, counted from 0.

        Args:
            norm: apply the final norm to the tokens (the authors' `get_intermediate_layers(norm=True)`).

        Raises:
            ValueError: `images` is invalid (see `__call__`), or a block does not exist.
        """
        require_images(images, self.variant.patch)
        blocks = tuple(blocks)
        if not all(0 <= block < self.variant.depth for block in blocks):
            raise ValueError(f"blocks {blocks}: this backbone has blocks 0 to {self.variant.depth - 1}")
        return _intermediate(*nnx.split(self), images, blocks, norm)

    def embed(self, images: jax.Array) -> jax.Array:
        """Return class token, registers and patches, with learned positions: [B, H, W, 3] -> [B, 1 + R + h·w, C]."""
        batch, patch = images.shape[0], self.variant.patch
        h, w = self.map_size(images)
        pixels = images.reshape(batch, h, patch, w, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = self.patch_embed(pixels.reshape(batch, h * w, -1))
        prefix = [self.cls_token[...][None]]
        if self.variant.grid:
            positions = resize_grid(self.pos_grid[...], h, w, antialias=self.variant.antialias)
            patches = patches + positions.reshape(h * w, -1).astype(self.dtype)
            prefix = [prefix[0] + self.pos_cls[...]]
        if self.variant.registers:
            prefix.append(self.register_tokens[...])
        prefix = jnp.concatenate(prefix).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape)), patches], axis=1)

    def run_blocks(
        self, tokens: jax.Array, size: tuple[int, int], keep: Sequence[int] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Run all blocks on tokens of h, w = `size` patches; also return the tokens after each block in `keep`.

        The kept tokens are written into one buffer that the scan carries: as scan outputs, the tokens of all
        blocks would be stored.
        """
        rotation = None
        if not self.variant.grid:
            rotation = rotary_rotation(self.periods[...], *size, prefix=tokens.shape[1] - size[0] * size[1])
        slots = sorted(set(keep))
        # all other blocks overwrite one spare slot, the last
        slots_by_block = jnp.array([slots.index(i) if i in slots else len(slots) for i in range(self.variant.depth)])
        kept = jnp.zeros((len(slots) + 1, *tokens.shape), tokens.dtype) if slots else None
        block, parameters = nnx.split(self.blocks)

        def step(carry: tuple, slot_and_parameters: tuple) -> tuple:
            x, kept = carry
            slot, parameters = slot_and_parameters
            x = nnx.merge(block, replicate(parameters))(x, rotation)
            return (x, kept if kept is None else kept.at[slot].set(x)), None

        step = jax.checkpoint(step) if self.remat else step
        (tokens, kept), _ = jax.lax.scan(step, (tokens, kept), (slots_by_block, parameters))
        return tokens, tuple(kept[slots.index(i)] for i in keep)

    def map_size(self, images: jax.Array) -> tuple[int, int]:
        """Return h, w, the numbers of patches along rows and columns of images [B, H, W, 3]."""
        return images.shape[1] // self.variant.patch, images.shape[2] // self.variant.patch

    def to_map(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Return the patch tokens of [B, 1 + R + h·w, C] as a map [B, h, w, C]."""
        return tokens[:, 1 + self.variant.registers :].reshape(tokens.shape[0], *size, -1)


# Jitted here, so that a call outside of jit does not compile the scan each time.


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
    # the fast variance, E[x²] − E[x]², loses digits that parity with the reference needs
    return nnx.LayerNorm(variant.width, epsilon=variant.epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)
