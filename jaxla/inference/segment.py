"""A trained network applied to a volume, and back onto that volume's own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from scipy import special

from jaxla.data.inputs import Frame, image_to_input, input_to_slice, intensity_range
from jaxla.data.volumes import SliceGeometry, Volume, from_slices, slice_geometry, to_slices, write_volume
from jaxla.distributed import local_rows, place_on_devices, shard_batch
from jaxla.inference.postprocessing import postprocess
from jaxla.inference.trained import TrainedNetwork
from jaxla.models.build import configuration_of, reads_volumes
from jaxla.nnunet.postprocessing import keep_largest
from jaxla.nnunet.preprocessing import from_plan_axes, preprocess_image
from jaxla.nnunet.tiles import make_tile_logits, resample_to_scan

DEPTH_STEP = 16  # slices of a volume are filled up to a multiple of it

Segmented = tuple[np.ndarray, np.ndarray | None]
Segment = Callable[..., Segmented]


def make_segment(trained: TrainedNetwork) -> Segment:
    """`(volume, probabilities=False) -> (classes, probabilities or None)` for volumes of any size.

    Compiled once; of networks that read whole volumes once for each multiple of DEPTH_STEP slices.

    `classes` is [X, Y, Z] uint8 on the volume's own grid; `probabilities` is [X, Y, Z] float32 for one class and
    [X, Y, Z, K] for several, background first. A voxel is foreground where its probability exceeds one half, or gets
    its most probable class; what the method's postprocessing makes of these classes does not show in the probabilities.
    Of several networks the logits are averaged.
    """
    experiment = trained.record.experiment
    of_slices = _planned_slices(trained) if trained.plan else _prepared_slices(trained)

    def segment(volume: Volume, probabilities: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        geometry = slice_geometry(volume.affine)
        classes, kept = of_slices(to_slices(volume.array, geometry), geometry, probabilities)
        classes = keep_largest(postprocess(classes, experiment.postprocessing), trained.largest)
        classes = np.ascontiguousarray(from_slices(classes, geometry))
        if kept is not None:
            kept = np.ascontiguousarray(from_slices(kept[..., 0] if kept.shape[-1] == 1 else kept, geometry))
        return classes, kept

    return segment


def _prepared_slices(trained: TrainedNetwork) -> Callable[..., Segmented]:
    """Each slice on the square that the network was trained on."""
    segment_slices = make_segment_inputs(trained, trained.networks)
    canvas = trained.record.canvas

    def segment(slices: np.ndarray, geometry: SliceGeometry, probabilities: bool) -> Segmented:
        frame = canvas.frame(slices.shape[1:], geometry.spacing[1:])
        grey_range = intensity_range(slices)
        inputs = (image_to_input(pixels, grey_range, frame) for pixels in slices)
        return segment_slices(inputs, frame, slices.shape, probabilities)

    return segment


def _planned_slices(trained: TrainedNetwork) -> Callable[..., Segmented]:
    """By a window that slides over the scan as the plan wants it."""
    outputs = trained.record.labels.outputs
    configuration = configuration_of(trained.record.experiment.model, trained.plan)
    window_logits = make_tile_logits(trained.networks, configuration)

    def segment(slices: np.ndarray, geometry: SliceGeometry, probabilities: bool) -> Segmented:
        planned = preprocess_image(slices, geometry.axis, geometry.spacing, trained.plan, configuration)
        classes = np.zeros(planned.shape, np.uint8)
        kept = None
        if probabilities:
            kept = np.zeros((*planned.shape, outputs), np.float32)
            if outputs > 1:
                kept[..., 0] = 1  # what was cut away is background
        depth, *plane = planned.box
        for z, logits in enumerate(resample_to_scan(window_logits(planned.image), planned), start=depth.start):
            classes[z, *plane] = logits[..., 0] > 0 if outputs == 1 else logits.argmax(-1)
            if kept is not None:
                kept[z, *plane] = special.expit(logits) if outputs == 1 else special.softmax(logits, axis=-1)
        classes = from_plan_axes(classes, planned.order)
        return classes, kept if kept is None else from_plan_axes(kept, planned.order)

    return segment


def make_segment_inputs(trained: TrainedNetwork, networks: Sequence[nnx.Module]) -> Callable[..., Segmented]:
    """`(inputs, frame, shape, probabilities=False) -> (classes, probabilities or None)`.

    `inputs` are what a network reads of each slice in turn, images, features, or pairs of both; `frame` is where the
    slices lie in the images, `shape` = (S, H, W) their own size. `classes` is [S, H, W] uint8, `probabilities`
    [S, H, W, K] float32. The logits of the networks are averaged.

    Args:
        networks: those of the run, or what is left of them where they are given features.
    """
    experiment = trained.record.experiment
    if reads_volumes(experiment.model):
        return make_segment_volume(networks)
    return make_segment_slices(networks, experiment.training.batch_size)


def make_segment_volume(networks: Sequence[nnx.Module]) -> Callable[..., Segmented]:
    """As `make_segment_inputs` says, for networks that read all slices of a volume together."""
    probabilities_of = _mean_probabilities(networks)

    def segment_volume(
        inputs: Iterable[Any], frame: Frame, shape: tuple[int, int, int], probabilities: bool = False
    ) -> Segmented:
        # filled up to one of few depths, for each of which it is compiled; what is filled up changes nothing
        depth = -(-shape[0] // DEPTH_STEP) * DEPTH_STEP
        volume, present = _filled_up(list(inputs), depth), np.arange(depth) < shape[0]
        batch = [_filled_up([array], len(local_rows(1))) for array in (volume, present)]
        outputs = np.asarray(probabilities_of(*map(shard_batch, batch))[0])
        classes = np.empty(shape, np.uint8)
        kept = np.empty((*shape, outputs.shape[-1]), np.float32) if probabilities else None
        for i in range(shape[0]):
            of_slice = input_to_slice(outputs[i], frame, shape[1:])
            classes[i] = _classes_of(of_slice)
            if kept is not None:
                kept[i] = of_slice
        return classes, kept

    return segment_volume


def make_segment_slices(networks: Sequence[nnx.Module], batch_size: int) -> Callable[..., Segmented]:
    """As `make_segment_inputs` says, for networks of slices."""
    probabilities_of = _mean_probabilities(networks)

    def segment_slices(
        inputs: Iterable[Any], frame: Frame, shape: tuple[int, int, int], probabilities: bool = False
    ) -> Segmented:
        inputs = iter(inputs)
        classes = np.empty(shape, np.uint8)
        kept = None
        for start in range(0, shape[0], batch_size):
            chosen = list(islice(inputs, batch_size))
            batch = jax.tree.map(lambda *slices: _filled_up(slices, len(local_rows(batch_size))), *chosen)
            outputs = np.asarray(probabilities_of(shard_batch(batch)))
            for i in range(len(chosen)):
                of_slice = input_to_slice(outputs[i], frame, shape[1:])
                classes[start + i] = _classes_of(of_slice)
                if probabilities:
                    kept = np.empty((*shape, of_slice.shape[-1]), np.float32) if kept is None else kept
                    kept[start + i] = of_slice
        return classes, kept

    return segment_slices


def _mean_probabilities(networks: Sequence[nnx.Module]) -> Callable[..., jax.Array]:
    """What the networks make of a batch, their logits averaged: one network after the other, compiled once."""
    graph, _ = nnx.split(networks[0])
    states = [place_on_devices(nnx.split(network)[1]) for network in networks]

    @jax.jit
    def logits_of(state: nnx.State, *inputs: Any) -> jax.Array:
        return nnx.merge(graph, state)(*inputs)

    @jax.jit
    def probabilities_of(logits: Sequence[jax.Array]) -> jax.Array:
        mean = sum(logits) / len(logits)
        return jax.nn.sigmoid(mean) if mean.shape[-1] == 1 else jax.nn.softmax(mean)

    return lambda *inputs: probabilities_of([logits_of(state, *inputs) for state in states])


def _classes_of(probabilities: np.ndarray) -> np.ndarray:
    """[H, W, K] -> [H, W]."""
    return probabilities[..., 0] > 0.5 if probabilities.shape[-1] == 1 else probabilities.argmax(-1)


def _filled_up(slices: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """A batch of so many rows, however few the slices (or volumes) are: one shape, one compilation."""
    batch = np.zeros((rows, *slices[0].shape), slices[0].dtype)
    batch[: len(slices)] = slices
    return batch


def write_segmentation(path: Path, classes: np.ndarray, trained: TrainedNetwork, like: Volume) -> None:
    """Write classes [X, Y, Z] as a mask with the data set's own label values, on the grid of `like`."""
    write_volume(path, trained.record.labels.to_values(classes), like)
