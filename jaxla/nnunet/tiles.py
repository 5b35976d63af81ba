"""nnU-Net's inference: a window that slides over a scan by half of itself, each window seen mirrored too.

What grows with the scan is the scan and its mask; of the logits only those slices are held at a time that a window may
still reach, and each is brought back onto the scan's own grid as soon as none does. Reference code: nnunetv2 2.8.1,
`nnUNetPredictor` and `export_prediction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import ndimage

from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import device_count, place_on_devices, shard_batch
from jaxla.nnunet.plan import Configuration, Plan
from jaxla.nnunet.preprocessing import PlannedImage, planned_shape
from jaxla.nnunet.resampling import linear_places, nearest_places

STEP = 0.5  # of a window, by which the next one is moved at most
SIGMA = 1 / 8  # of a window's side: how its weight falls from the middle to the border
TOGETHER = 8  # windows that a device sees at most at once

Rows = Iterator[np.ndarray]  # slices along the first axis, one after the other


def make_tile_logits(networks: Sequence[nnx.Module], configuration: Configuration) -> Callable[[np.ndarray], Rows]:
    """`image -> logits`, compiled once: [D, H, W] as the plan wants it -> D slices [H, W, K] float32, in turn.

    Args:
        networks: of one configuration; their logits are averaged.
    """
    graph, _ = nnx.split(networks[0])
    states = [place_on_devices(nnx.split(network)[1]) for network in networks]
    size = configuration.patch_size
    mirrored = jnp.array(list(product((False, True), repeat=len(size))))
    together = min(TOGETHER, configuration.batch_size) * device_count()

    @jax.jit
    def seen(state: nnx.State, windows: jax.Array) -> jax.Array:
        def add(total: jax.Array, flips: jax.Array) -> tuple[jax.Array, None]:
            return total + _flipped(nnx.merge(graph, state)(_flipped(windows, flips)), flips), None

        shape = jax.eval_shape(lambda: nnx.merge(graph, state)(windows))
        return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), mirrored)[0] / len(mirrored)

    def logits_of(windows: np.ndarray) -> np.ndarray:
        filled = np.zeros((together, *windows.shape[1:]), np.float32)
        filled[: len(windows)] = windows
        total = sum(np.asarray(seen(state, shard_batch(filled[..., None]))) for state in states)
        return total[: len(windows)] / len(states)

    def window_logits(image: np.ndarray) -> Rows:
        return _merged(image, size, logits_of, together)

    return window_logits


def _flipped(x: jax.Array, flips: jax.Array) -> jax.Array:
    for axis in range(len(flips)):
        x = jnp.where(flips[axis], jnp.flip(x, axis + 1), x)
    return x


def _merged(
    image: np.ndarray, size: Sequence[int], logits_of: Callable[[np.ndarray], np.ndarray], together: int
) -> Rows:
    """The mean of what all windows say, weighted towards the middle of each: slices [H, W, K]."""
    of_slices = len(size) == 2
    size = (1, *size) if of_slices else tuple(size)
    lacking = [max(0, side - n) for side, n in zip(size, image.shape, strict=True)]
    padded = np.pad(image, [(n // 2, n - n // 2) for n in lacking])
    weight = gaussian_weights(size)
    wanted = [slice(n // 2, n // 2 + side) for n, side in zip(lacking, image.shape, strict=True)]
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # logits and weights, so far
    done = 0

    def finished(before: int) -> Rows:
        nonlocal done
        for z in range(done, before):
            logits, weights = rows.pop(z)
            if wanted[0].start <= z < wanted[0].stop:
                yield logits[wanted[1], wanted[2]] / weights[wanted[1], wanted[2], None]
        done = before

    along = [tile_starts(n, side) for n, side in zip(padded.shape, size, strict=True)]
    starts = product(range(len(padded)), *along[1:]) if of_slices else product(*along)
    while places := list(islice(starts, together)):
        yield from finished(places[0][0])
        parts = [tuple(slice(s, s + side) for s, side in zip(start, size, strict=True)) for start in places]
        windows = np.stack([padded[part] for part in parts])
        logits = logits_of(windows[:, 0] if of_slices else windows)
        logits = logits[:, None] if of_slices else logits
        for (z, *_), (_, *plane), of_window in zip(places, parts, logits, strict=True):
            for depth in range(size[0]):
                if z + depth not in rows:
                    blank = np.zeros(padded.shape[1:], np.float32)
                    rows[z + depth] = np.zeros((*blank.shape, logits.shape[-1]), np.float32), blank
                total, weights = rows[z + depth]
                total[*plane] += of_window[depth] * weight[depth, ..., None]
                weights[*plane] += weight[depth]
    yield from finished(padded.shape[0])


def tile_starts(n: int, side: int) -> list[int]:
    """Where windows of a side begin along n voxels: evenly apart, by half a window at most."""
    count = int(np.ceil((n - side) / (side * STEP))) + 1
    return [round((n - side) / max(count - 1, 1) * i) for i in range(count)]


def count_tiles(volumes: Iterable[PreparedVolume], plan: Plan, configuration: Configuration) -> int:
    """How many windows, each way of mirroring counted, it takes to segment these scans."""
    total, size = 0, configuration.patch_size
    for volume in volumes:
        shape = planned_shape(volume, plan, configuration)
        sides = zip(shape[-len(size) :], size, strict=True)
        windows = math.prod(len(tile_starts(max(n, side), side)) for n, side in sides)
        total += windows * (shape[0] if len(size) == 2 else 1)
    return total * 2 ** len(size)


def gaussian_weights(size: Sequence[int]) -> np.ndarray:
    """How much each voxel of a window counts, float32: a Gaussian around its middle."""
    middle = np.zeros(size)
    middle[tuple(side // 2 for side in size)] = 1
    weight = ndimage.gaussian_filter(middle, [side * SIGMA for side in size], mode="constant")
    weight = np.float32(weight / weight.max())
    return np.maximum(weight, weight[weight > 0].min())  # no voxel counts nothing


def resample_to_scan(logits: Iterable[np.ndarray], planned: PlannedImage) -> Rows:
    """Slices of logits [H, W, K] of an image -> those of the part of the scan that it was made from, in its voxels.

    Linear between voxels; the nearest slice along an axis of much longer voxels.
    """
    before, after = planned.image.shape, planned.cropped
    separate = planned.separate_back

    def in_plane(row: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            if before[axis] == after[axis]:
                continue
            if axis == separate:
                row = row.take(nearest_places(before[axis], after[axis]), axis - 1)
                continue
            first, second, share = linear_places(before[axis], after[axis])
            share = share[:, None, None] if axis == 1 else share[:, None]
            row = row.take(first, axis - 1) * (1 - share) + row.take(second, axis - 1) * share
        return row

    if before[0] == after[0]:
        first = second = np.arange(before[0])
        shares = np.zeros(before[0], np.float32)
    elif separate == 0:
        first = second = nearest_places(before[0], after[0])
        shares = np.zeros(after[0], np.float32)
    else:
        first, second, shares = linear_places(before[0], after[0])
    rows, held, last = iter(logits), {}, -1
    for a, b, share in zip(first, second, shares, strict=True):
        while last < b:
            last += 1
            row = next(rows)
            held = {last - 1: held[last - 1]} if last - 1 in held else {}
            held[last] = in_plane(row)
        yield held[a] if share == 0 else held[a] * (1 - share) + held[b] * share
    for _ in rows:  # slices that are nearest to none
        pass
