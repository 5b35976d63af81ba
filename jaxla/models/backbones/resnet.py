"""ResNet-50 and ResNet-152 (He et al. 2016) as encoders: the features of the stem and of the four stages.

Reference code: torchvision 0.29, `models/resnet.py`. As in torchvision ("v1.5"), the first 3×3 convolution of a stage
has the stride, not the 1×1 convolution before it as in the paper. The classifier is omitted.

The blocks of a stage after its first are one stacked module run by `jax.lax.scan`, so that the 36 blocks of
ResNet-152 compile as fast as two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.models.ops.images import require_images
from jaxla.models.ops.layers import convolution
from jaxla.models.ops.norms import BatchNorm
from jaxla.models.ops.pooling import max_pool_overlapping

WIDTH = 64  # channels of the stem's features
EXPANSION = 4  # ratio of a block's output channels to the channels of its 3×3 convolution


@dataclass(frozen=True)
class Variant:
    """One architecture."""

    blocks: tuple[int, int, int, int]  # blocks per stage, at least two
    licence: str = "BSD-3-Clause"  # licence of the released weights


VARIANTS = {
    "resnet50": Variant(blocks=(3, 4, 6, 3)),
    "resnet152": Variant(blocks=(3, 8, 36, 3)),
}


class Bottleneck(nnx.Module):
    """A 1×1, a 3×3 and a 1×1 convolution, added to their input.

    Args:
        bottleneck_width: channels of the 3×3 convolution; the output has `EXPANSION` times as many.
        first: whether this is the first block of a stage, which changes channels and size and therefore adapts its
            input with a 1×1 convolution.
    """

    def __init__(
        self,
        inputs: int,
        bottleneck_width: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        first: bool = False,
    ) -> None:
        outputs = EXPANSION * bottleneck_width
        self.conv1, self.bn1 = _conv_norm(inputs, bottleneck_width, 1, dtype, rngs)
        self.conv2, self.bn2 = _conv_norm(bottleneck_width, bottleneck_width, 3, dtype, rngs, stride)
        self.conv3, self.bn3 = _conv_norm(bottleneck_width, outputs, 1, dtype, rngs)
        self.first = first
        if first:
            self.downsample_conv, self.downsample_bn = _conv_norm(inputs, outputs, 1, dtype, rngs, stride)

    def __call__(self, x: jax.Array, present: jax.Array | None) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x), present))
        y = jax.nn.relu(self.bn2(self.conv2(y), present))
        y = self.bn3(self.conv3(y), present)
        return jax.nn.relu(y + (self.downsample_bn(self.downsample_conv(x), present) if self.first else x))


class Stage(nnx.Module):
    """A first block that changes channels and size, and a stack of further blocks."""

    def __init__(
        self, blocks: int, inputs: int, bottleneck_width: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.first = Bottleneck(inputs, bottleneck_width, dtype, rngs, stride=stride, first=True)
        stack = nnx.vmap(lambda rngs: Bottleneck(EXPANSION * bottleneck_width, bottleneck_width, dtype, rngs))
        self.rest = nnx.split_rngs(splits=blocks - 1)(stack)(rngs)

    def __call__(self, x: jax.Array, present: jax.Array | None) -> jax.Array:
        graph, state = nnx.split(self.rest)

        def step(x: jax.Array, state: nnx.State) -> tuple[jax.Array, nnx.State]:
            block = nnx.merge(graph, state)
            return block(x, present), nnx.state(block, nnx.BatchStat)

        x, statistics = jax.lax.scan(step, self.first(x, present), state)
        if not self.rest.bn1.use_running_average:  # training
            nnx.update(self.rest, statistics)
        return x


class ResNet(nnx.Module):
    """Map ImageNet-normalised images [B, H, W, 3] to features in `dtype`; in evaluation mode until `train()`."""

    def __init__(self, variant: Variant, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.variant = variant
        self.conv1, self.bn1 = _conv_norm(3, WIDTH, 7, dtype, rngs, stride=2)
        blocks = variant.blocks
        self.layer1 = Stage(blocks[0], WIDTH, WIDTH, 1, dtype, rngs)  # the max-pool before it already has a stride
        self.layer2 = Stage(blocks[1], 4 * WIDTH, 2 * WIDTH, 2, dtype, rngs)
        self.layer3 = Stage(blocks[2], 8 * WIDTH, 4 * WIDTH, 2, dtype, rngs)
        self.layer4 = Stage(blocks[3], 16 * WIDTH, 8 * WIDTH, 2, dtype, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the last stage's features [B, H/32, W/32, 2048], sides rounded up.

        Raises:
            ValueError: `images` is not [B, H, W, 3] floating point.
        """
        return self.intermediate(images)[-1]

    def intermediate(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Return the features [B, h, w, C] of the stem after its max-pool and of the four stages.

        Their sides are 1/4, 1/4, 1/8, 1/16 and 1/32 of the image's, rounded up; C is 64, 256, 512, 1024 and 2048.

        In training mode BatchNorm's statistics change in place, so the caller must apply jit.

        Raises:
            ValueError: `images` is invalid (see `__call__`).
        """
        return self.pyramid(images)[1:]

    def pyramid(self, images: jax.Array, present: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Return the stem's features before their max-pool, at half the image's size, then those of `intermediate`.

        BatchNorm's training statistics are computed from the images `present`, [B] bool (default: all).
        """
        require_images(images)
        if self.bn1.use_running_average:  # evaluation
            return _pyramid(*nnx.split(self), images)
        return self.run(images, present)

    def run(self, images: jax.Array, present: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Compute `pyramid`; the caller must apply jit."""
        stem = jax.nn.relu(self.bn1(self.conv1(images), present))
        features = [stem, max_pool_overlapping(stem)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(stage(features[-1], present))
        return tuple(features)


# Jitted here, so that a call outside of jit does not compile the scans each time.
@partial(jax.jit, static_argnums=0)
def _pyramid(graph: nnx.GraphDef, state: nnx.State, images: jax.Array) -> tuple[jax.Array, ...]:
    return nnx.merge(graph, state).run(images)


def _conv_norm(inputs: int, outputs: int, side: int, dtype: jnp.dtype, rngs: nnx.Rngs, stride: int = 1) -> tuple:
    """Return a convolution and its BatchNorm."""
    return convolution(inputs, outputs, side, stride=stride, dtype=dtype, rngs=rngs), BatchNorm(outputs, dtype=dtype)
