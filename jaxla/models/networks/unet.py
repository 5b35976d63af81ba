"""U-Net (Ronneberger, Fischer, Brox 2015) with padded convolutions, each followed by BatchNorm or InstanceNorm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, NetworkOptions, option
from jaxla.models.networks.base import PaddedNetwork, check_smallest_size, check_widths
from jaxla.models.ops.layers import ConvolutionUnit, Norm, Upconvolution, logits_layer
from jaxla.models.ops.pooling import max_pool


@dataclass(frozen=True)
class UNetOptions(NetworkOptions):
    """Options of a U-Net.

    Args:
        widths: Channels of each level, finest first.
        norm: Normalise over the `batch`, or over each image (`instance`), which is robust to unusual brightness.
        neighbours: Slices on each side, as near to 2.5 mm apart as possible, that are read as channels (2.5D).
    """

    arch: ClassVar[str] = "unet"

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    norm: Norm = "batch"
    neighbours: int = 0

    def resolve(self) -> Self:
        check_widths(option("model.widths"), self.widths)
        if self.neighbours < 0:
            where = option("model.neighbours", self.neighbours)
            raise InputError(where, "must not be negative", "Use 1, for example, or 0 for no neighbours.")
        return self

    def check_size(self, option_name: str, size: int) -> None:
        coarsest = 2 if self.norm == "instance" else 1  # pixels; the deviation of a single pixel is 0
        check_smallest_size(option_name, size, coarsest * 2 ** (len(self.widths) - 1), self.arch)

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> UNet:
        return UNet(self.widths, outputs, norm=self.norm, neighbours=self.neighbours, dtype=dtype, rngs=rngs)


class UNet(PaddedNetwork):
    """Max-pooling halves the image at each level, transposed convolutions double it again, and skips join the levels.

    Args:
        widths: channels of each level, finest first.
        neighbours: the images have 1 + 2 · `neighbours` channels.
    """

    def __init__(
        self,
        widths: Sequence[int],
        outputs: int,
        *,
        norm: Norm = "batch",
        neighbours: int = 0,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        channels = 1 + 2 * neighbours
        self.CHANNELS = (channels,)
        convolutions = partial(DoubleConvolution, norm=norm, dtype=dtype, rngs=rngs)
        self.down = nnx.List([convolutions(i, o) for i, o in pairwise((channels, *widths))])
        self.up = nnx.List([Upconvolution(o, i, dtype=dtype, rngs=rngs) for i, o in pairwise(widths)])
        self.join = nnx.List([convolutions(2 * width, width) for width in widths[:-1]])
        self.logits = logits_layer(widths[0], outputs, 1, dtype, rngs)
        self.multiple = 2 ** (len(widths) - 1)

    def padded_logits(self, images: jax.Array, present: jax.Array | None) -> jax.Array:
        levels = [self.down[0](images, present)]
        for convolutions in self.down[1:]:
            levels.append(convolutions(max_pool(levels[-1]), present))
        x = levels.pop()
        for level in reversed(range(len(levels))):
            skip = self.transform_skip(level, levels[level], x)
            x = self.join[level](jnp.concatenate([skip, self.up[level](x)], axis=-1), present)
        return self.logits(x)

    def transform_skip(self, level: int, x: jax.Array, coarser: jax.Array) -> jax.Array:
        """Return the features that the decoder receives for a level's features x [B, H, W, C]; here, x itself.

        Args:
            coarser: [B, H/2, W/2, 2C], the decoder's features at the next coarser level.
        """
        return x


class DoubleConvolution(nnx.Module):
    """Two 3×3 convolutions, each followed by a norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, norm: Norm = "batch") -> None:
        self.first = ConvolutionUnit(inputs, outputs, norm=norm, dtype=dtype, rngs=rngs)
        self.second = ConvolutionUnit(outputs, outputs, norm=norm, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Map [B, H, W, C] to [B, H, W, K]."""
        return self.second(self.first(x, present), present)
