"""Lower a training step for an NVIDIA GPU on a machine without one; nothing runs."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jaxla.models.build import build_network, configuration_of, is_planned, reads_volumes
from jaxla.pipeline.sources import GRADIENTS, loss_of

from jaxla.config import Method
from jaxla.nnunet.plan import Plan
from jaxla.training.losses import per_volume
from jaxla.training.step import make_optimiser, make_step, split_network

HOPPER, TURING = 9.0, 7.5  # compute capabilities: of an H200, and of a GPU without bfloat16 and cuDNN attention


def pretend_gpu(patch: pytest.MonkeyPatch, capability: float = HOPPER) -> None:
    """Make JAX answer as on a machine with such a GPU and cuDNN."""
    device = SimpleNamespace(
        platform="gpu",
        compute_capability=str(capability),
        client=SimpleNamespace(platform_version="PJRT C API\ncuda 12090"),
    )
    patch.setattr(jax, "default_backend", lambda: "gpu")
    patch.setattr(jax, "devices", lambda: [device])
    cudnn = fused_attention_stablehlo
    patch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
    patch.setattr(cudnn, "check_compute_capability", lambda minimum: float(minimum) <= capability)
    patch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda exact: float(exact) == capability)


def lowered_step(
    method: Method,
    *,
    classes: int,
    plan: Plan,
    batch_size: int,
    slices: int,
    put_on_device: Callable[[Any], Any] = lambda shapes: shapes,
) -> jax.stages.Lowered:
    """Return a method's training step with random weights, lowered for CUDA; call it within `pretend_gpu`.

    Args:
        classes: channels of the logits.
        plan: nnU-Net's plan; other networks ignore it.
        slices: number of slices in a volume; networks that read single slices ignore it.
        put_on_device: adds a device to the shapes of the step's arguments.
    """
    model, recipe = replace(method.model, weights="random"), method.training
    network = nnx.eval_shape(lambda: build_network(model, classes, 0, plan=plan))
    split = split_network(network, train_backbone=model.backbone != "frozen")
    optimiser = make_optimiser(recipe, recipe.epochs, pretrained_backbone=False)
    rows, size = (batch_size,), (method.preprocessing.image_size,) * 2
    if is_planned(model):
        size = configuration_of(model, plan).patch_size
    if reads_volumes(model):
        rows = (batch_size, slices)
    batch = {
        "input": jax.ShapeDtypeStruct((*rows, *size, 1), jnp.float32),
        "mask": jax.ShapeDtypeStruct((*rows, *size), jnp.uint8),
        "weight": jax.ShapeDtypeStruct(rows, jnp.float32),
    }
    loss = loss_of(recipe, batch_dice=True)
    loss = per_volume(loss) if reads_volumes(model) else loss
    step = make_step(GRADIENTS[recipe.gradient](split.training, None, loss), optimiser)
    state, key = jax.eval_shape(optimiser.init, split.trainable), jax.eval_shape(lambda: jax.random.key(0))
    traced = step.trace(*map(put_on_device, (split.trainable, split.frozen, state, batch, key)))
    return traced.lower(lowering_platforms=("cuda",))
