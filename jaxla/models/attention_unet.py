"""Attention U-Net (Oktay et al. 2018): a U-Net whose skip connections pass additive attention gates.

A gate weighs each pixel of a skip by what the next coarser level of the decoder has found there: with x the skip and g
that level's features, at half the skip's size,

    weight = sigmoid(ψ relu(W_x x + W_g g + b_g) + b_ψ)        (equation 1 of the paper)

where W_x is a 2×2 convolution with stride 2, which brings x to the grid of g, W_g and ψ are 1×1 convolutions, and the
weights come back to the grid of x bilinearly (figure 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.convolution import LECUN_NORMAL, Upconvolution, convolution, logits_layer
from jaxla.models.decoders import double
from jaxla.models.images import crop, pad_to_multiple, require_images
from jaxla.models.pooling import max_pool
from jaxla.models.unet import DoubleConvolution


class AttentionUNet(nnx.Module):
    """Grey images to logits, as `UNet`, each skip weighed by a gate.

    Args:
        widths: channels of each level, finest first; between two levels the image is halved.
        outputs: K, channels of the logits.
        dtype: of the computation; parameters, statistics and logits are float32.
    """

    def __init__(self, widths: Sequence[int], outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.down = nnx.List([DoubleConvolution(i, o, dtype, rngs) for i, o in pairwise((1, *widths))])
        self.gates = nnx.List([Gate(i, o, dtype, rngs) for i, o in pairwise(widths)])
        self.up = nnx.List([Upconvolution(o, i, dtype=dtype, rngs=rngs) for i, o in pairwise(widths)])
        self.join = nnx.List([DoubleConvolution(2 * width, width, dtype, rngs) for width in widths[:-1]])
        self.logits = logits_layer(widths[0], outputs, 1, dtype, rngs)
        self.multiple = 2 ** (len(widths) - 1)  # of which the sides must be; other images are padded

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """[B, H, W, 1] grey values in 0..1 -> logits [B, H, W, K] float32, for any H and W of at least `multiple`.

        Args:
            present: [B] bool, which of them BatchNorm's statistics are of while it trains; by default all.

        Raises:
            ValueError: `images` is not [B, H, W, 1] of floating point, or too small.
        """
        require_images(images, least=self.multiple, channels=(1,))
        x = pad_to_multiple(images, self.multiple)
        levels = [self.down[0](x, present)]
        for convolutions in self.down[1:]:
            levels.append(convolutions(max_pool(levels[-1]), present))
        x = levels.pop()
        for gate, up, join in zip(reversed(self.gates), reversed(self.up), reversed(self.join), strict=True):
            skip = gate(levels.pop(), x)
            x = join(jnp.concatenate([skip, up(x)], axis=-1), present)
        return crop(self.logits(x), images.shape[1:3], self.multiple)


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
