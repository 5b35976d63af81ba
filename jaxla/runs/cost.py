"""The cost of a run, `cost.json`: parameters, multiply-adds, memory and seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxla.cli.json_files import Count, PositiveCount, Seconds
from jaxla.data.prepared import PreparedVolume
from jaxla.data.slices import from_slices, slice_geometry
from jaxla.data.volumes import read_grid
from jaxla.hardware import peak_device_bytes, peak_host_bytes
from jaxla.inference.segment import SegmentSlices
from jaxla.mesh import on_host
from jaxla.models.ops.multiply_adds import multiply_adds
from jaxla.runs.trained import TrainedRun
from jaxla.training.step import count_parameters, split_network

MAX_TIMED_VOLUMES, MAX_TIMED_SECONDS = 3, 60


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds, memory and seconds of one run; with --fold=all, of the networks of all folds.

    `inference_seconds` are the times from the scan in memory to the mask on its grid, for each timed volume, with the
    whole network and without compilation.
    """

    parameters: PositiveCount  # number of parameters of the network
    trained_parameters: Count  # number of parameters that training changes
    multiply_adds: Count  # per slice, in all of its tiles; a volume's number is divided by its slices
    step_bytes: Count  # device memory of a training step, as reported by XLA
    peak_host_bytes: PositiveCount | None  # peak memory of the process; None if the system does not report it
    peak_device_bytes: PositiveCount | None  # peak memory on a GPU; None on CPU
    inference_seconds: tuple[Seconds, ...]
    inference_slices: tuple[PositiveCount, ...]  # number of slices of each timed volume
    step_slices: Count = 0  # number of slices that a training step reads


def measure_cost(
    run: TrainedRun, segment: SegmentSlices, volumes: Sequence[PreparedVolume], step_bytes: int, deepest: int
) -> Cost:
    """Measure a finished run whose deepest volume in training and validation has `deepest` slices.

    The first of `volumes`, which may be the run's test volumes, are segmented once more, to be timed.
    """
    seconds = time_inference(segment, volumes)
    task = run.task
    network = run.networks[0]
    count = len(run.networks)
    shape = task.input_shape(deepest)
    depth = math.prod(shape[:-3])
    is_finetuned = task.model.backbone == "finetuned"
    graph, state = nnx.split(network)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    with on_host():  # a single image, which several devices could not share
        operations = multiply_adds(lambda state, images: nnx.merge(graph, state)(images), shapes, image)
    return Cost(
        parameters=count * count_parameters(nnx.state(network, nnx.Param)),
        trained_parameters=count * count_parameters(split_network(network, train_backbone=is_finetuned).trainable),
        multiply_adds=count * operations * task.tile_count // depth,
        step_bytes=step_bytes,
        step_slices=task.batch_size * depth,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
        inference_seconds=tuple(seconds),
        inference_slices=tuple(volume.shape[0] for volume in volumes[: len(seconds)]),
    )


def time_inference(segment: SegmentSlices, volumes: Sequence[PreparedVolume]) -> list[float]:
    """Return the seconds of inference on each of the first volumes, up to a number of volumes and a total time."""
    seconds: list[float] = []
    for volume in volumes[:MAX_TIMED_VOLUMES]:
        slices = np.array(volume.image)
        geometry = slice_geometry(read_grid(volume.case.image).affine)
        segment(slices, geometry, False)  # compiles, if no volume of this depth was segmented before
        began = time.perf_counter()
        classes, _ = segment(slices, geometry, False)
        np.ascontiguousarray(from_slices(classes, geometry))
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > MAX_TIMED_SECONDS:
            break
    return seconds
