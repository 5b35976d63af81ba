"""nnU-Net's plain convolutional U-Net in 2D or 3D, built from a plan (Isensee, Jaeger et al. 2021).

Each encoder stage begins with a convolution of the stage's stride; InstanceNorm and LeakyReLU follow every convolution.
Reference code: dynamic_network_architectures 0.4.4, `PlainConvUNet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError, NetworkOptions, option
from jaxla.models.ops.images import crop, pad_to_multiple, require_images
from jaxla.models.ops.layers import Upconvolution, convolution_nd
from jaxla.models.ops.norms import InstanceNorm
from jaxla.nnunet.plan import ARCH_CONFIGURATIONS, DEFAULT_MEMORY_GB, Configuration, Plan, read_plan

SLOPE = 0.01  # slope of LeakyReLU for negative values
HE_NORMAL = jax.nn.initializers.variance_scaling(2 / (1 + SLOPE**2), "fan_in", "normal")  # He et al. 2015
HE_NORMAL_UP = jax.nn.initializers.variance_scaling(2 / (1 + SLOPE**2), "fan_in", "normal", in_axis=-1, out_axis=0)

_make_convolution = partial(convolution_nd, bias=True, kernel_init=HE_NORMAL)


@dataclass(frozen=True)
class NNUNetOptions(NetworkOptions):
    """Options of nnU-Net's network, which follows a plan.

    Args:
        arch: Configuration of the plan: two-dimensional, or three-dimensional at full resolution.
        plan: Plan file, from `python -m jaxla.plan` or nnU-Net itself. Default: a plan made from the run's cases.
        memory_gb: GPU memory to plan for, in GB; less memory gives smaller patches.
    """

    sample: ClassVar[str] = "patches"
    needs_plan: ClassVar[bool] = True

    arch: Literal["nnunet_2d", "nnunet_3d_fullres"] = "nnunet_2d"
    plan: str = ""
    memory_gb: float = DEFAULT_MEMORY_GB

    def resolve(self) -> Self:
        if not 0 < self.memory_gb < math.inf:
            raise InputError(option("model.memory_gb", self.memory_gb), "not a positive number", "Use 8, for example.")
        if self.plan and self.memory_gb != DEFAULT_MEMORY_GB:
            problem = f"has no effect, because {option('model.plan')} is set"
            raise InputError(option("model.memory_gb"), problem, "Remove one of the two.")
        if self.plan:
            self.configuration()
        return self

    def unread(self) -> set[str]:
        return {"memory_gb"} if self.plan else set()

    def configuration(self, plan: Plan | None = None, batch_size: int = 0) -> Configuration:
        """Return the network's configuration in `plan`, or in the options' plan file; `batch_size` replaces the plan's.

        Raises:
            InputError: the plan is missing, or lacks the configuration.
        """
        if plan is None and not self.plan:
            problem = f"{self.arch} needs a plan"
            raise InputError(option("model.plan"), problem, "Pass the file that python -m jaxla.plan writes.")
        where = option("model.plan", self.plan) if self.plan else "the plan of these scans"
        planned = (plan or read_plan(Path(self.plan))).configuration(ARCH_CONFIGURATIONS[self.arch], where)
        return planned._replace(batch_size=batch_size or planned.batch_size)

    def prerequisites(self, key: jax.Array, dtype: jnp.dtype, cache_dir: Path | None, plan: Plan | None) -> dict:
        return {"configuration": self.configuration(plan)}

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, configuration: Configuration) -> NNUNet:
        return NNUNet(configuration, outputs, dtype=dtype, rngs=rngs)


class NNUNet(nnx.Module):
    """A U-Net that maps normalised images to logits; in training, to logits at every resolution (deep supervision).

    Args:
        configuration: a configuration of a plan.
        outputs: K, channels of the logits. With K = 1 the network has two channels inside, background and structure, as
            nnU-Net has. It returns their difference, whose sigmoid is the structure's softmax.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
    """

    def __init__(
        self, configuration: Configuration, outputs: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        c = configuration
        ones = (1,) * len(configuration.patch_size)
        logits_dtype = jnp.promote_types(dtype, jnp.float32)
        self.down = nnx.List()
        inputs = 1
        for features, kernel, strides, count in zip(
            c.features_per_stage, c.kernel_sizes, c.strides, c.n_conv_per_stage, strict=True
        ):
            self.down.append(_make_stage(inputs, features, kernel, strides, count, dtype=dtype, rngs=rngs))
            inputs = features
        self.up, self.join, self.logits = nnx.List(), nnx.List(), nnx.List()  # coarsest first
        for level, count in zip(reversed(range(c.n_stages - 1)), c.n_conv_per_stage_decoder, strict=True):
            coarser, features = c.features_per_stage[level + 1], c.features_per_stage[level]
            strides, kernel = c.strides[level + 1], c.kernel_sizes[level]
            self.up.append(
                Upconvolution(coarser, features, strides=strides, kernel_init=HE_NORMAL_UP, dtype=dtype, rngs=rngs)
            )
            self.join.append(_make_stage(2 * features, features, kernel, ones, count, dtype=dtype, rngs=rngs))
            self.logits.append(_make_convolution(features, max(2, outputs), ones, ones, dtype=logits_dtype, rngs=rngs))
        self.outputs = outputs
        self.deterministic = True  # flax's `train` sets it to False, `eval` to True
        # the sides of images must be multiples of these
        self.multiples = tuple(map(math.prod, zip(*c.strides, strict=True)))

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array | list[jax.Array]:
        """Return logits [B, H, W, K] or [B, D, H, W, K] float32; in training a list, as `multiscale_logits` does.

        Images whose sides are not multiples of `multiples` are padded, except in training.

        Args:
            images: [B, H, W, 1] or [B, D, H, W, 1], with the plan's axes; mean 0, standard deviation 1.
            present: ignored, since the network has no batch statistics.

        Raises:
            ValueError: `images` has another shape, is not floating point, or is too small.
        """
        if not self.deterministic:
            return self.multiscale_logits(images)
        require_images(images, min_size=self.multiples, channels=(1,), axes=len(self.multiples))
        *_, x = self._decode(pad_to_multiple(images, self.multiples))
        return crop(self._logits(-1, x), images.shape[1:-1], self.multiples)

    def multiscale_logits(self, images: jax.Array) -> list[jax.Array]:
        """Return the logits of every resolution, finest first.

        Raises:
            ValueError: as for `__call__`, or the sides of `images` are not multiples of `multiples`.
        """
        require_images(images, self.multiples, channels=(1,), axes=len(self.multiples))
        levels = self._decode(images)
        return [self._logits(i, levels[i]) for i in reversed(range(len(levels)))]

    def _decode(self, images: jax.Array) -> list[jax.Array]:
        """Return the decoder's features, coarsest first."""
        skips = []
        x = images
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
    """Convolution, InstanceNorm and LeakyReLU: [B, …, C] -> [B, …/stride, K]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Sequence[int], strides: Sequence[int], dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.convolution = _make_convolution(inputs, outputs, kernel, strides, dtype=dtype, rngs=rngs)
        self.norm = InstanceNorm(outputs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.leaky_relu(self.norm(self.convolution(x)), SLOPE)


def _make_stage(
    inputs: int, features: int, kernel: Sequence[int], strides: Sequence[int], count: int, **options: Any
) -> nnx.List:
    """Make `count` units; the first has the strides. `options` are dtype and rngs."""
    rest = [(features, (1,) * len(strides))] * (count - 1)
    return nnx.List([Unit(c, features, kernel, s, **options) for c, s in [(inputs, strides), *rest]])
