"""The exact gradient of a loss on whole volumes, in the memory of one window (paper 3's two-pass training).

A loss on a whole volume, such as Dice, is not a sum over windows: its derivative in one window depends on all others.
So each window runs twice. The first pass keeps only the logits. Assembled, they give the loss and its derivative with
respect to each logit. The second pass runs one window at a time again and backpropagates its part of that derivative.
By the chain rule, the sum over windows is the gradient of the whole volume. Backpropagation needs the memory of one
window, however many there are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.training.losses import Loss
from jaxla.training.step import Augment, Frozen, Gradient, apply_augmentation, network_inputs, valid_rows


def make_two_pass_gradient(graph: nnx.GraphDef, augment: Augment | None, loss: Loss) -> Gradient:
    """Return the two-pass gradient of a network that decodes window by window.

    The network needs the methods

    - `encode(inputs)`: the features of whole volumes,
    - `divide(features, present)`: the grid of windows, with `indices`, `cut(features, index)` and `assemble(windows)`,
    - `decode(window, grid, index)`: a window's logits from its features,
    - `finish(logits, size)`: the assembled logits, resized to the volume's size, which is `slice_size(inputs)`,

    and no BatchNorm, because its statistics would be those of all windows.

    Raises:
        ValueError: on the first call, if the network has BatchNorm.
    """

    def gradient(trainable: nnx.State, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Any, dict]:
        if jax.tree.leaves(nnx.filter_state(frozen.statistics, nnx.BatchStat)):
            raise ValueError("the network has BatchNorm, whose statistics two passes over windows cannot give")
        batch = apply_augmentation(augment, batch, key)
        inputs, mask, weight = network_inputs(batch), batch["mask"], batch["weight"]
        # The gradients of the two parts are computed separately. A frozen backbone is in neither.
        backbone, decoder = nnx.split_state(trainable, nnx.PathContains("backbone"), ...)

        def merge(backbone: nnx.State, decoder: nnx.State) -> nnx.Module:
            return nnx.merge(graph, nnx.merge_state(backbone, decoder), *frozen, copy=True)

        def decode(index: jax.Array, decoder: nnx.State, features: jax.Array) -> jax.Array:
            return merge(backbone, decoder).decode(grid.cut(features, index), grid, index)

        def volume_loss(logits: jax.Array) -> jax.Array:
            return loss(network.finish(logits, network.slice_size(inputs)), mask, weight)

        # Encode every slice once.
        network = merge(backbone, decoder)
        if trains_backbone := bool(jax.tree.leaves(backbone)):
            features, backbone_vjp = jax.vjp(lambda backbone: merge(backbone, decoder).encode(inputs), backbone)
        else:
            features = network.encode(inputs)
        grid = network.divide(features, valid_rows(batch))

        # Pass 1: the logits of all windows, one after the other.
        windows = jax.lax.map(lambda index: decode(index, decoder, features), grid.indices)

        # The loss on whole volumes, and its derivative with respect to every logit of every window.
        logits, assemble_vjp = jax.vjp(grid.assemble, windows)
        value, d_logits = jax.value_and_grad(volume_loss)(logits)
        (d_windows,) = assemble_vjp(d_logits)

        # Pass 2: each window again, backpropagated to the decoder and, if the backbone is trained, to the features.
        arguments = (decoder, features) if trains_backbone else (decoder,)

        def add_window(total: Any, window: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            index, d_window = window
            _, decode_vjp = jax.vjp(lambda decoder, features=features: decode(index, decoder, features), *arguments)
            return jax.tree.map(jnp.add, total, decode_vjp(d_window)), None

        zeros = jax.tree.map(jnp.zeros_like, arguments)
        (gradients, *d_features), _ = jax.lax.scan(add_window, zeros, (grid.indices, d_windows))

        # Backpropagate through the backbone once, from the summed derivative with respect to all features.
        if trains_backbone:
            gradients = nnx.merge_state(*backbone_vjp(*d_features), gradients)
        return value, gradients, {"statistics": frozen.statistics}

    return gradient
