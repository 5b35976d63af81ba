"""From a map of tokens to logits at the size of the image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx


class LinearDecoder(nnx.Module):
    """A 1×1 convolution and bilinear upsampling: DINOv2's own linear segmentation head."""

    def __init__(self, width: int, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.classifier = nnx.Linear(width, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """[B, h, w, C] -> logits [B, H, W, K] float32."""
        return resize(self.classifier(tokens).astype(jnp.float32), size)


class ConvolutionalDecoder(nnx.Module):
    """Paper 1's decoder: LinearClassifierToken, a 7×7 convolution, then ×2 stages up to about the image's size.

    The paper names the token classifier (a 1×1 convolution that sets the channel count) and several convolution and
    upsampling stages; widths, kernels and the last resizing are this package's choice (docs/paper1.md).

    Args:
        widths: channels after the token classifier, then after each ×2 stage.
        outputs: K, channels of the logits.
    """

    def __init__(
        self, width: int, widths: Sequence[int], outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.token_classifier = nnx.Linear(width, widths[0], dtype=dtype, rngs=rngs)
        self.mix = nnx.Conv(widths[0], widths[0], (7, 7), padding=3, dtype=dtype, rngs=rngs)
        self.stages = nnx.List([Upsampling(i, o, dtype, rngs) for i, o in pairwise(widths)])
        self.logits = nnx.Conv(widths[-1], outputs, (3, 3), padding=1, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
        """[B, h, w, C] -> logits [B, H, W, K] float32."""
        x = self.mix(jax.nn.selu(self.token_classifier(tokens)))
        for stage in self.stages:
            x = stage(x)
        return self.logits(resize(x, size))


class Upsampling(nnx.Module):
    """Bilinear ×2, 3×3 convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.convolution = nnx.Conv(inputs, outputs, (3, 3), padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, _ = x.shape
        return jax.nn.relu(self.norm(self.convolution(resize(x, (2 * height, 2 * width)))))


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear, half-pixel centres, not antialiased: PyTorch's `interpolate(align_corners=False)`. [B, h, w, C]."""
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear", antialias=False)
