"""What the package asks of a network's file in `networks/`: a `FAMILY` that says how the network is built."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxla.config import Model
from jaxla.models.backbones import Backbone
from jaxla.nnunet.plan import Configuration


class Family(NamedTuple):
    """Networks that are built alike.

    Attributes:
        of: what their architectures are, for messages.
        architectures: the names that `--model.arch` takes for them.
        options: of `Model`, those that it reads; with `weights` it stands on a backbone of that architecture.
        multiple: of which the sides of an image must be; or, where `pads`, what they must be at least.
        check: raises an InputError where options have values that the network cannot have.
        check_size: (options, option, side) raises one where it cannot have them with images of that side.
        build: (what it is built on, options, K, dtype of the computation, rngs) -> the network. That is its backbone,
            with its weights; or a plan's configuration; or None.
        configuration: which one of a plan it is built on, where it is planned from the data.
        of_volumes: whether it reads all slices of a volume together, [B, D, H, W, 1].
        least_slices: that a volume must have for it.
    """

    of: str
    architectures: Collection[str]
    options: tuple[str, ...]
    multiple: Callable[[Model], int]
    build: Callable[[Backbone | Configuration | None, Model, int, jnp.dtype, nnx.Rngs], nnx.Module]
    pads: bool = True
    check: Callable[[Model], None] = lambda model: None
    check_size: Callable[[Model, str, int], None] = lambda model, option, size: None
    configuration: Callable[[Model], str] | None = None
    of_volumes: bool = False
    least_slices: Callable[[Model], int] = lambda model: 1
