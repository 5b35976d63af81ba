"""Apply trained networks to a scan, and map the result back to the scan's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxla.data.slices import SliceGeometry, from_slices, slice_geometry, to_slices
from jaxla.data.volumes import Volume
from jaxla.mesh import place_on_devices
from jaxla.models.ops.tiles import apply_in_tiles

ROWS, COLUMNS = -3, -2  # axes of images and of probabilities
FLIPS = ((), (ROWS,), (COLUMNS,), (ROWS, COLUMNS))  # flips that inference averages over

# Classes (uint8), and probabilities (float32 with a last axis K) or None if they were not requested.
Segmentation = tuple[np.ndarray, np.ndarray | None]
# (slices [S, H, W] in the scan's grey values, geometry, with_probabilities) -> classes [S, H, W], [S, H, W, K]
SegmentSlices = Callable[[np.ndarray, SliceGeometry, bool], Segmentation]


def segment_volume(segment_slices: SegmentSlices, volume: Volume, with_probabilities: bool = False) -> Segmentation:
    """Segment a volume on its own grid.

    With one class, a voxel is foreground if its probability exceeds 0.5; with several, it gets the most probable one.

    Returns:
        Classes [X, Y, Z] uint8, and probabilities [X, Y, Z] float32 for one class, [X, Y, Z, K] for several,
        background first.
    """
    geometry = slice_geometry(volume.affine)
    classes, probabilities = segment_slices(to_slices(volume.array, geometry), geometry, with_probabilities)
    classes = np.ascontiguousarray(from_slices(classes, geometry))
    if probabilities is not None:
        channels = probabilities[..., 0] if probabilities.shape[-1] == 1 else probabilities
        probabilities = np.ascontiguousarray(from_slices(channels, geometry))
    return classes, probabilities


def mean_probabilities(
    networks: Sequence[nnx.Module], flips: bool = False, tile_size: int = 0
) -> Callable[..., jax.Array]:
    """Return `inputs -> probabilities [B, ..., K]`, from the mean of the networks' logits; compiled once.

    With `flips`, the first input is images [B, ..., H, W, C], and probabilities are averaged over their flips. With
    `tile_size`, it is images [B, H, W, C], and the networks read overlapping tiles of that side.
    """
    graph, _ = nnx.split(networks[0])
    states = [place_on_devices(nnx.split(network)[1]) for network in networks]

    @jax.jit
    def logits(state: nnx.State, *inputs: Any) -> jax.Array:
        network = nnx.merge(graph, state)
        return apply_in_tiles(network, tile_size, *inputs) if tile_size else network(*inputs)

    @jax.jit
    def probabilities(all_logits: Sequence[jax.Array]) -> jax.Array:
        mean = sum(all_logits) / len(all_logits)
        return jax.nn.sigmoid(mean) if mean.shape[-1] == 1 else jax.nn.softmax(mean)

    def predict(*inputs: Any) -> jax.Array:
        return probabilities([logits(state, *inputs) for state in states])

    def predict_flipped(images: jax.Array, *rest: Any) -> jax.Array:
        return sum(jnp.flip(predict(jnp.flip(images, axes), *rest), axes) for axes in FLIPS) / len(FLIPS)

    return predict_flipped if flips else predict


def classify(probabilities: np.ndarray) -> np.ndarray:
    """Return the classes [H, W] for probabilities [H, W, K]."""
    return probabilities[..., 0] > 0.5 if probabilities.shape[-1] == 1 else probabilities.argmax(-1)


def pad_rows(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Stack rows and pad them with zero rows to `count`, so that all batches have one shape and are compiled once."""
    batch = np.zeros((count, *rows[0].shape), rows[0].dtype)
    batch[: len(rows)] = rows
    return batch
