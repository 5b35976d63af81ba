"""The checkpoints behind the golden files, under their authors' names, and their conversion."""

import contextlib
import io
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights.__main__ import main as run_conversion
from convert_weights.accounting import identify_tensors
from convert_weights.architectures import released_architecture
from convert_weights.checkpoint import Checkpoint
from convert_weights.layout import to_ours
from convert_weights.tensors import Tensor
from jaxla import load_backbone
from jaxla.models.backbones import build_backbone
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.backbones.vision_transformer import VisionTransformer
from jaxla.models.weights_format import UNUSED_PREFIX
from tests.golden.fake_weights import fake_image, fake_parameter

FOLDER = Path(__file__).parent
_AUTHORS_SPELLING = {ours: authors for authors, ours in HUB_SPELLINGS.items()}


def golden_files(arch: str) -> list[str]:
    """Return the names of an architecture's golden files; `arch` has this package's spelling."""
    found = FOLDER.glob(f"{_AUTHORS_SPELLING.get(arch, arch)}_[0-9]*.npz")
    return sorted((path.stem for path in found), key=lambda file: golden_image(file).size)


def golden_image(file: str) -> np.ndarray:
    """Return the image [1, H, W, 3] of a golden file."""
    height, width = map(int, file.rsplit("_", 1)[1].split("x"))
    return fake_image(height, width).transpose(0, 2, 3, 1)


def reference_shapes(arch: str) -> dict[str, list[int]]:
    """Return name -> shape of every parameter in the authors' checkpoint of an architecture."""
    arch = _AUTHORS_SPELLING.get(arch, arch)
    registers = {}
    if arch in ("dinov2_vitl14_reg", "dinov2_vitg14_reg"):  # no golden file; one more parameter than without registers
        arch = arch.removesuffix("_reg")
        registers = {"register_tokens": [1, 4, 1024 if "vitl" in arch else 1536]}
    return json.loads((FOLDER / f"{arch}.shapes.json").read_text()) | registers


def checkpoint_parameter(name: str, shape: list[int]) -> np.ndarray:
    """Return one parameter of the fake checkpoint that the golden files were computed with."""
    if name == "rope_embed.periods":
        return (100.0 ** (np.arange(shape[0]) / shape[0])).astype(np.float32)
    return fake_parameter(name, tuple(shape))


def write_checkpoint(path: Path, arch: str) -> None:
    """Write the fake checkpoint as safetensors, one parameter at a time, because ViT-g's has 4.5 GB."""
    shapes = reference_shapes(arch)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(np.ascontiguousarray(checkpoint_parameter(name, shape)).data)


def convert(arch: str, source: Path, output: Path) -> None:
    """Run the conversion command in this process, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        run_conversion([f"--arch={arch}", f"--source={source}", f"--output={output}"])


def golden_backbone(arch: str) -> VisionTransformer:
    """Return a float32 backbone with the fake checkpoint's parameters, converted by the command; no file remains."""
    with tempfile.TemporaryDirectory(prefix="jaxla_") as folder:
        source, output = (Path(folder) / f"{name}.safetensors" for name in ("source", "converted"))
        write_checkpoint(source, arch)
        convert(arch, source, output)
        return load_backbone(output, jnp.float32)


def golden_backbone_in_memory(arch: str) -> VisionTransformer:
    """Return the same backbone as `golden_backbone`, converted in memory, without files of up to 4.5 GB."""
    tensors = {
        name: Tensor(tuple(shape), "float32", partial(checkpoint_parameter, name, shape))
        for name, shape in reference_shapes(arch).items()
    }
    architecture = released_architecture(arch)
    tensors, _ = identify_tensors(Checkpoint(Path(arch), (), tensors), architecture)
    arrays = to_ours(architecture.rows, tensors, architecture.shapes)
    arrays = {name: array for name, array in arrays.items() if not name.startswith(UNUSED_PREFIX)}

    graph, state = nnx.split(nnx.eval_shape(lambda: build_backbone(arch, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        shape, dtype, chunks = arrays.pop(".".join(map(str, path)))
        values, end = np.empty(math.prod(shape), dtype), 0
        for chunk in chunks():
            values[end : end + chunk.size] = chunk.ravel()
            end += chunk.size
        variable.set_value(jnp.asarray(values.reshape(shape)))
    assert not arrays
    return nnx.merge(graph, state)
