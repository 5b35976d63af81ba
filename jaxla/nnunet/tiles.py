"""nnU-Net's inference in tiles that overlap by at least half, each predicted in all mirrored versions.

Memory grows only with the scan and its mask: a slice of logits is resampled to the scan's grid, and freed, as soon as
no further tile reaches it. Reference code: nnunetv2 2.8.1, `nnUNetPredictor` and `export_prediction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxla.data.prepared import PreparedVolume
from jaxla.mesh import device_count, place_on_devices, shard_batch
from jaxla.models.ops.tiles import gaussian_weights, tile_starts
from jaxla.nnunet.plan import Configuration, Plan
from jaxla.nnunet.preprocessing import PreprocessedImage, preprocessed_shape
from jaxla.nnunet.resampling import find_coarse_axis, linear_indices, nearest_indices

MAX_TILES_PER_DEVICE = 8

Rows = Iterator[np.ndarray]  # slices along the first axis, in order


def make_tile_logits(networks: Sequence[nnx.Module], configuration: Configuration) -> Callable[[np.ndarray], Rows]:
    """Return a compiled function from a preprocessed image [D, H, W] to D slices of mean logits [H, W, K] float32."""
    graph, _ = nnx.split(networks[0])
    states = [place_on_devices(nnx.split(network)[1]) for network in networks]
    size = configuration.patch_size
    all_flips = jnp.array(list(product((False, True), repeat=len(size))))
    batch_size = min(MAX_TILES_PER_DEVICE, configuration.batch_size) * device_count()

    @jax.jit
    def mean_over_flips(state: nnx.State, tiles: jax.Array) -> jax.Array:
        def add(total: jax.Array, flips: jax.Array) -> tuple[jax.Array, None]:
            return total + _flip(nnx.merge(graph, state)(_flip(tiles, flips)), flips), None

        logits = jax.eval_shape(lambda: nnx.merge(graph, state)(tiles))
        return jax.lax.scan(add, jnp.zeros(logits.shape, logits.dtype), all_flips)[0] / len(all_flips)

    def predict(tiles: np.ndarray) -> np.ndarray:
        batch = np.zeros((batch_size, *tiles.shape[1:]), np.float32)
        batch[: len(tiles)] = tiles
        total = sum(np.asarray(mean_over_flips(state, shard_batch(batch[..., None]))) for state in states)
        return total[: len(tiles)] / len(states)

    return lambda image: _merge_tiles(image, size, predict, batch_size)


def _flip(x: jax.Array, flips: jax.Array) -> jax.Array:
    for axis in range(len(flips)):
        x = jnp.where(flips[axis], jnp.flip(x, axis + 1), x)
    return x


def _merge_tiles(
    image: np.ndarray, size: Sequence[int], predict: Callable[[np.ndarray], np.ndarray], batch_size: int
) -> Rows:
    """Yield slices [H, W, K]: the mean of all tiles' logits, weighted towards the centre of each tile."""
    is_2d = len(size) == 2
    size = (1, *size) if is_2d else tuple(size)
    missing = [max(0, side - n) for side, n in zip(size, image.shape, strict=True)]
    padded = np.pad(image, [(n // 2, n - n // 2) for n in missing])
    depth, *plane = (slice(n // 2, n // 2 + side) for n, side in zip(missing, image.shape, strict=True))
    weight = gaussian_weights(size)
    sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # row -> weighted logits, weights

    def pop_finished(end: int) -> Rows:
        for z in sorted(z for z in sums if z < end):
            logits, weights = sums.pop(z)
            if depth.start <= z < depth.stop:
                yield logits[*plane] / weights[*plane][..., None]

    starts_by_axis = [tile_starts(n, side) for n, side in zip(padded.shape, size, strict=True)]
    starts = product(range(len(padded)) if is_2d else starts_by_axis[0], *starts_by_axis[1:])
    while batch := list(islice(starts, batch_size)):
        yield from pop_finished(batch[0][0])
        boxes = [tuple(slice(s, s + side) for s, side in zip(start, size, strict=True)) for start in batch]
        tiles = np.stack([padded[box] for box in boxes])
        logits = predict(tiles[:, 0])[:, None] if is_2d else predict(tiles)
        for (rows, *tile_plane), tile in zip(boxes, logits, strict=True):
            for z, tile_row, weight_row in zip(range(rows.start, rows.stop), tile, weight, strict=True):
                if z not in sums:
                    blank = np.zeros(padded.shape[1:], np.float32)
                    sums[z] = np.zeros((*blank.shape, logits.shape[-1]), np.float32), blank
                logit_sum, weight_sum = sums[z]
                logit_sum[*tile_plane] += tile_row * weight_row[..., None]
                weight_sum[*tile_plane] += weight_row
    yield from pop_finished(len(padded))


def count_tiles(volumes: Iterable[PreparedVolume], plan: Plan, configuration: Configuration) -> int:
    """Return the number of tiles that segmenting the scans takes, including mirrored tiles."""
    total = 0
    size = configuration.patch_size
    for volume in volumes:
        shape = preprocessed_shape(volume, plan, configuration)
        sides = zip(shape[-len(size) :], size, strict=True)
        tiles = math.prod(len(tile_starts(max(n, side), side)) for n, side in sides)
        total += tiles * (shape[0] if len(size) == 2 else 1)
    return total * 2 ** len(size)


def resample_to_scan(logits: Iterable[np.ndarray], image: PreprocessedImage) -> Rows:
    """Yield slices of logits [H, W, K] on the grid of the scan's cropped box, from slices of the preprocessed image.

    Interpolation is linear, and nearest-neighbour along an axis of much coarser spacing.
    """
    shape, new_shape = image.image.shape, [side.stop - side.start for side in image.box]
    # differs from preprocessing if scan and plan have different coarse axes
    coarse_axis = find_coarse_axis(image.new_spacing, image.spacing)

    def resample_plane(row: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            if shape[axis] == new_shape[axis]:
                continue
            if axis == coarse_axis:
                row = row.take(nearest_indices(shape[axis], new_shape[axis]), axis - 1)
                continue
            first, second, weight = linear_indices(shape[axis], new_shape[axis])
            weight = weight[:, None, None] if axis == 1 else weight[:, None]
            row = row.take(first, axis - 1) * (1 - weight) + row.take(second, axis - 1) * weight
        return row

    if shape[0] == new_shape[0] or coarse_axis == 0:
        first = second = nearest_indices(shape[0], new_shape[0])
        weights = np.zeros(new_shape[0], np.float32)
    else:
        first, second, weights = linear_indices(shape[0], new_shape[0])
    rows = iter(logits)
    kept = {}
    last = -1
    for a, b, weight in zip(first, second, weights, strict=True):
        while last < b:
            last += 1
            kept = {z: row for z, row in kept.items() if z == last - 1} | {last: resample_plane(next(rows))}
        yield kept[a] if weight == 0 else kept[a] * (1 - weight) + kept[b] * weight
    for _ in rows:  # the remaining slices, which no slice of the scan needs
        pass
