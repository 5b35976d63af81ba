"""Networks that nnU-Net trained, from files of `convert_weights`, which contain the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jaxla.config import InputError
from jaxla.hardware import compute_dtype
from jaxla.models.weights import load_parameters
from jaxla.models.weights_format import read_metadata
from jaxla.nnunet.network import NNUNet
from jaxla.nnunet.plan import Plan, plan_from_json

NNUNET = "nnunet"  # `arch` in the metadata of such a file


def load_converted(path: Path) -> nnx.Module:
    """Load the network of a file that `convert_weights --arch=nnunet` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, truncated, or contains something else.
    """
    metadata = read_metadata(path)
    if metadata["arch"] != NNUNET:
        problem = f"contains the backbone {metadata['arch']}, not a segmentation network"
        raise InputError(path, problem, "Load it with jaxla.load_backbone.")
    plan, configuration, outputs = parse_metadata(metadata, path)
    abstract = nnx.eval_shape(lambda: build_from_plan(plan, configuration, outputs, compute_dtype()))
    network = load_parameters(abstract, path, NNUNET)
    network.eval()
    return network


def build_from_plan(plan: Plan, configuration: str, outputs: int, dtype: jnp.dtype = jnp.float32) -> NNUNet:
    """Build a configuration's network with random parameters."""
    return NNUNet(plan.configuration(configuration), outputs, dtype=dtype, rngs=nnx.Rngs(0))


def parse_metadata(metadata: Mapping[str, str], path: Path) -> tuple[Plan, str, int]:
    """Return plan, configuration and K of a converted file; raise an InputError if the metadata lack one of them."""
    try:
        plan = plan_from_json(json.loads(metadata["plan"]), str(path))
        return plan, metadata["configuration"], int(metadata["outputs"])
    except InputError:
        raise
    except KeyError as error:
        problem = f"its metadata lack {error}, so the network is unknown"
        raise InputError(path, problem, "Convert the checkpoint again.") from error
    except (ValueError, RecursionError) as error:
        problem = f"its metadata do not describe the network ({error})"
        raise InputError(path, problem, "Convert the checkpoint again.") from error
