"""The gradient of a loss on whole volumes, in the memory of one window of them (paper 3's two-pass training).

A loss on the whole volume, such as Dice, is no sum over windows: what it asks of one window depends on all others. So
the windows are run twice. The first pass keeps nothing but the logits; put together, they give the loss and its
derivative with respect to each logit. The second pass runs one window at a time again and goes back through it from its
part of that derivative. Summed up these are the gradients of the whole, by the chain rule, not an approximation of
them; memory for going back is needed for one window at a time, however many there are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxla.training.losses import Loss
from jaxla.training.step import Augment, Frozen, Gradient, apply_augmentation, network_inputs, valid_rows


def make_two_pass_gradient(graph: nnx.GraphDef, augment: Augment | None, loss_of: Loss) -> Gradient:
    """The seam for a network in windows, which has

    - `encode(inputs)`, features of whole volumes, once,
    - `divide(features, present)`, the windows: `numbers`, `cut(features, number)`, `assemble(parts)`,
    - `decode(part, windows, number)`, a window's logits from its features,
    - `finish(logits, size)`, the assembled logits at the size of the volume, `size_of(inputs)`,

    and no BatchNorm, whose statistics would be of all windows.

    Args:
        augment: what is done to images and masks before.
        loss_of: of the logits of whole volumes.

    Raises, when called:
        ValueError: it has BatchNorm.
    """

    def gradient(trainable: nnx.State, frozen: Frozen, batch: Any, key: jax.Array) -> tuple[jax.Array, Any, dict]:
        if jax.tree.leaves(nnx.filter_state(frozen.statistics, nnx.BatchStat)):
            raise ValueError("the network has BatchNorm, whose statistics two passes over windows cannot give")
        batch = apply_augmentation(augment, batch, key)
        inputs, mask, weight = network_inputs(batch), batch["mask"], batch["weight"]
        # apart, for each needs its gradient at another time; a backbone that is frozen is in neither
        of_backbone, of_decoder = nnx.split_state(trainable, nnx.PathContains("backbone"), ...)

        def network(of_backbone: nnx.State, of_decoder: nnx.State) -> nnx.Module:
            return nnx.merge(graph, nnx.merge_state(of_backbone, of_decoder), *frozen, copy=True)

        def decode(number: jax.Array, of_decoder: nnx.State, features: jax.Array) -> jax.Array:
            return network(of_backbone, of_decoder).decode(windows.cut(features, number), windows, number)

        def whole_loss(logits: jax.Array) -> jax.Array:
            return loss_of(whole.finish(logits, whole.size_of(inputs)), mask, weight)

        # Every slice is encoded, once, whole.
        whole = network(of_backbone, of_decoder)
        if trains_backbone := bool(jax.tree.leaves(of_backbone)):
            features, back_to_backbone = jax.vjp(lambda own: network(own, of_decoder).encode(inputs), of_backbone)
        else:
            features = whole.encode(inputs)
        windows = whole.divide(features, valid_rows(batch))

        # Pass 1: the logits of all windows, one after the other, and nothing else of them.
        parts = jax.lax.map(lambda number: decode(number, of_decoder, features), windows.indices)

        # The loss on the whole volume, and what it asks of every logit of every window.
        logits, apart = jax.vjp(windows.assemble, parts)
        loss, of_logits = jax.value_and_grad(whole_loss)(logits)
        (of_parts,) = apart(of_logits)

        # Pass 2: each window again, and back through it, to the decoder and, if it is trained, towards the backbone.
        wanted = (of_decoder, features) if trains_backbone else (of_decoder,)

        def add_window(total: Any, window: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            number, of_part = window
            _, back = jax.vjp(lambda of_decoder, features=features: decode(number, of_decoder, features), *wanted)
            return jax.tree.map(jnp.add, total, back(of_part)), None

        zeros = jax.tree.map(jnp.zeros_like, wanted)
        (gradients, *of_features), _ = jax.lax.scan(add_window, zeros, (windows.indices, of_parts))

        # A backbone that is trained: back through all slices, once, from what all windows ask of their features.
        if trains_backbone:
            gradients = nnx.merge_state(*back_to_backbone(*of_features), gradients)
        return loss, gradients, {"statistics": frozen.statistics}

    return gradient
