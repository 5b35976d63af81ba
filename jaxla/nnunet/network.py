"""nnU-Net's plain convolutional U-Net, of two or three axes, as a plan says (Isensee, Jaeger et al. 2021).

On the way down each stage begins with a convolution of the stage's stride; convolutions are followed by InstanceNorm
and LeakyReLU. Reference code: dynamic_network_architectures 0.4.4, `PlainConvUNet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, NetworkOptions, option
from jaxla.models.ops.images import crop, pad_to_multiple, require_images
from jaxla.models.ops.layers import Upconvolution, convolution_nd
from jaxla.models.ops.norms import InstanceNorm
from jaxla.nnunet.plan import OF_ARCHITECTURE, Configuration, Plan, read_plan

SLOPE = 0.01  # of LeakyReLU below zero
HE_NORMAL = jax.nn.initializers.variance_scaling(2 / (1 + SLOPE**2), "fan_in", "normal")  # He et al. 2015
HE_NORMAL_UP = jax.nn.initializers.variance_scaling(2 / (1 + SLOPE**2), "fan_in", "normal", in_axis=-1, out_axis=0)


@dataclass(frozen=True)
class NNUNetOptions(NetworkOptions):
    """Options of nnU-Net's network, which follows a plan.

    Args:
        arch: Configuration of the plan: two-dimensional, or three-dimensional at full resolution.
        plan: Plan file, from `python -m jaxla.plan` or nnU-Net itself. Default: plan from the run's own cases.
        memory_gb: GPU memory to plan for, in GB; less memory gives smaller patches.
    """

    sample: ClassVar[str] = "patches"

    arch: Literal["nnunet_2d", "nnunet_3d_fullres"] = "nnunet_2d"
    plan: str = ""
    memory_gb: float = 8.0

    def resolve(self) -> Self:
        if not 0 < self.memory_gb < math.inf:
            raise InputError(option("model.memory_gb", self.memory_gb), "not a positive number", "Use 8, for example.")
        if self.plan:
            self.configuration()
        return self

    def unread(self) -> set[str]:
        return {"memory_gb"} if self.plan else set()

    def configuration(self, plan: Plan | None = None, batch_size: int = 0) -> Configuration:
        """Return the plan's configuration that the network is built on.

        Args:
            plan: used if the options name no file.
            batch_size: replaces the plan's unless it is 0.

        Raises:
            InputError: there is no plan, or it lacks the configuration.
        """
        if plan is None and not self.plan:
            raise InputError(
                option("model.plan"), f"{self.arch} needs a plan", "Give the file that python -m jaxla.plan writes."
            )
        where = option("model.plan", self.plan) if self.plan else "the plan of these scans"
        planned = (plan or read_plan(Path(self.plan))).configuration(OF_ARCHITECTURE[self.arch], where)
        return planned._replace(batch_size=batch_size or planned.batch_size)

    def prerequisites(self, key: jax.Array, dtype: jnp.dtype, cache_dir: Path | None, plan: Plan | None) -> dict:
        return {"configuration": self.configuration(plan)}

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, configuration: Configuration) -> NNUNet:
        return nnx.jit(lambda rngs: NNUNet(configuration, outputs, dtype=dtype, rngs=rngs))(rngs)


class NNUNet(nnx.Module):
    """Normalised images to logits, and to logits of every coarser resolution for deep supervision.

    Args:
        configuration: of a plan.
        outputs: K, channels of the logits. Where it is 1 the network has two, background and structure, as nnU-Net has;
            the one logit is the difference between them, whose sigmoid is the structure's softmax.
        dtype: of the computation; parameters, statistics and logits are float32.
    """

    def __init__(
        self, configuration: Configuration, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        c, axes = configuration, len(configuration.patch_size)
        self.down = nnx.List()
        inputs = 1
        for features, kernel, strides, count in zip(
            c.features_per_stage, c.kernel_sizes, c.strides, c.n_conv_per_stage, strict=True
        ):
            self.down.append(_stage(inputs, features, kernel, strides, count, dtype, rngs))
            inputs = features
        self.up, self.join, self.logits = nnx.List(), nnx.List(), nnx.List()  # coarsest first
        for level, count in zip(reversed(range(c.n_stages - 1)), c.n_conv_per_stage_decoder, strict=True):
            below, features = c.features_per_stage[level + 1], c.features_per_stage[level]
            up = {"strides": c.strides[level + 1], "kernel_init": HE_NORMAL_UP}
            self.up.append(Upconvolution(below, features, **up, dtype=dtype, rngs=rngs))
            ones = (1,) * axes
            self.join.append(_stage(2 * features, features, c.kernel_sizes[level], ones, count, dtype, rngs))
            full = jnp.promote_types(dtype, jnp.float32)
            self.logits.append(_convolution(features, max(2, outputs), ones, ones, full, rngs))
        self.outputs = outputs
        self.supervised = False  # at every resolution, while it trains
        self.multiples = tuple(map(math.prod, zip(*c.strides, strict=True)))  # of which the sides must be

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array | list[jax.Array]:
        """Logits [B, H, W, K] or [B, D, H, W, K] float32; in training a list, of every resolution, the finest first.

        Images whose sides the strides do not divide are padded to the next multiples; in training they are refused.

        Args:
            images: [B, H, W, 1] or [B, D, H, W, 1], as the plan has axes; mean 0, standard deviation 1.
            present: which images statistics are of; there are none here.

        Raises:
            ValueError: `images` is of another shape, not of floating point, or too small.
        """
        if self.supervised:
            return self.of_all_resolutions(images)
        require_images(images, min_size=self.multiples, channels=(1,), axes=len(self.multiples))
        *_, x = self._levels(pad_to_multiple(images, self.multiples))
        return crop(self._logits(-1, x), images.shape[1:-1], self.multiples)

    def train(self, **attributes: Any) -> None:
        """As of every module; every resolution gives logits."""
        super().train(**attributes)
        self.supervised = True

    def eval(self, **attributes: Any) -> None:
        """As of every module; the finest resolution alone gives logits."""
        super().eval(**attributes)
        self.supervised = False

    def of_all_resolutions(self, images: jax.Array) -> list[jax.Array]:
        """The logits of every resolution, the finest first; the sides of `images` are multiples.

        Raises:
            ValueError: as for calling, or the sides are no multiples.
        """
        require_images(images, self.multiples, channels=(1,), axes=len(self.multiples))
        levels = self._levels(images)
        return [self._logits(i, levels[i]) for i in reversed(range(len(levels)))]

    def _levels(self, images: jax.Array) -> list[jax.Array]:
        """The features on the way up, the coarsest first."""
        skips, x = [], images
        for units in self.down:
            for unit in units:
                x = unit(x)
            skips.append(x)
        levels = []
        skips.pop()
        for up, units in zip(self.up, self.join, strict=True):
            x = jnp.concatenate([up(x), skips.pop()], axis=-1)
            for unit in units:
                x = unit(x)
            levels.append(x)
        return levels

    def _logits(self, level: int, x: jax.Array) -> jax.Array:
        logits = self.logits[level](x)
        return logits if self.outputs > 1 else logits[..., 1:] - logits[..., :1]


class Unit(nnx.Module):
    """A convolution, InstanceNorm, LeakyReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Sequence[int], strides: Sequence[int], dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.convolution = _convolution(inputs, outputs, kernel, strides, dtype, rngs)
        self.norm = InstanceNorm(outputs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, …, C] -> [B, …/stride, K]."""
        return jax.nn.leaky_relu(self.norm(self.convolution(x)), SLOPE)


def _stage(
    inputs: int,
    features: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    count: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.List:
    first = Unit(inputs, features, kernel, strides, dtype, rngs)
    ones = (1,) * len(strides)
    return nnx.List([first, *(Unit(features, features, kernel, ones, dtype, rngs) for _ in range(count - 1))])


def _convolution(
    inputs: int, outputs: int, kernel: Sequence[int], strides: Sequence[int], dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Conv:
    return convolution_nd(
        inputs, outputs, kernel, strides, bias=True, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs
    )
