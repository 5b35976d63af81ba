"""Left-atrium segmentation in LGE-MRI with DINOv2 and DINOv3 vision transformers, in JAX.

`jaxla --help` lists the commands.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxla.config import InputError
from jaxla.version import __version__

if TYPE_CHECKING:
    import jax.numpy as jnp
    from flax import nnx

    from jaxla.models.backbones import Backbone

# `experiments` is a folder beside the package in a checkout, and within the package in an installation.
if not (Path(__file__).parent / "experiments").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if getattr(sys, "argv", [])[:1] == ["-m"]:  # Python is about to run `python -m jaxla.COMMAND`, whose module imports JAX
    from jaxla.cli.start import start_command

    start_command()

__all__ = ["InputError", "__version__", "build_network", "load_backbone", "load_network"]

# Imports are within functions, because JAX takes seconds to import and a command's --help must not wait for it.


def load_backbone(path: str | Path, dtype: jnp.dtype | None = None) -> Backbone:
    """Return the backbone in a file that `convert_weights` wrote; the file names its architecture.

    The backbone takes images [B, H, W, 3] float32, ImageNet-normalised. A vision transformer, for which H and W are
    multiples of the patch size, returns `cls` [B, C], `registers` [B, R, C] and `patches` [B, h, w, C] after the final
    norm; `intermediate(images, blocks)` returns the patch tokens after each of these blocks. A ResNet or VGG returns
    the last stage's features [B, h, w, C]; `intermediate(images)` returns those of all stages, and of a ResNet's stem.

    Args:
        dtype: dtype of the computation. Default: float32 on CPU and on NVIDIA GPUs before Ampere, bfloat16 elsewhere.
            Parameters stay float32.

    Raises:
        InputError: the file is missing, truncated, or does not hold the parameters of its architecture. A file whose
            values have changed is found only by `convert_weights --verify`.
    """
    from jaxla.hardware import require_float32
    from jaxla.models import weights

    require_float32()
    return weights.load_backbone(path, dtype)


def build_network(
    name: str,
    classes: int = 1,
    seed: int = 0,
    weights: str | Path | None = None,
    plan: Mapping[str, Any] | str | Path | None = None,
) -> nnx.Module:
    """Return the untrained network of a method, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K].

    All networks take C = 1, grey values in 0..1; `unet_small` takes a slice between its two neighbours, C = 3. Those
    with a pretrained backbone also take C = 3, ImageNet-normalised.
    The `windows_` methods take whole volumes [B, D, H, W, C], with slices from head to foot, right to left or front to
    back. `nnunet_3d` takes [B, D, H, W, 1]. nnU-Net's grey values have mean 0 and standard deviation 1.

    Args:
        name: a method; `python -m jaxla.train --exp=list` lists them.
        classes: K: 1 for one structure (sigmoid), else background and structures (softmax).
        seed: seed of the parameters that start from random values.
        weights: the backbone's weights: a converted file, or "random". Default: what the method says, which for
            released backbones is the file in the cache folder.
        plan: nnU-Net's plan: a file that `python -m jaxla.plan` or nnU-Net wrote, or its content.

    Raises:
        InputError: the method is unknown, weights are missing or do not fit, or a plan is missing or not needed.
    """
    from jaxla.config import lookup
    from jaxla.experiments import METHODS
    from jaxla.hardware import require_float32
    from jaxla.models.networks.base import build_network
    from jaxla.nnunet.plan import plan_from_json, read_plan

    require_float32()
    method = lookup("method", name, METHODS)
    model = method.model
    if weights is not None:
        model = model.with_weights(str(weights))
        if model.weights != str(weights):
            raise InputError(f"weights={weights}", f"{name} has no pretrained part", "Remove the argument.")
    if not model.needs_plan and plan is not None:
        raise InputError("plan", f"{name} needs no plan", "Remove the argument.")
    if model.needs_plan and plan is None:
        raise InputError("plan", f"{name} needs a plan", "Pass the file that python -m jaxla.plan writes.")
    if isinstance(plan, Mapping):
        plan = plan_from_json(plan, "plan")
    elif plan is not None:
        plan = read_plan(Path(plan))
    return build_network(model, classes, seed, plan=plan)


def load_network(path: str | Path) -> nnx.Module:
    """Return a trained network, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K]; see `build_network`.

    Args:
        path: the folder of a finished run, or a file that `convert_weights --arch=nnunet` wrote. The network in such a
            file returns nnU-Net's own logits: K = 2 for one structure, background first.

    Raises:
        InputError: the folder is not a run or has no checkpoint, the file of its frozen backbone is missing or has
            changed, or the file is damaged or holds no network.
    """
    from jaxla.hardware import require_float32
    from jaxla.nnunet.converted import load_converted
    from jaxla.runs.trained import load_run

    require_float32()
    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        return load_converted(Path(path))
    return load_run(path).network
