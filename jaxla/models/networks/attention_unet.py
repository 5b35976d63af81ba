"""Attention U-Net (Oktay et al. 2018): a U-Net whose skip connections pass through additive attention gates.

A gate multiplies each pixel of a skip x by a weight. It computes the weights from x and from g, the decoder's features
at the next coarser level, which have half the size of x:

    weight = sigmoid(ψ relu(W_x x + W_g g + b_g) + b_ψ)        (equation 1 of the paper)

W_x is a 2×2 convolution with stride 2, which brings x to the grid of g. W_g and ψ are 1×1 convolutions. The weights are
resized bilinearly to the grid of x (figure 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.networks.unet import UNet, UNetOptions
from jaxla.models.ops.layers import LECUN_NORMAL, convolution
from jaxla.models.ops.resizing import upsample_2x


@dataclass(frozen=True)
class AttentionUNetOptions(UNetOptions):
    """Options of an Attention U-Net."""

    arch: ClassVar[str] = "attention_unet"

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> AttentionUNet:
        return AttentionUNet(self.widths, outputs, norm=self.norm, neighbours=self.neighbours, dtype=dtype, rngs=rngs)


class AttentionUNet(UNet):
    """A `UNet` with an attention gate on every skip connection; the same inputs and outputs."""

    def __init__(
        self, widths: Sequence[int], outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs, **options: Any
    ) -> None:
        super().__init__(widths, outputs, dtype=dtype, rngs=rngs, **options)
        self.gates = nnx.List([Gate(i, o, dtype, rngs) for i, o in pairwise(widths)])

    def transform_skip(self, level: int, x: jax.Array, coarser: jax.Array) -> jax.Array:
        return self.gates[level](x, coarser)


class Gate(nnx.Module):
    """An additive attention gate. Its intermediate features have as many channels as the skip."""

    def __init__(self, skip_width: int, gating_width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        linear = partial(convolution, side=1, kernel_init=LECUN_NORMAL, dtype=dtype, rngs=rngs)
        self.project_skip = linear(4 * skip_width, skip_width)  # the 2×2 convolution as a product with 4 stacked pixels
        self.project_gating = linear(gating_width, skip_width, bias=True)
        self.psi = linear(skip_width, 1, bias=True)

    def __call__(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Return x [B, 2h, 2w, C] with each pixel multiplied by its weight in 0..1; g is [B, h, w, G]."""
        stacked = jnp.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-1)
        weight = jax.nn.sigmoid(self.psi(jax.nn.relu(self.project_skip(stacked) + self.project_gating(g))))
        return x * upsample_2x(weight)
