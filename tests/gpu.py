"""Lower a training step for an NVIDIA GPU on a machine without a GPU, without running it."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from jaxla.config import Data, Experiment, Method
from jaxla.nnunet.plan import Plan
from jaxla.tasks import TASKS, Task
from jaxla.training.optimisers import make_optimiser, make_rates
from jaxla.training.step import make_step, split_network

# compute capabilities of an H200, an A100, and a GPU with neither bfloat16 nor cuDNN attention
HOPPER, AMPERE, TURING = 9.0, 8.0, 7.5


def pretend_gpu(patch: pytest.MonkeyPatch, capability: float = HOPPER) -> None:
    """Make JAX report a GPU of this compute capability, and cuDNN."""
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


def task_without_data(method: Method, outputs: int, plan: Plan) -> Task:
    """Return the task of a method with random weights.

    Args:
        outputs: K, channels of the logits.
        plan: nnU-Net's plan; methods that need none ignore it.
    """
    method = replace(method, model=method.model.with_weights("random"))
    needed_plan = {"plan": plan} if method.model.needs_plan else {}
    return TASKS[method.model.sample](Experiment(method.name, method.summary, Data(), method), outputs, **needed_plan)


def lowered_step(
    task: Task, *, slices: int, put_on_device: Callable[[Any], Any] = lambda shapes: shapes
) -> jax.stages.Lowered:
    """Return a task's training step without augmentation, lowered for CUDA; call it within `pretend_gpu`.

    Args:
        slices: number of slices in a volume; networks that read single slices or patches ignore it.
        put_on_device: adds a device to the shapes of the step's arguments.
    """
    parts = split_network(nnx.eval_shape(task.build_network), train_backbone=task.model.backbone == "finetuned")
    optimiser = make_optimiser(task.recipe, has_pretrained_backbone=False)
    rows, shape = task.batch_size, task.input_shape(slices)
    batch = {
        "input": jax.ShapeDtypeStruct((rows, *shape), jnp.float32),
        "mask": jax.ShapeDtypeStruct((rows, *shape[:-1]), jnp.uint8),
        "weight": jax.ShapeDtypeStruct((rows, *task.weight_shape(slices)), jnp.float32),
    }
    step = make_step(task.make_gradient(parts.training, None, task.loss), optimiser)
    state, key = jax.eval_shape(optimiser.init, parts.trainable), jax.eval_shape(lambda: jax.random.key(0))
    rates = jax.eval_shape(lambda: make_rates(task.recipe, task.recipe.epochs)(0))
    traced = step.trace(*map(put_on_device, (parts.trainable, parts.frozen, state, batch, key, rates)))
    return traced.lower(lowering_platforms=("cuda",))
