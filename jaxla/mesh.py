"""The device mesh, and the sharding of arrays over it.

Within `use_devices` all devices of the mesh share each batch. Every device holds all parameters, or with
`shard_params` a part of the large ones (see SHARDED). Outside `use_devices` everything runs on one device.

Each of several processes holds the rows of a batch that its own devices compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxla.cli.terminal import plural
from jaxla.config import InputError, option

T = TypeVar("T")

log = logging.getLogger("jaxla")

DATA, MODEL = "data", "model"
BATCH = PartitionSpec((DATA, MODEL))
REPLICATED = PartitionSpec()

# Part of a parameter's name -> its sharding; axis 0 indexes the stacked blocks of a vision transformer. These kernels
# hold nearly all of a backbone's parameters. Parameters that are not listed are replicated.
SHARDED = {
    "blocks.attention.qkv.kernel": PartitionSpec(None, MODEL, None),
    "blocks.attention.projection.kernel": PartitionSpec(None, MODEL, None),
    "blocks.mlp.expand.kernel": PartitionSpec(None, MODEL, None),
    "blocks.mlp.contract.kernel": PartitionSpec(None, MODEL, None),
}


@contextmanager
def use_devices(count: int = 0, shard_params: bool = False) -> Iterator[Mesh]:
    """Within the context, use a mesh of `count` devices (0: all), the same number from each process.

    With `shard_params`, the parameters in SHARDED are sharded over all of these devices. Raises an InputError if there
    are fewer devices, or the processes cannot provide the same number.
    """
    devices, processes = jax.devices(), jax.process_count()
    total, kind = len(devices), devices[0].device_kind
    by_process = [[device for device in devices if device.process_index == k] for k in range(processes)]
    visible = [len(local) for local in by_process]
    if not 0 <= count <= total:
        problem = f"out of range, because JAX detects {plural(total, 'device')} ({kind})"
        raise InputError(option("devices", count), problem, f"Use a number from 0 (all) to {total}.")
    if len(set(visible)) > 1:
        problem = f"the processes detect {', '.join(map(str, visible))} devices, but need the same number"
        raise InputError("CUDA_VISIBLE_DEVICES", problem, "Hide the extra devices, or use other hosts.")
    if count % processes:
        problem = f"not a multiple of the number of processes, {processes}"
        raise InputError(option("devices", count), problem, f"Use a multiple of {processes}.")
    per_process = count // processes or visible[0]
    if per_process * processes > 1:
        log.info("%d devices share each batch (%s)", per_process * processes, kind)
    with _use_mesh([device for local in by_process for device in local[:per_process]], shard_params) as mesh:
        yield mesh


@contextmanager
def use_local_devices() -> Iterator[None]:
    """Within `use_devices`: use only the devices of this process, for work that each process does separately."""
    devices = jax.sharding.get_mesh().devices.flat
    with _use_mesh([device for device in devices if device.process_index == jax.process_index()], shard_params=False):
        yield


@contextmanager
def on_host() -> Iterator[None]:
    """Create arrays in host memory, because they may not fit on one device."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        host = jax.local_devices()[0]
    with jax.default_device(host), _use_mesh([host], shard_params=False):
        yield


@contextmanager
def _use_mesh(devices: Sequence[jax.Device], shard_params: bool) -> Iterator[Mesh]:
    shape = (1, len(devices)) if shard_params else (len(devices), 1)
    mesh = Mesh(np.array(devices).reshape(shape), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        yield mesh


def device_count() -> int:
    """Return how many devices share a batch."""
    return jax.sharding.get_abstract_mesh().size or 1


# --- sharding ---


def shardings(tree: T) -> T:
    """Return the sharding of each array or shape of a pytree; raise an InputError if an axis cannot be divided."""
    mesh = jax.sharding.get_abstract_mesh()

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = next((spec for part, spec in SHARDED.items() if f".{part}" in f".{name}"), REPLICATED)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                problem = f"{name} of shape {tuple(leaf.shape)} cannot be divided over {mesh.shape[axis]} devices"
                raise InputError(option("shard-params"), problem, f"Set {option('devices')} to a divisor of {size}.")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_on_devices(tree: T) -> T:
    """Place parameters, statistics or optimiser state on the devices of the mesh, sharded as `shardings` says."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    mesh = jax.sharding.get_mesh()

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        sharding = NamedSharding(mesh, sharding.spec)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)  # every process holds the whole array and uses the part for its own devices
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, tree, shardings(tree))


def constrain_sharding(tree: T) -> T:
    """Do what `place_on_devices` does, within a compiled function."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree))


def replicate(tree: T) -> T:
    """Within a compiled function: gather sharded arrays, so that every device holds all of them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, REPLICATED)


def local_rows(batch_size: int) -> range:
    """Return which rows of a batch the devices of this process compute; rows from `batch_size` on are padding."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return range(batch_size)
    rows_per_device = -(-batch_size // mesh.size)
    local = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return range(local[0] * rows_per_device, (local[-1] + 1) * rows_per_device)


def shard_batch(rows: T) -> T:
    """Shard a batch, or one array of it, over the devices; each process passes its own rows (see `local_rows`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return rows
    sharding = NamedSharding(jax.sharding.get_mesh(), BATCH)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), rows)


def map_over_devices(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a version of `function` that each device runs on its own rows of a batch, for code XLA cannot shard."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def global_max(value: int) -> int | jax.Array:
    """Return the maximum of a value over all processes, which must all call it; does not wait for the result."""
    if jax.process_count() == 1:
        return value
    mesh = jax.sharding.get_mesh()
    local = np.full(len(mesh.local_devices), value)
    return _max(jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), local))


@jax.jit
def _max(values: jax.Array) -> jax.Array:
    return replicate(values.max())
