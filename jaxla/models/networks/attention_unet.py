"""Attention U-Net (Oktay et al. 2018): a U-Net whose skip connections pass additive attention gates.

A gate weighs each pixel of a skip by what the next coarser level of the decoder has found there: with x the skip and g
that level's features, at half the skip's size,

    weight = sigmoid(ψ relu(W_x x + W_g g + b_g) + b_ψ)        (equation 1 of the paper)

where W_x is a 2×2 convolution with stride 2, which brings x to the grid of g, W_g and ψ are 1×1 convolutions, and the
weights come back to the grid of x bilinearly (figure 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.networks.unet import UNet, UNetOptions
from jaxla.models.ops.layers import LECUN_NORMAL, convolution
from jaxla.models.ops.resizing import double


@dataclass(frozen=True)
class AttentionUNetOptions(UNetOptions):
    """Options of an Attention U-Net.

    Args:
        widths: Channels of each level, finest first.
    """

    arch: ClassVar[str] = "attention_unet"

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> AttentionUNet:
        return nnx.jit(lambda rngs: AttentionUNet(self.widths, outputs, dtype=dtype, rngs=rngs))(rngs)


class AttentionUNet(UNet):
    """A `UNet`, each skip of which is weighed by a gate; takes and gives the same."""

    def __init__(self, widths: Sequence[int], outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        super().__init__(widths, outputs, dtype=dtype, rngs=rngs)
        self.gates = nnx.List([Gate(i, o, dtype, rngs) for i, o in pairwise(widths)])

    def skip(self, level: int, x: jax.Array, below: jax.Array) -> jax.Array:
        return self.gates[level](x, below)


class Gate(nnx.Module):
    """An additive attention gate; the features that it adds are as wide as the skip.

    Args:
        skip: channels of x.
        gating: channels of g.
    """

    def __init__(self, skip: int, gating: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        linear = partial(convolution, side=1, kernel_init=LECUN_NORMAL, dtype=dtype, rngs=rngs)
        self.of_skip = linear(4 * skip, skip)  # of each 2×2 pixels, row by row
        self.of_gating = linear(gating, skip, bias=True)
        self.psi = linear(skip, 1, bias=True)

    def __call__(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """x [B, 2h, 2w, C] and g [B, h, w, G] -> x, each pixel times a weight between 0 and 1."""
        four = jnp.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-1)
        weight = jax.nn.sigmoid(self.psi(jax.nn.relu(self.of_skip(four) + self.of_gating(g))))
        return x * double(weight)
