"""Paper 3's network: 2D features of every slice, decoded in 3D window by window.

*2D DINOv3 features for 3D segmentation of neonatal brain MR* (Usman, Khan, Qasim Syed; arXiv 2602.23962). The paper
specifies the frozen 2D transformer, the depth embedding, windows that do not overlap, a lightweight decoder that runs
on one window at a time, and the assembly of the windows. All else is this package's choice (docs/paper3.md).

The backbone encodes each slice once, and windows are cut from the features. GroupNorm's statistics are computed
per window, so a window does not depend on the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
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
from jaxla.models.networks.window_decoder import LEVELS, WindowDecoder, map_slices
from jaxla.models.ops.images import require_images, three_channels
from jaxla.models.ops.resizing import resize
from jaxla.models.ops.window_grid import Counts, WindowGrid

MAX_ENCODED_SLICES = 16  # slices that are encoded at once; bounds the memory of the backbone's activations


@dataclass(frozen=True)
class WindowOptions(TransformerOptions):
    """Options of paper 3's network.

    Args:
        decoder_widths: Channels of the decoder's four levels, deepest features first.
        windows: Windows per volume: along the slices (`2`), or along slices, rows and columns (`2x2x2`).
        depth_places: Positions of the depth embedding, interpolated to a volume's slices; 0 for none.
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
            raise InputError(option("model.depth_places", self.depth_places), "must not be negative", "Use 0 or more.")
        meaning = ", one for each level of features"
        check_widths(option("model.decoder_widths"), self.decoder_widths, LEVELS, meaning)
        return super().resolve()

    def window_counts(self) -> Counts:
        """Return the number of windows along slices, rows and columns; raise an InputError for any other format."""
        if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}x[1-9]\d{0,3})?", self.windows):
            fix = "Use 2 for two along the slices, or 2x2x2 for two along slices, rows and columns."
            raise InputError(option("model.windows", self.windows), "not a number of windows", fix)
        depth, rows, columns = map(int, [*self.windows.split("x"), "1", "1"][:3])
        return depth, rows, columns

    def check_size(self, option_name: str, size: int) -> None:
        super().check_size(option_name, size)
        _, rows, columns = self.window_counts()
        if max(rows, columns) > (patches := size // TRANSFORMERS[self.arch].patch):
            problem = f"{patches}x{patches} patches are too few for {rows}x{columns} windows"
            raise InputError(f"{option_name}={size}", problem, f"Use fewer {option('model.windows')}.")

    def check_depth(self, scan: str | Path, slices: int) -> None:
        """Raise an InputError unless a scan has a slice for each window along the slices."""
        if slices < (depth := self.window_counts()[0]):
            problem = f"has {plural(slices, 'slice')}, fewer than the {depth} windows along the slices"
            raise InputError(scan, problem, f"Use fewer {option('model.windows')}, or remove the scan.")

    def describe_depth(self, slice_counts: Collection[int]) -> str:
        """Describe how the depth embedding is interpolated to volumes with these slice counts; "" if it is not."""
        if not self.depth_places or set(slice_counts) == {self.depth_places}:
            return ""
        span = " to ".join(map(str, sorted({min(slice_counts), max(slice_counts)})))
        return f"the depth embedding's {self.depth_places} positions are interpolated to {span} slices"

    def build(self, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, backbone: VisionTransformer) -> WindowSegmenter:
        decoder = WindowDecoder(
            backbone.variant.width, self.decoder_widths, outputs, depth_places=self.depth_places,
            slicewise=self.convolutions == "2d", dtype=dtype, rngs=rngs,
        )  # fmt: skip
        return WindowSegmenter(backbone, decoder, self.window_counts())


class FeatureWindows(nnx.Module):
    """A `WindowSegmenter` without its backbone: maps features of volumes to logits, window by window.

    Its steps are separate methods, because `jaxla.training.two_pass` runs them one at a time.

    Args:
        size: H, W of the slices.
        counts: number of windows along slices, rows and columns.
    """

    def __init__(self, decoder: WindowDecoder, size: tuple[int, int], counts: Counts) -> None:
        self.decoder = decoder
        self.size = size
        self.counts = counts

    def __call__(self, inputs: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Return logits [B, D, H, W, K] float32 from features [B, D, 4, h, w, C], in the memory of one window.

        Args:
            present: [B, D] bool, the slices that belong to the volume, which come first. The others are padding: they
                do not change the volume's logits, and their own logits are 0. Default: all.
        """
        features = self.encode(inputs)
        grid = self.divide(features, present)
        windows = jax.lax.map(lambda index: self.decode(grid.cut(features, index), grid, index), grid.indices)
        return self.finish(grid.assemble(windows), self.slice_size(inputs))

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Return the features [B, D, 4, h, w, C] that windows are cut from; here, the inputs."""
        return inputs

    def slice_size(self, inputs: jax.Array) -> tuple[int, int]:
        """Return H, W of the slices."""
        return self.size

    def divide(self, features: jax.Array, present: jax.Array | None = None) -> WindowGrid:
        """Return the division of volumes into windows; raise a ValueError if there are too few slices or patches."""
        batch, depth, _, *plane, _ = features.shape
        size = (depth, *plane)
        if any(n < k for n, k in zip(size, self.counts, strict=True)):
            expected, found = ("×".join(map(str, numbers)) for numbers in (self.counts, size))
            raise ValueError(
                f"volumes have {found} slices, patch rows and columns: too few for the network's {expected} windows"
            )
        slices = jnp.full(batch, depth) if present is None else present.sum(1)
        return WindowGrid(self.counts, size, slices)

    def decode(self, window: jax.Array, grid: WindowGrid, index: int | jax.Array) -> jax.Array:
        """Return a window's logits [B, d, 8h', 8w', K] float32 from its features [B, d, 4, h', w', C]."""
        return self.decoder(window, *grid.slice_numbers(index), grid.slices, grid.plane_size(index))

    def finish(self, logits: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Return assembled logits [B, D, 8h, 8w, K], resized to H, W = `size`."""
        return map_slices(lambda x: resize(x, size), logits)


class WindowSegmenter(FeatureWindows):
    """Map volumes to logits: the backbone encodes every slice once, and the decoder runs window by window."""

    reads_images = False
    smaller_features = ()

    def __init__(self, backbone: VisionTransformer, decoder: WindowDecoder, counts: Counts) -> None:
        super().__init__(decoder, (0, 0), counts)
        self.backbone = backbone
        depth = backbone.variant.depth
        self.blocks = tuple(-(-depth * level // LEVELS) - 1 for level in range(1, LEVELS + 1))
        self.feature_description = f"patch tokens of blocks {', '.join(map(str, self.blocks))} after the final norm"

    def __call__(self, images: jax.Array, present: jax.Array | None = None) -> jax.Array:
        """Return logits [B, D, H, W, K] float32.

        Args:
            images: [B, D, H, W, 1] grey values in 0..1, or [B, D, H, W, 3] already ImageNet-normalised; H, W multiples
                of the patch size.
            present: see `FeatureWindows`.

        Raises:
            ValueError: `images` has another shape, is not floating point, or there are more windows than slices.
        """
        require_images(images, (1, *(self.backbone.variant.patch,) * 2), channels=(1, 3), axes=3)
        return super().__call__(images, present)

    def encode(self, inputs: jax.Array) -> jax.Array:
        """Return features [B, D, 4, h, w, C] of volumes [B, D, H, W, 1 or 3]."""
        depth = inputs.shape[1]
        chunks = -(-depth // MAX_ENCODED_SLICES)
        if chunks == 1:
            return map_slices(self.features, inputs)
        chunk_depth = -(-depth // chunks)
        inputs = jnp.pad(inputs, ((0, 0), (0, chunks * chunk_depth - depth), *((0, 0),) * 3))
        inputs = jnp.moveaxis(inputs.reshape(len(inputs), chunks, chunk_depth, *inputs.shape[2:]), 1, 0)
        features = jnp.moveaxis(jax.lax.map(partial(map_slices, self.features), inputs), 0, 1)
        return features.reshape(len(features), -1, *features.shape[3:])[:, :depth]

    def features(self, images: jax.Array) -> jax.Array:
        """Return the features [B, 4, h, w, C] of slices [B, H, W, 1 or 3], in the dtype of the computation."""
        return jnp.stack(self.backbone.intermediate(three_channels(images), self.blocks, norm=True), axis=1)

    def slice_size(self, inputs: jax.Array) -> tuple[int, int]:
        height, width = inputs.shape[2:4]
        return height, width

    def on_features(self, size: tuple[int, int]) -> FeatureWindows:
        """Return the network without its backbone, for precomputed features of slices with H, W = `size`."""
        return FeatureWindows(self.decoder, size, self.counts)
