"""The devices as one mesh, and what is divided over it.

Within `use_devices` a batch is divided over all devices of the mesh, whatever its axes. Parameters are whole on every
device; or the large ones, and what the optimiser keeps of them, are divided over the axis `model` (SHARDED), and those
of one block at a time are put together while it runs. Outside of it everything is on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxla.config import InputError

T = TypeVar("T")

DATA, MODEL = "data", "model"
BATCH = PartitionSpec((DATA, MODEL))
WHOLE = PartitionSpec()

# Parameter of a vision transformer's stacked blocks -> how it is divided; axis 0 is the block. Nearly all of a
# backbone's numbers are here; what is not in the table is whole on every device.
SHARDED = {
    "blocks.attention.qkv.kernel": PartitionSpec(None, MODEL, None),
    "blocks.attention.projection.kernel": PartitionSpec(None, MODEL, None),
    "blocks.mlp.expand.kernel": PartitionSpec(None, MODEL, None),
    "blocks.mlp.contract.kernel": PartitionSpec(None, MODEL, None),
}


@contextmanager
def use_devices(count: int = 0, shard_params: bool = False) -> Iterator[Mesh]:
    """Run what stands within it on `count` devices (0: all).

    Args:
        shard_params: divide the parameters in SHARDED over the devices.

    Raises:
        InputError: there are not so many.
    """
    devices = jax.devices()
    if not 0 <= count <= len(devices):
        raise InputError(
            f"option --devices={count}: JAX sees {len(devices)} ({devices[0].device_kind}); give a number from 0 (all) "
            f"to {len(devices)}"
        )
    devices = devices[: count or None]
    shape = (1, len(devices)) if shard_params else (len(devices), 1)
    mesh = Mesh(np.array(devices).reshape(shape), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        yield mesh


def device_count() -> int:
    """How many devices a batch is divided over."""
    return jax.sharding.get_abstract_mesh().size or 1


def to_devices(tree: T) -> T:
    """Parameters, statistics or an optimiser's state on the devices of the mesh, divided as the table says.

    Raises:
        InputError: the devices do not divide a parameter.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    mesh = jax.sharding.get_mesh()
    return jax.device_put(tree, jax.tree.map(lambda divided: NamedSharding(mesh, divided.spec), shardings(tree)))


def shardings(tree: T) -> T:
    """For each array (or its shape) how it is divided."""
    mesh = jax.sharding.get_abstract_mesh()

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = next((spec for suffix, spec in SHARDED.items() if f".{suffix}" in f".{name}"), WHOLE)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"option --shard-params: {mesh.shape[axis]} devices do not divide {name} of shape "
                    f"{tuple(leaf.shape)}; give --devices a number that divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def constrain(tree: T) -> T:
    """`to_devices` within a compiled function."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree))


def spread(batch: T) -> T:
    """A batch, or one array of it, divided over the devices; filled up with zeros to a multiple of their number."""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    devices = NamedSharding(jax.sharding.get_mesh(), BATCH)

    def of_array(array: np.ndarray) -> jax.Array:
        short = -len(array) % device_count()
        return jax.device_put(np.pad(array, [(0, short)] + [(0, 0)] * (array.ndim - 1)) if short else array, devices)

    return jax.tree.map(of_array, batch)


def of_each_device(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of batches, run by each device on its own share of them.

    For what the compiler cannot divide by itself, such as a loop over images: every device would take all of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def gathered(tree: T) -> T:
    """One block's parameters, whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, WHOLE)
