"""Left-atrium segmentation in LGE-MRI with DINOv2 and DINOv3 vision transformers, in JAX.

The commands are `python -m jaxla.train`, `study`, `report`, `predict`, `evaluate`, `verify`, `info`, `cache`,
`phantom` and `plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxla.config import InputError

if TYPE_CHECKING:
    import jax.numpy as jnp
    from flax import nnx

    from jaxla.models.backbones import Backbone

# In a checkout the folder of experiments stands beside the package, in an installation within it.
if not (Path(__file__).parent / "experiments").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = ["InputError", "build_network", "load_backbone", "load_network"]

# JAX takes seconds to import, and a command that shows its help must not wait for it: hence the imports within.


def load_backbone(path: str | Path, dtype: jnp.dtype | None = None) -> Backbone:
    """A backbone with the weights of a file that `convert_weights` wrote; the file names its architecture.

    It takes images [B, H, W, 3] float32, ImageNet-normalised. A vision transformer (H and W multiples of the patch
    size) gives `cls` [B, C], `registers` [B, R, C] and `patches` [B, h, w, C] after the final norm;
    `intermediate(images, blocks)` gives the patch tokens after single blocks. A ResNet and a VGG give the last stage's
    features [B, h, w, C]; `intermediate(images)` gives those of all stages (of a ResNet, of its stem too).

    Args:
        dtype: of the computation; by default float32 on CPU and on NVIDIA's GPUs before Ampere, bfloat16 elsewhere.
            Parameters stay float32.

    Raises:
        InputError: the file is missing, truncated, or does not hold the parameters of its architecture. Whether their
            values are those that were written, tells `convert_weights --verify` alone.
    """
    from jaxla.models import weights

    return weights.load_backbone(path, dtype)


def build_network(
    name: str,
    classes: int = 1,
    seed: int = 0,
    weights: str | Path | None = None,
    plan: Mapping[str, Any] | str | Path | None = None,
) -> nnx.Module:
    """The untrained network of a method, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K].

    All take C = 1 (grey values in 0..1); those on a pretrained backbone or encoder C = 3 (ImageNet-normalised) too.
    Those in windows take whole volumes [B, D, H, W, C], slices from head to foot, right to left or front to back.
    nnU-Net in three dimensions takes [B, D, H, W, 1] -> [B, D, H, W, K]; its grey values, as those of nnU-Net in two
    dimensions, have mean 0 and standard deviation 1.

    Args:
        name: a method, as `python -m jaxla.train --exp=list` lists them.
        classes: K; 1 for one structure (sigmoid), else background and structures (softmax).
        seed: of the parameters that start from random values.
        weights: of the backbone: a converted file, "random", or None for what the method says (for released backbones
            the file in the cache folder).
        plan: for nnU-Net, which plans its network from the data: the file that `python -m jaxla.plan` writes, nnU-Net's
            own, or what stands in it.

    Raises:
        InputError: an unknown method, weights that are missing or do not fit, or no plan where one is needed.
    """
    from jaxla.config import lookup
    from jaxla.experiments import METHODS
    from jaxla.models.networks.base import build_network
    from jaxla.nnunet.plan import plan_from_json, read_plan

    method = lookup("method", name, METHODS)
    model, needs_plan = method.model, method.preprocessing is None
    if weights is not None:
        model = model.with_weights(str(weights))
        if model.weights != str(weights):
            raise InputError(f"weights={weights}", f"{name} has no pretrained part", "Leave it out.")
    if not needs_plan and plan is not None:
        raise InputError("plan", f"{name} takes none, because its network is the same for all data", "Leave it out.")
    if needs_plan and plan is None:
        raise InputError("plan", f"{name} is planned from the data", "Give the file that python -m jaxla.plan writes.")
    if isinstance(plan, Mapping):
        plan = plan_from_json(plan, "plan")
    elif plan is not None:
        plan = read_plan(Path(plan))
    return build_network(model, classes, seed, plan=plan)


def load_network(path: str | Path) -> nnx.Module:
    """A trained network, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K]; see `build_network`.

    Args:
        path: a finished run's folder, or a file that `convert_weights --arch=nnunet` wrote: it gives nnU-Net's own
            logits, K = 2 for one structure, background first.

    Raises:
        InputError: not a run folder, no checkpoint in it, or its frozen backbone's file is gone or has changed; or a
            file that is damaged or holds no network.
    """
    from jaxla.nnunet.converted import load_converted
    from jaxla.runs.trained import load_run

    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        return load_converted(Path(path))
    return load_run(path).network
