"""Whole networks that `convert_weights` made of others' checkpoints; the file says how they are built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError
from jaxla.hardware import compute_dtype
from jaxla.models.weights import load_into
from jaxla.models.weights_format import read_metadata
from jaxla.nnunet.network import NNUNet
from jaxla.nnunet.plan import Plan, plan_from_json

NNUNET = "nnunet"  # what a file of a network that nnU-Net trained says that it holds


def load_converted(path: Path, dtype: jnp.dtype | None = None) -> nnx.Module:
    """The network of a file that `convert_weights --arch=nnunet` wrote, in evaluation mode.

    Args:
        dtype: of the computation; by default float32 on CPU and on NVIDIA's GPUs before Ampere, bfloat16 elsewhere.
            Parameters stay float32.

    Raises:
        InputError: a file that is missing, truncated, or holds something else.
    """
    metadata = read_metadata(path)
    if metadata["arch"] != NNUNET:
        raise InputError(f"{path}: holds {metadata['arch']}, a backbone and no network; load_backbone reads it")
    planned = planned_of(metadata, path)
    network = load_into(nnx.eval_shape(lambda: planned_network(*planned, dtype or compute_dtype())), path, NNUNET)
    network.eval()
    return network


def planned_network(plan: Plan, configuration: str, outputs: int, dtype: jnp.dtype = jnp.float32) -> NNUNet:
    """nnU-Net's network as a plan has it, with random parameters."""
    return NNUNet(plan.configuration(configuration), outputs, dtype=dtype, rngs=nnx.Rngs(0))


def planned_of(metadata: Mapping[str, str], path: Path) -> tuple[Plan, str, int]:
    """What a converted file of nnU-Net's says of its network: plan, configuration, K.

    Raises:
        InputError: it does not say it.
    """
    try:
        plan = plan_from_json(json.loads(metadata["plan"]), str(path))
        return plan, metadata["configuration"], int(metadata["outputs"])
    except (KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: does not say which network it holds ({error!r}); convert it again") from error
