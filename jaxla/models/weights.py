"""Converted weights -> networks, every parameter accounted for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from jaxla.cli.terminal import plural
from jaxla.config import InputError, default_cache_dir, nearest
from jaxla.hardware import compute_dtype
from jaxla.models.backbones import VARIANTS, Backbone, build_backbone
from jaxla.models.weights_format import UNUSED, how_to_convert, read_metadata, save_weights

M = TypeVar("M", bound=nnx.Module)


def parameter_shapes(network: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, buffer and statistic, as they stand in a file."""
    return {name: tuple(value.shape) for name, value in _flat(nnx.state(network)).items()}


def load_backbone(path: str | Path, dtype: jnp.dtype | None = None) -> Backbone:
    """A backbone with the weights of a converted file, which names its architecture itself; in evaluation mode.

    Args:
        dtype: of the computation; by default float32 on CPU and on NVIDIA's GPUs before Ampere, bfloat16 elsewhere.
            Parameters stay float32.

    Raises:
        InputError: a file that is missing, truncated, or does not hold the parameters of its architecture.
    """
    path = Path(path)
    arch = read_metadata(path)["arch"]
    if arch not in VARIANTS:
        raise InputError(f"{path}: holds {arch!r}, an architecture unknown here{nearest(arch, VARIANTS)}")
    return load_into(_abstract_backbone(arch, dtype or compute_dtype()), path, arch)


def parameters_sha256(network: nnx.Module) -> str:
    """Of names, shapes and values: the same for the same parameters, whatever file they came from."""
    total = hashlib.sha256()
    for name, variable in sorted(_flat(nnx.state(network)).items()):
        value = np.ascontiguousarray(variable.get_value())
        total.update(f"{name} {value.shape} {value.dtype}".encode())
        total.update(value.data)
    return total.hexdigest()


def save_random(path: Path, backbone: Backbone, arch: str, seed: int) -> None:
    """Write a backbone that was drawn from `seed`; the file says that its weights are random."""
    arrays = {name: np.asarray(value.get_value()) for name, value in _flat(nnx.state(backbone)).items()}
    save_weights(path, arrays, {"arch": arch, "source": f"random, seed {seed}", "source_sha256": "", "licence": ""})


def load_into(network: M, path: Path, arch: str) -> M:
    """`network` (may be abstract, from `nnx.eval_shape`) with the parameters of a file, each accounted for.

    Raises:
        InputError: as `require_parameters`.
    """
    require_parameters(path, arch, parameter_shapes(network))
    graph, state = nnx.split(network)
    for name, variable in _flat(state).items():
        with safe_open(path, framework="numpy") as file:  # anew: else all that was read stays mapped
            variable.set_value(jnp.asarray(file.get_tensor(name), jnp.float32))
    return nnx.merge(graph, state)


def require_parameters(path: Path, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a file holds `arch` and just these parameters; reads its header alone.

    Raises:
        InputError: another architecture, or parameters missing, extra, mis-shaped or not float32.
    """
    holds = read_metadata(path)["arch"]
    if holds != arch:
        alike = type(VARIANTS.get(holds)) is type(VARIANTS[arch])  # then a method on one can be built on the other
        instead = f"pass --model.arch={holds}, or" if alike else "pass"
        raise InputError(f"{path}: holds {holds}, not {arch}; {instead} a file of {arch}")
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith(UNUSED)]  # noqa: SIM118  (not a dict)
        slices = {name: file.get_slice(name) for name in names}
        held = {name: (tuple(of_name.get_shape()), of_name.get_dtype()) for name, of_name in slices.items()}
    if missing := sorted(set(shapes) - set(held)):
        raise InputError(
            f"{path}: lacks {plural(len(missing), 'parameter')} of {arch}, such as {missing[0]}; convert it again"
        )
    if extra := sorted(set(held) - set(shapes)):
        raise InputError(
            f"{path}: has {plural(len(extra), 'parameter')} that {arch} lacks, such as {extra[0]}; convert it again"
        )
    for name, needed in shapes.items():
        shape, dtype = held[name]
        if shape != needed:
            raise InputError(f"{path}: {name} has shape {shape}, {arch} needs {needed}; convert it again")
        if dtype != "F32":
            raise InputError(f"{path}: {name} is {dtype}, not F32 as it was written; convert it again")


def weights_file(arch: str, weights: str, cache_dir: Path | None = None) -> Path:
    """The file that `--model.weights` means, checked to be there and to hold that architecture.

    Raises:
        InputError: it is not; the message names the folder looked in and the command that makes it.
    """
    path = Path(weights) if weights else (cache_dir or default_cache_dir()) / "weights" / f"{arch}.safetensors"
    if weights and path.suffix != ".safetensors":
        raise InputError(
            f"--model.weights={weights}: not the name of a .safetensors file; give the one of {arch} that "
            "convert_weights wrote, or random, or leave it out for the one in the cache folder"
        )
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long or a folder may not be read
        how = f"{how_to_convert(arch, path)}, or" if VARIANTS[arch].licence else "none were released:"
        raise InputError(
            f"weights of {arch} are missing: looked for {path}; {how} pass --model.weights=FILE, or "
            "--model.weights=random for an untrained backbone"
        )
    require_parameters(path, arch, parameter_shapes(_abstract_backbone(arch)))
    return path


def _abstract_backbone(arch: str, dtype: jnp.dtype = jnp.float32) -> Backbone:
    return nnx.eval_shape(lambda: build_backbone(arch, dtype=dtype, rngs=nnx.Rngs(0)))


def _flat(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
