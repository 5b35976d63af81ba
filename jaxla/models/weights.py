"""Load converted weights into networks; a file must contain exactly the parameters of the network."""

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

from jaxla.cli.files import default_cache_dir
from jaxla.cli.terminal import plural
from jaxla.config import InputError, option
from jaxla.hardware import compute_dtype
from jaxla.models.backbones import VARIANTS, Backbone, build_backbone
from jaxla.models.weights_format import CONVERT_AGAIN, UNUSED_PREFIX, read_metadata, save_weights, suggest_conversion

M = TypeVar("M", bound=nnx.Module)


def parameter_shapes(network: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, buffer and statistic, under its name in a weights file."""
    return {name: tuple(value.shape) for name, value in _named_variables(nnx.state(network)).items()}


def load_backbone(path: str | Path, dtype: jnp.dtype | None = None) -> Backbone:
    """Load a backbone, in evaluation mode, from a converted file, which states its architecture.

    Args:
        dtype: dtype of the computation; the default is `compute_dtype()`. Parameters stay float32.

    Raises:
        InputError: the file is missing or truncated, or does not contain the parameters of its architecture.
    """
    path = Path(path)
    arch = read_metadata(path)["arch"]
    if arch not in VARIANTS:
        raise InputError(path, f"contains {arch!r}, which is not a backbone", "If it is a network, use load_network.")
    return load_parameters(_abstract_backbone(arch, dtype or compute_dtype()), path, arch)


def parameters_sha256(network: nnx.Module) -> str:
    """Return a hash of the names, shapes and values of all parameters, which does not depend on the file."""
    total = hashlib.sha256()
    for name, variable in sorted(_named_variables(nnx.state(network)).items()):
        value = np.ascontiguousarray(variable.get_value())
        total.update(f"{name} {value.shape} {value.dtype}".encode())
        total.update(value.data)
    return total.hexdigest()


def save_random(path: Path, backbone: Backbone, arch: str, seed: int) -> None:
    """Write a randomly initialised backbone; the file's metadata state the seed."""
    arrays = {name: np.asarray(value.get_value()) for name, value in _named_variables(nnx.state(backbone)).items()}
    save_weights(path, arrays, {"arch": arch, "source": f"random, seed {seed}", "source_sha256": "", "licence": ""})


def load_parameters(network: M, path: Path, arch: str) -> M:
    """Return `network`, which may be abstract (from `nnx.eval_shape`), with the parameters of a file."""
    require_parameters(path, arch, parameter_shapes(network))
    graph, state = nnx.split(network)
    for name, variable in _named_variables(state).items():
        # Opened for each array: the pages of an open file stay in memory once they are read.
        with safe_open(path, framework="numpy") as file:
            variable.set_value(jnp.asarray(file.get_tensor(name), jnp.float32))
    return nnx.merge(graph, state)


def require_parameters(path: Path, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise an InputError unless a file contains `arch` and exactly these float32 parameters; reads only its header."""
    found_arch = read_metadata(path)["arch"]
    if found_arch != arch:
        # A method can be built on another architecture of the same family.
        is_same_family = type(VARIANTS.get(found_arch)) is type(VARIANTS[arch])
        alternative = f"{option('model.arch', found_arch)} or " if is_same_family else ""
        raise InputError(path, f"contains {found_arch}, not {arch}", f"Use {alternative}a weights file of {arch}.")
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith(UNUSED_PREFIX)]  # noqa: SIM118  (not a dict)
        slices = {name: file.get_slice(name) for name in names}
        found = {name: (tuple(array.get_shape()), array.get_dtype()) for name, array in slices.items()}
    if missing := sorted(set(shapes) - set(found)):
        problem = f"lacks {plural(len(missing), 'parameter')} of {arch}, such as {missing[0]}"
        raise InputError(path, problem, CONVERT_AGAIN)
    if extra := sorted(set(found) - set(shapes)):
        problem = f"contains {plural(len(extra), 'parameter')} that {arch} lacks, such as {extra[0]}"
        raise InputError(path, problem, CONVERT_AGAIN)
    for name, expected_shape in shapes.items():
        shape, dtype = found[name]
        if shape != expected_shape:
            raise InputError(path, f"{name} has shape {shape}, but {arch} needs {expected_shape}", CONVERT_AGAIN)
        if dtype != "F32":
            raise InputError(path, f"{name} has dtype {dtype}, not F32", CONVERT_AGAIN)


def weights_file(arch: str, weights: str, cache_dir: Path | None = None) -> Path:
    """Return the file in the option `model.weights` ("": in the cache folder), after checking that it contains `arch`.

    Raises:
        InputError: the file is missing or does not fit; the message states the command that creates it.
    """
    path = Path(weights) if weights else (cache_dir or default_cache_dir()) / "weights" / f"{arch}.safetensors"
    if weights and path.suffix != ".safetensors":
        fix = f"Use the converted file of {arch}, or random, or remove the option to use the file in the cache folder."
        raise InputError(option("model.weights", weights), "not the name of a .safetensors file", fix)
    if not os.path.isfile(path):  # Path.is_file raises if a name is too long or a folder cannot be read
        released = suggest_conversion(arch, path) if VARIANTS[arch].licence else "No weights were released."
        file, random = (option("model.weights", value) for value in ("FILE", "random"))
        fix = f"{released} Or use {file}, or {random} for an untrained backbone."
        raise InputError(path, f"weights of {arch} not found", fix)
    require_parameters(path, arch, parameter_shapes(_abstract_backbone(arch)))
    return path


def _abstract_backbone(arch: str, dtype: jnp.dtype = jnp.float32) -> Backbone:
    return nnx.eval_shape(lambda: build_backbone(arch, dtype=dtype, rngs=nnx.Rngs(0)))


def _named_variables(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
