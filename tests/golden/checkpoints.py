"""The checkpoints behind the golden files, written under their authors' names and converted by the command."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxla import load_backbone
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.backbones.vision_transformer import VisionTransformer
from tests.golden.fake_weights import fake_image, fake_parameter

FOLDER = Path(__file__).parent
_AUTHORS_SPELLING = {ours: authors for authors, ours in HUB_SPELLINGS.items()}


def files_of(arch: str) -> list[str]:
    """Return the names of an architecture's golden files; `arch` has this package's spelling."""
    found = FOLDER.glob(f"{_AUTHORS_SPELLING.get(arch, arch)}_[0-9]*.npz")
    return sorted((path.stem for path in found), key=lambda file: image_of(file).size)


def image_of(file: str) -> np.ndarray:
    """Return the image [1, H, W, 3] of a golden file."""
    height, width = map(int, file.rsplit("_", 1)[1].split("x"))
    return fake_image(height, width).transpose(0, 2, 3, 1)


def reference_shapes(arch: str) -> dict[str, list[int]]:
    """Return name -> shape of every parameter in the authors' checkpoint of an architecture."""
    arch = _AUTHORS_SPELLING.get(arch, arch)
    registers = {}
    if arch in ("dinov2_vitl14_reg", "dinov2_vitg14_reg"):  # without a golden file, and with one more parameter
        arch = arch.removesuffix("_reg")
        registers = {"register_tokens": [1, 4, 1024 if "vitl" in arch else 1536]}
    return json.loads((FOLDER / f"{arch}.shapes.json").read_text()) | registers


def checkpoint_parameter(name: str, shape: list[int]) -> np.ndarray:
    """Return one parameter of the fake checkpoint that the golden files were computed with."""
    if name == "rope_embed.periods":
        return (100.0 ** (np.arange(shape[0]) / shape[0])).astype(np.float32)
    return fake_parameter(name, tuple(shape))


def write_checkpoint(path: Path, arch: str) -> None:
    """Write the fake checkpoint as safetensors, one parameter at a time, since that of ViT-g is 4.5 GB."""
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


def converted(arch: str, folder: Path) -> Path:
    """Convert the fake checkpoint by `python -m convert_weights`, delete it, and return the converted file."""
    source, output = folder / f"{arch}_source.safetensors", folder / f"{arch}.safetensors"
    write_checkpoint(source, arch)
    convert(arch, source, output)
    source.unlink()
    return output


def convert(arch: str, source: Path, output: Path) -> None:
    command = [sys.executable, "-m", "convert_weights", f"--arch={arch}", f"--source={source}", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not output.exists():
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def golden_backbone(arch: str) -> VisionTransformer:
    """Return a float32 backbone with the fake checkpoint's parameters; no file remains."""
    with tempfile.TemporaryDirectory(prefix="jaxla_") as folder:
        return load_backbone(converted(arch, Path(folder)), jnp.float32)
