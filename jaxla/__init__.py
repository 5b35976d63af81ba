"""Left-atrium segmentation in LGE-MRI with DINOv2 and DINOv3 vision transformers, in JAX.

The commands are `python -m jaxla.train`, `study`, `report`, `predict`, `evaluate`, `verify`, `info`, `cache` and
`phantom`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxla.config import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import jax.numpy as jnp
    from flax import nnx

    from jaxla.models.backbones import Backbone

__all__ = ["InputError", "build_network", "load_backbone", "load_network"]

# JAX takes seconds to import, and a command that shows its help must not wait for it: hence the imports within.


def load_backbone(path: str | Path, dtype: jnp.dtype | None = None) -> Backbone:
    """A backbone with the weights of a file that `convert_weights` wrote; the file names its architecture.

    It takes images [B, H, W, 3] float32, ImageNet-normalised. A vision transformer (H and W multiples of the patch
    size) gives `cls` [B, C], `registers` [B, R, C] and `patches` [B, h, w, C] after the final norm;
    `intermediate(images, blocks)` gives the patch tokens after single blocks. A ResNet and a VGG give the last stage's
    features [B, h, w, C]; `intermediate(images)` gives those of all stages (of a ResNet, of its stem too).

    Args:
        dtype: of the computation; by default float32 on CPU and bfloat16 on GPU. Parameters stay float32.

    Raises:
        InputError: the file is missing, truncated, or does not hold the parameters of its architecture.
    """
    from jaxla.models import weights

    return weights.load_backbone(path, dtype)


def build_network(
    name: str, classes: int = 1, seed: int = 0, weights: str | Path | None = None, plan: object = None
) -> nnx.Module:
    """The untrained network of a method, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K].

    All take C = 1 (grey values in 0..1); those on a pretrained backbone or encoder C = 3 (ImageNet-normalised) too.

    Args:
        name: a method, as `python -m jaxla.train --exp=list` lists them.
        classes: K; 1 for one structure (sigmoid), else background and structures (softmax).
        seed: of the parameters that start from random values.
        weights: of the backbone: a converted file, "random", or None for what the method says (for released backbones
            the file in the cache folder).
        plan: for methods that plan their network from the data; none of the present ones does.

    Raises:
        InputError: an unknown method, or weights that are missing or do not fit.
    """
    from dataclasses import replace

    from jaxla.config import lookup
    from jaxla.experiments import METHODS
    from jaxla.models import build

    model = lookup("method", name, METHODS).model
    if plan is not None:
        raise InputError(f"plan: {name} takes none; its network is the same for all data")
    if weights is not None:
        model = replace(model, weights=str(weights))
    return build.build_network(model, classes, seed)


def load_network(path: str | Path) -> nnx.Module:
    """The trained network of a finished run's folder, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K].

    Raises:
        InputError: not a run folder, no checkpoint in it, or its frozen backbone's file is gone or has changed.
    """
    from jaxla.inference.trained import load_run

    return load_run(path).network
