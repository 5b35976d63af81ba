"""A trained network applied to a volume, and back onto that volume's own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxla.config import Postprocessing
from jaxla.data.inputs import Frame, image_to_input, input_to_slice, intensity_range
from jaxla.data.volumes import Volume, from_slices, slice_geometry, to_slices, write_volume
from jaxla.devices.mesh import own_rows, spread, to_devices
from jaxla.inference.postprocessing import postprocess
from jaxla.inference.trained import TrainedNetwork

Segment = Callable[..., tuple[np.ndarray, np.ndarray | None]]


def make_segment(trained: TrainedNetwork) -> Segment:
    """`(volume, probabilities=False) -> (classes, probabilities or None)` for volumes of any size, compiled once.

    `classes` is [X, Y, Z] uint8 on the volume's own grid; `probabilities` is [X, Y, Z] float32 for one class and
    [X, Y, Z, K] for several, background first. A voxel is foreground where its probability exceeds one half, or gets
    its most probable class; what the method's postprocessing makes of these classes does not show in the probabilities.
    """
    experiment = trained.record.experiment
    segment_slices = make_segment_slices(trained.network, experiment.training.batch_size, experiment.postprocessing)
    canvas = trained.record.canvas

    def segment(volume: Volume, probabilities: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        geometry = slice_geometry(volume.affine)
        slices = to_slices(volume.array, geometry)
        frame = canvas.frame(slices.shape[1:], geometry.spacing[1:])
        grey_range = intensity_range(volume.array)
        inputs = (image_to_input(pixels, grey_range, frame) for pixels in slices)
        classes, kept = segment_slices(inputs, frame, slices.shape, probabilities)
        classes = np.ascontiguousarray(from_slices(classes, geometry))
        if kept is not None:
            kept = np.ascontiguousarray(from_slices(kept[..., 0] if kept.shape[-1] == 1 else kept, geometry))
        return classes, kept

    return segment


def make_segment_slices(network: nnx.Module, batch_size: int, postprocessing: Postprocessing) -> Segment:
    """`(inputs, frame, shape, probabilities=False) -> (classes, probabilities or None)`, compiled once.

    `inputs` are what `network` reads of each slice in turn, images, features, or pairs of both; `frame` is where the
    slices lie in the images, `shape` = (S, H, W) their own size. `classes` is [S, H, W] uint8, `probabilities`
    [S, H, W, K] float32.
    """
    graph, state = nnx.split(network)
    state = to_devices(state)

    @jax.jit
    def probabilities_of(state: nnx.State, inputs: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, state)(inputs)
        return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits)

    def segment_slices(
        inputs: Iterable[Any], frame: Frame, shape: tuple[int, int, int], probabilities: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        inputs = iter(inputs)
        classes = np.empty(shape, np.uint8)
        kept = None
        for start in range(0, shape[0], batch_size):
            chosen = list(islice(inputs, batch_size))
            batch = jax.tree.map(lambda *slices: _filled_up(slices, len(own_rows(batch_size))), *chosen)
            outputs = np.asarray(probabilities_of(state, spread(batch)))
            for i in range(len(chosen)):
                of_slice = input_to_slice(outputs[i], frame, shape[1:])
                classes[start + i] = of_slice[..., 0] > 0.5 if of_slice.shape[-1] == 1 else of_slice.argmax(-1)
                if probabilities:
                    kept = np.empty((*shape, of_slice.shape[-1]), np.float32) if kept is None else kept
                    kept[start + i] = of_slice
        return postprocess(classes, postprocessing), kept

    return segment_slices


def _filled_up(slices: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """A batch of so many rows, however few the slices are: one shape, one compilation."""
    batch = np.zeros((rows, *slices[0].shape), slices[0].dtype)
    batch[: len(slices)] = slices
    return batch


def write_segmentation(path: Path, classes: np.ndarray, trained: TrainedNetwork, like: Volume) -> None:
    """Write classes [X, Y, Z] as a mask with the data set's own label values, on the grid of `like`."""
    write_volume(path, trained.record.labels.to_values(classes), like)
