"""The devices as one mesh, and what is divided over it.

Within `use_devices` a batch is divided over all devices of the mesh, whatever its axes. Parameters are whole on every
device; or the large ones, and what the optimiser keeps of them, are divided over the axis `model` (SHARDED), and those
of one block at a time are put together while it runs. Outside of it everything is on one device.

Of several processes each one holds the rows of a batch that its own devices take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxla.config import InputError
from jaxla.devices.processes import (  # noqa: F401
    barrier,
    broadcast,
    gather,
    if_others_end,
    is_first,
    local_items,
    log_progress,
    process_count,
    require_same,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

DATA, MODEL = "data", "model"
BATCH = PartitionSpec((DATA, MODEL))
REPLICATED = PartitionSpec()

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
    """Run what stands within it on `count` devices (0: all); the same number of each process.

    Args:
        shard_params: divide the parameters in SHARDED over the devices.

    Raises:
        InputError: there are not so many, or the processes cannot have the same number of them.
    """
    devices, processes = jax.devices(), jax.process_count()
    if not 0 <= count <= len(devices):
        raise InputError(
            f"option --devices={count}: JAX sees {len(devices)} ({devices[0].device_kind}); give a number from 0 (all) "
            f"to {len(devices)}"
        )
    of_process = [[device for device in devices if device.process_index == k] for k in range(processes)]
    fewest, most = (reach(map(len, of_process)) for reach in (min, max))
    if fewest < most:
        seen = ", ".join(str(len(its)) for its in of_process)
        raise InputError(
            f"the {processes} processes see {seen} devices, and must see the same number; make the others invisible "
            f"(CUDA_VISIBLE_DEVICES), or choose other hosts"
        )
    if count % processes:
        raise InputError(
            f"option --devices={count}: {processes} processes use the same number of devices each; give a multiple of "
            f"{processes}"
        )
    each = count // processes or fewest
    if each * processes > 1:
        log.info("%d devices share each batch (%s)", each * processes, devices[0].device_kind)
    with _mesh([device for its in of_process for device in its[:each]], shard_params) as mesh:
        yield mesh


@contextmanager
def use_local_devices() -> Iterator[None]:
    """Within `use_devices`: only the devices of this process, for work that each process does on its own."""
    mine = [device for device in jax.sharding.get_mesh().devices.flat if device.process_index == jax.process_index()]
    with _mesh(mine, shard_params=False):
        yield


@contextmanager
def _mesh(devices: Sequence[jax.Device], shard_params: bool) -> Iterator[Mesh]:
    shape = (1, len(devices)) if shard_params else (len(devices), 1)
    mesh = Mesh(np.array(devices).reshape(shape), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        yield mesh


def device_count() -> int:
    """How many devices a batch is divided over."""
    return jax.sharding.get_abstract_mesh().size or 1


def place_on_devices(tree: T) -> T:
    """Parameters, statistics or an optimiser's state on the devices of the mesh, divided as the table says.

    Raises:
        InputError: the devices do not divide a parameter.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    mesh = jax.sharding.get_mesh()

    def place(leaf: Any, divided: NamedSharding) -> jax.Array:
        sharding = NamedSharding(mesh, divided.spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)  # each process gives its devices their part of what all of them have
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(place, tree, shardings(tree))


def shardings(tree: T) -> T:
    """For each array (or its shape) how it is divided."""
    mesh = jax.sharding.get_abstract_mesh()

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = next((spec for suffix, spec in SHARDED.items() if f".{suffix}" in f".{name}"), REPLICATED)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"option --shard-params: {mesh.shape[axis]} devices do not divide {name} of shape "
                    f"{tuple(leaf.shape)}; give --devices a number that divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def constrain_sharding(tree: T) -> T:
    """`to_devices` within a compiled function."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree))


@contextmanager
def on_host() -> Iterator[None]:
    """Keep what is made within it in the host's memory, for the devices may not hold it whole."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        host = jax.local_devices()[0]
    with jax.default_device(host), _mesh([host], shard_params=False):
        yield


def local_rows(batch_size: int) -> range:
    """The rows of a batch that the devices of this process take; those from `batch_size` on only fill it up."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return range(batch_size)
    each = -(-batch_size // mesh.size)
    mine = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return range(mine[0] * each, (mine[-1] + 1) * each)


def shard_batch(rows: T) -> T:
    """A batch, or one array of it, divided over the devices; of several processes each one gives its own rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    devices = NamedSharding(jax.sharding.get_mesh(), BATCH)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(devices, array), rows)


def replicate(tree: T) -> T:
    """Within a compiled function: arrays put together, so that every device and every process has all of them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, REPLICATED)


def global_max(number: int) -> int | jax.Array:
    """The highest of the processes' numbers; each must call it. Waited for only once it is read."""
    if jax.process_count() == 1:
        return number
    mesh = jax.sharding.get_mesh()
    mine = np.full(len(mesh.local_devices), number)
    return _highest(jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), mine))


@jax.jit
def _highest(numbers: jax.Array) -> jax.Array:
    return replicate(numbers.max())


def map_over_devices(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of batches, run by each device on its own share of them.

    For what the compiler cannot divide by itself, such as a loop over images: every device would take all of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def join_processes(coordinator: str, processes: int | None, process: int | None, timeout: float):  # noqa: ANN201
    import os

    from jaxla.devices.launch import find_launch
    from jaxla.devices.processes import join_processes as join

    return join(find_launch(coordinator, processes, process, os.environ), timeout)
