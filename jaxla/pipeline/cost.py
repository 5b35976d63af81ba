"""What a run costs, to be read beside how good it is: parameters, multiply-adds, memory, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.data.prepared import PreparedVolume
from jaxla.data.volumes import read_image
from jaxla.distributed import on_host
from jaxla.hardware import peak_device_bytes, peak_host_bytes
from jaxla.inference.segment import Segment
from jaxla.inference.trained import TrainedNetwork
from jaxla.models.build import configuration_of, reads_volumes
from jaxla.models.ops.multiply_adds import multiply_adds
from jaxla.runs.cost import Cost
from jaxla.training.step import count_parameters, split_network

TIMED_VOLUMES, TIMED_SECONDS = 3, 60  # volumes are timed until there are so many, or that time has passed


def measure_cost(
    trained: TrainedNetwork, segment: Segment, test: Iterable[PreparedVolume], step_bytes: int, deepest: int
) -> Cost:
    """Of a finished run; the first of its test cases are segmented once more, to be timed.

    Of several networks parameters and multiply-adds are of all together.

    Args:
        step_bytes: of a training step.
        deepest: slices of the deepest volume that trained or validated.
    """
    experiment = trained.record.experiment
    seconds, slices = [], []
    for prepared in test:
        volume = read_image(prepared.case.image)
        if not seconds or reads_volumes(experiment.model):  # those are compiled for several numbers of slices
            segment(volume)
        began = time.perf_counter()
        segment(volume)
        seconds.append(time.perf_counter() - began)
        slices.append(prepared.shape[0])
        if len(seconds) == TIMED_VOLUMES or sum(seconds) > TIMED_SECONDS:
            break
    network, count = trained.networks[0], len(trained.networks)
    size, batch_size = (trained.record.canvas.size,) * 2, experiment.training.batch_size
    if trained.plan:
        configuration = configuration_of(experiment.model, trained.plan, batch_size)
        size, batch_size = configuration.patch_size, configuration.batch_size
    elif reads_volumes(experiment.model):
        size = (deepest, *size)
    depth = size[0] if len(size) == 3 else 1
    finetuned = experiment.model.backbone == "finetuned"
    graph, state = nnx.split(network)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    image = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
    with on_host():  # one slice, which several devices could not divide
        multiplied = multiply_adds(lambda state, images: nnx.merge(graph, state)(images), shapes, image)
    return Cost(
        parameters=count * count_parameters(nnx.state(network, nnx.Param)),
        trained_parameters=count * count_parameters(split_network(network, train_backbone=finetuned).trainable),
        multiply_adds=count * multiplied // depth,
        step_bytes=step_bytes,
        step_slices=batch_size * depth,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
        inference_seconds=tuple(seconds),
        inference_slices=tuple(slices),
    )
