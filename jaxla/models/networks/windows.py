"""Paper 3's network: 2D features of every slice, decoded in 3D sub-cube by sub-cube ("windows").

*2D DINOv3 features for 3D segmentation of neonatal brain MR* (Usman, Khan, Qasim Syed; arXiv 2602.23962). Stated are
the frozen 2D transformer, the depth embedding, windows of the volume that do not overlap, a lightweight decoder run on
one window at a time, and the parts put together again; what else stands here is this package's choice (docs/paper3.md).

Each slice is encoded once and whole, and windows are cut from the features. The decoder's convolutions reach three
slices deep; upsampling is trilinear by 1 along the slices, which have their own resolution from the start, and by 2 in
the plane. GroupNorm's statistics are of one window, so nothing of a window depends on another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.cli.terminal import plural
from jaxla.config import InputError, option
from jaxla.models.backbones import TRANSFORMERS
from jaxla.models.backbones.vision_transformer import VisionTransformer
from jaxla.models.networks.base import TransformerOptions, check_widths
from jaxla.models.ops.images import require_images, three_channels
from jaxla.models.ops.layers import LECUN_NORMAL, convolution_of_axes
from jaxla.models.ops.norms import GroupNorm
from jaxla.models.ops.resizing import double, resize
from jaxla.models.ops.sub_cubes import Counts, SubCubes

ENCODED_TOGETHER = 16  # slices of a volume, at most: what the backbone makes on the way is of these alone
LEVELS = 4  # of features: a quarter, half, three quarters and all of the backbone's depth


@dataclass(frozen=True)
class WindowOptions(TransformerOptions):
    """Options of paper 3's network.

    Args:
        arch: Architecture of the backbone; `python -m convert_weights --arch=list` lists those with released weights.
        weights: A converted `.safetensors` file, or `random`. Default: `<cache>/weights/<arch>.safetensors`.
        backbone: Keep the backbone `frozen` as loaded, or train it too (`finetuned`).
        decoder_widths: Channels of the decoder's four levels, deepest features first.
        windows: Windows per volume: along the slices (`2`), or along slices, rows and columns (`2x2x2`).
        depth_places: Entries of the depth embedding, interpolated to a volume's slices; 0 for none.
        convolutions: Decoder convolutions over neighbouring slices (`3d`), or within each slice (`2d`).
    """

    sample: ClassVar[str] = "volumes"

    arch: str = "dinov3_vitb16"
    decoder_widths: tuple[int, ...] = (128, 64, 32, 16)
    windows: str = "1"
    depth_places: int = 32
    convolutions: Literal["3d", "2d"] = "3d"

    def resolve(self) -> Self:
        self.window_counts()
        if self.depth_places < 0:
            raise InputError(option("model.depth_places", self.depth_places), "negative", "Use 0 or more.")
        meaning = ", one for each level of features"
        check_widths(option("model.decoder_widths"), self.decoder_widths, LEVELS, meaning)
        return super().resolve()

    def window_counts(self) -> Counts:
        """Return the number of windows along slices, rows and columns.

        Raises:
            InputError: `windows` has another form.
        """
        if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}x[1-9]\d{0,3})?", self.windows):
            raise InputError(
                option("model.windows", self.windows),
                "not a number of windows",
                "Use 2 for two along the slices, or 2x2x2 for two along slices, rows and columns.",
            )
        depth, rows, columns = map(int, [*self.windows.split("x"), "1", "1"][:3])
        return depth, rows, columns

    def check_size(self, option_name: str, size: int) -> None:
        super().check_size(option_name, size)
        _, rows, columns = self.window_counts()
        if max(rows, columns) > (patches := size // TRANSFORMERS[self.arch].patch):
            raise InputError(
                f"{option_name}={size}",
                f"{patches} x {patches} patches are fewer than {rows} x {columns} windows",
                f"Use fewer {option('model.windows')}.",
            )

    def check_depth(self, scan: str | Path, slices: int) -> None:
        """Raise an InputError unless a scan has a slice for each window along the slices."""
        if slices < (depth := self.window_counts()[0]):
            raise InputError(
                scan,
                f"has {plural(slices, 'slice')}, fewer than the {depth} windows along the slices",
                f"Use fewer {option('model.windows')}, or leave the scan out.",
            )

    def describe_depth(self, slice_counts: Collection[int]) -> str:
        """Describe how the depth embedding is interpolated to volumes with these numbers of slices; "" if it is not."""
        if not self.depth_places or set(slice_counts) == {self.depth_places}:
            return ""
        span = " to ".join(map(str, sorted({min(slice_counts), max(slice_counts)})))
        return f"the depth embedding's {self.depth_places} entries are interpolated to {span} slices"

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VisionTransformer) -> WindowSegmenter:
        decoder = nnx.jit(
            lambda rngs: WindowDecoder(
                backbone.variant.width, self.decoder_widths, outputs, places=self.depth_places,
                slicewise=self.convolutions == "2d", dtype=dtype, rngs=rngs,
            )
        )(rngs)  # fmt: skip
        return WindowSegmenter(backbone, decoder, self.window_counts())


class FeatureWindows(nnx.Module):
    """Features of volumes to logits, window by window: a `WindowSegmenter` without its backbone.

    Its parts are methods of their own, for training that runs them one at a time (`jaxla/training/two_pass.py`).

    Args:
        size: H, W of the slices.
        counts: of windows along slices, rows and columns.
    """

    def __init__(self, decoder: WindowDecoder, size: tuple[int, int], counts: Counts) -> None:
        self.decoder = decoder
        self.size = size
        self.counts = counts

    def __call__(self, inputs: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Features [B, D, 4, h, w, C] to logits [B, D, H, W, K] float32, the memory of one window at a time.

        Args:
            present: [B, D] bool, which slices are the volume's, the first ones; others only fill it up, change nothing
                of it, and get logits of 0. By default all are.
        """
        features = self.encode(inputs)
        cubes = self.divide(features, present)
        parts = jax.lax.map(lambda number: self.decode(cubes.cut(features, number), cubes, number), cubes.numbers)
        return self.finish(cubes.assemble(parts), self.size_of(inputs))

    def encode(self, inputs: jax.Array) -> jax.Array:
        """What windows are cut from: [B, D, 4, h, w, C]."""
        return inputs

    def size_of(self, inputs: jax.Array) -> tuple[int, int]:
        """H, W of the slices."""
        return self.size

    def divide(self, features: jax.Array, present: jax.Array | None = None) -> SubCubes:
        """How volumes are divided into windows.

        Raises:
            ValueError: there are more windows than slices, rows or columns.
        """
        batch, depth, _, *plane, _ = features.shape
        places = (depth, *plane)
        if any(n < k for n, k in zip(places, self.counts, strict=True)):
            asked, found = ("×".join(map(str, numbers)) for numbers in (self.counts, places))
            raise ValueError(
                f"volumes of {found} slices, rows and columns of patches: fewer than the network's {asked} windows"
            )
        slices = jnp.full(batch, depth) if present is None else present.sum(1)
        return SubCubes(self.counts, places, slices)

    def decode(self, part: jax.Array, cubes: SubCubes, number: int | jax.Array) -> jax.Array:
        """One window's features [B, d, 4, h', w', C] to its logits [B, d, 8h', 8w', K] float32."""
        return self.decoder(part, *cubes.slices_of(number), cubes.slices, cubes.plane_of(number))

    def finish(self, logits: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Assembled logits [B, D, 8h, 8w, K] to the size of the slices [B, D, H, W, K]."""
        return _each_slice(lambda x: resize(x, size), logits)


class WindowSegmenter(FeatureWindows):
    """Volumes to logits: every slice encoded once, and decoded in windows."""

    READS_IMAGES = False
    SMALLER_FEATURES = ()

    def __init__(self, backbone: VisionTransformer, decoder: WindowDecoder, counts: Counts) -> None:
        super().__init__(decoder, (0, 0), counts)
        self.backbone = backbone
        depth = backbone.variant.depth
        self.blocks = tuple(-(-depth * level // LEVELS) - 1 for level in range(1, LEVELS + 1))
        self.FEATURES = f"patch tokens of blocks {', '.join(map(str, self.blocks))} after the final norm"

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Logits [B, D, H, W, K] float32.

        Args:
            images: [B, D, H, W, 1] grey values in 0..1, or [B, D, H, W, 3] already ImageNet-normalised; H, W multiples
                of the patch size.
            present: as of `FeatureWindows`.

        Raises:
            ValueError: `images` is of another shape, not of floating point, or there are more windows than slices.
        """
        require_images(images, (1, *(self.backbone.variant.patch,) * 2), channels=(1, 3), axes=3)
        return super().__call__(images, present)

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Volumes [B, D, H, W, 1 or 3] -> [B, D, 4, h, w, C]."""
        depth = inputs.shape[1]
        parts = -(-depth // ENCODED_TOGETHER)
        if parts == 1:
            return _each_slice(self.features, inputs)
        together = -(-depth // parts)
        inputs = jnp.pad(inputs, ((0, 0), (0, parts * together - depth), *((0, 0),) * 3))
        inputs = jnp.moveaxis(inputs.reshape(len(inputs), parts, together, *inputs.shape[2:]), 1, 0)
        features = jnp.moveaxis(jax.lax.map(partial(_each_slice, self.features), inputs), 0, 1)
        return features.reshape(len(features), -1, *features.shape[3:])[:, :depth]

    def features(self, images: jax.Array) -> jax.Array:
        """What the decoder reads of slices [B, H, W, 1 or 3]: [B, 4, h, w, C] in the computation's dtype."""
        return jnp.stack(self.backbone.intermediate(three_channels(images), self.blocks, norm=True), axis=1)

    def size_of(self, inputs: jax.Array) -> tuple[int, int]:
        height, width = inputs.shape[2:4]
        return height, width

    def on_features(self, size: tuple[int, int]) -> FeatureWindows:
        """The rest of this network, for features of slices of H, W = `size` that were computed before."""
        return FeatureWindows(self.decoder, size, self.counts)


class WindowDecoder(nnx.Module):
    """The light decoder of one window: from the deepest level's features, by three ×2 stages, to logits.

    Each stage adds the next shallower level. A level is projected by a 1×1×1 convolution and told by a depth embedding
    which slice it is of; then follow a 3×3×3 convolution, GroupNorm and ReLU.

    Args:
        width: C, channels of the features.
        widths: channels after the first level, then after each ×2 stage.
        outputs: K, channels of the logits.
        places: of the depth embedding; 0 leaves it out.
        slicewise: whether each slice is decoded by itself, by 1×3×3 convolutions.
    """

    def __init__(
        self,
        width: int,
        widths: Sequence[int],
        outputs: int,
        *,
        places: int,
        slicewise: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.slicewise = slicewise
        inputs = (widths[0], *widths[:-1])  # of each level, the deepest first
        self.levels = nnx.List([Level(width, i, places, dtype=dtype, rngs=rngs) for i in inputs])
        depth = 1 if slicewise else 3
        self.units = nnx.List([Unit(i, o, depth, dtype=dtype, rngs=rngs) for i, o in pairwise((widths[0], *widths))])
        full = jnp.promote_types(dtype, jnp.float32)
        self.logits = nnx.Linear(widths[-1], outputs, dtype=full, kernel_init=LECUN_NORMAL, rngs=rngs)

    def __call__(
        self,
        features: jax.Array,
        numbers: jax.Array,
        present: jax.Array,
        slices: jax.Array,
        plane: tuple[int | jax.Array, int | jax.Array] | None = None,
    ) -> jax.Array:
        """[B, d, 4, h, w, C] -> [B, d, 8h, 8w, K] float32.

        Args:
            numbers: [B, d], which slice of the volume each is.
            present: [B, d] bool, whether it is one; others change nothing of those that are.
            slices: [B], how many the volume has.
            plane: how many rows and columns are the window's, the first ones; others repeat the last one, and change
                nothing either. By default all are.
        """
        whole = features.shape[:2]
        share = (numbers + 0.5) / jnp.maximum(slices, 1)[:, None]  # of the volume's depth that lies before its middle
        if self.slicewise:
            features, share, present = (x.reshape(-1, 1, *x.shape[2:]) for x in (features, share, present))
        x = None
        for i, (level, unit) in enumerate(zip(self.levels, self.units, strict=True)):
            projected = level(features[:, :, LEVELS - 1 - i], share)
            if x is None:
                x = projected
            else:
                x = _each_slice(double, x if plane is None else _repeat_last(x, *(side << (i - 1) for side in plane)))
                x = x + _each_slice(lambda y, size=x.shape[2:4]: resize(y, size), projected)
            x = unit(x, present, plane and tuple(side << i for side in plane))
        logits = self.logits(x)
        return logits.reshape(*whole, *logits.shape[2:])


class Level(nnx.Module):
    """One level's features projected, and its depth embedding added.

    Args:
        places: of the embedding, which is interpolated to the slices of a volume; 0 leaves it out.
    """

    def __init__(self, width: int, outputs: int, places: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.project = nnx.Linear(width, outputs, dtype=dtype, rngs=rngs)
        self.places = places
        if places:
            self.depth = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (places, outputs)))

    def __call__(self, features: jax.Array, share: jax.Array) -> jax.Array:
        """[B, d, h, w, C] -> [B, d, h, w, outputs]; `share` [B, d] in 0..1 says where in the volume's depth each is."""
        x = self.project(features)
        if not self.places:
            return x
        place = jnp.clip(share * self.places - 0.5, 0, self.places - 1)
        before = jnp.floor(place).astype(jnp.int32)
        beyond = (place - before)[..., None]
        depth = self.depth[...]
        embedded = (1 - beyond) * depth[before] + beyond * depth[jnp.minimum(before + 1, self.places - 1)]
        return x + embedded[:, :, None, None].astype(x.dtype)


class Unit(nnx.Module):
    """A convolution of 3×3 pixels and `depth` slices, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.convolution = convolution_of_axes(inputs, outputs, (depth, 3, 3), (1, 1, 1), dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(outputs, dtype=dtype)

    def __call__(
        self, x: jax.Array, present: jax.Array, plane: tuple[int | jax.Array, int | jax.Array] | None
    ) -> jax.Array:
        """[B, d, h, w, C] -> [B, d, h, w, K]; slices not `present`, [B, d], and beyond `plane` are zeros around it."""
        present = present[:, :, None, None]
        if plane is not None:
            rows, columns = (jnp.arange(n) < own for n, own in zip(x.shape[2:4], plane, strict=True))
            present = present & rows[:, None] & columns
        x = jnp.where(present[..., None], x, 0)
        return jax.nn.relu(self.norm(self.convolution(x), present))


def _repeat_last(x: jax.Array, *own: int | jax.Array) -> jax.Array:
    """[B, d, h, w, C] with the last one of its own rows and columns in place of those beyond, as at a border."""
    for axis, count in enumerate(own, start=2):
        x = jnp.take(x, jnp.minimum(jnp.arange(x.shape[axis]), count - 1), axis=axis, mode="clip")
    return x


def _each_slice(function: Callable[[jax.Array], jax.Array], volumes: jax.Array) -> jax.Array:
    """`function` of slices [B, …] for volumes of them [B, D, …]."""
    results = function(volumes.reshape(-1, *volumes.shape[2:]))
    return results.reshape(*volumes.shape[:2], *results.shape[1:])
