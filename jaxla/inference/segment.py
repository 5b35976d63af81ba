"""A trained network applied to a volume, and back onto that volume's own grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxla.data.inputs import frame, image_to_input, input_to_slice
from jaxla.data.prepared import intensity_range
from jaxla.data.volumes import Volume, from_slices, slice_geometry, to_slices, write_volume
from jaxla.inference.trained import TrainedNetwork

Segment = Callable[..., tuple[np.ndarray, np.ndarray | None]]


def make_segment(trained: TrainedNetwork) -> Segment:
    """`(volume, probabilities=False) -> (classes, probabilities or None)` for volumes of any size, compiled once.

    `classes` is [X, Y, Z] uint8 on the volume's own grid; `probabilities` is [X, Y, Z] float32 for one class and
    [X, Y, Z, K] for several, background first. A voxel is foreground where its probability exceeds one half, or gets
    its most probable class.
    """
    experiment = trained.record.experiment
    size, batch_size = experiment.preprocessing.image_size, experiment.training.batch_size
    graph, state = nnx.split(trained.network)

    @jax.jit
    def probabilities_of(state: nnx.State, images: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, state)(images)
        return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits)

    def segment(volume: Volume, probabilities: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        geometry = slice_geometry(volume.affine)
        slices = to_slices(volume.array, geometry)
        count, *shape = slices.shape
        place = frame(tuple(shape), geometry.spacing[1:], size)
        grey_range = intensity_range(volume.array)
        classes = np.empty(slices.shape, np.uint8)
        kept = None
        for start in range(0, count, batch_size):
            chosen = slices[start : start + batch_size]
            images = np.zeros(
                (batch_size, size, size, 1), np.float32
            )  # a short batch is filled up: one shape, one compilation
            for i, pixels in enumerate(chosen):
                images[i] = image_to_input(pixels, grey_range, place)
            inputs = np.asarray(probabilities_of(state, images))
            for i in range(len(chosen)):
                of_slice = input_to_slice(inputs[i], place, tuple(shape))
                classes[start + i] = of_slice[..., 0] > 0.5 if of_slice.shape[-1] == 1 else of_slice.argmax(-1)
                if probabilities:
                    kept = np.empty((*slices.shape, of_slice.shape[-1]), np.float32) if kept is None else kept
                    kept[start + i] = of_slice
        classes = np.ascontiguousarray(from_slices(classes, geometry))
        if kept is not None:
            kept = np.ascontiguousarray(from_slices(kept[..., 0] if kept.shape[-1] == 1 else kept, geometry))
        return classes, kept

    return segment


def write_segmentation(path: Path, classes: np.ndarray, trained: TrainedNetwork, like: Volume) -> None:
    """Write classes [X, Y, Z] as a mask with the data set's own label values, on the grid of `like`."""
    write_volume(path, trained.record.labels.to_values(classes), like)
