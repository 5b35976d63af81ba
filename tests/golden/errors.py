"""Deviations of a backbone's tokens from the reference, and their bounds."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxla.models.backbones.vision_transformer import VisionTransformer
from tests.golden.checkpoints import FOLDER, golden_image


class Deviation(NamedTuple):
    """The difference between one array and the reference."""

    max_abs: float
    relative_l2: float


# For float32 tokens with a standard deviation near 1. PyTorch in float32 differs from float64 by up to 4e-6 (max abs)
# and 6e-7 (relative L2) at the sizes of the golden files, and by up to 5e-6 (max abs) at 448 pixels.
BOUND = Deviation(1e-5, 1.5e-6)
COSINE_BOUND = 0.999  # between a token in bfloat16 and in float32


def deviation(ours: jax.Array, theirs: np.ndarray) -> Deviation:
    difference = np.asarray(ours, np.float64) - theirs
    return Deviation(float(np.abs(difference).max()), float(np.linalg.norm(difference) / np.linalg.norm(theirs)))


def beyond_bounds(errors: Mapping[str, Deviation]) -> dict[str, Deviation]:
    return {name: e for name, e in errors.items() if not (e.max_abs <= BOUND[0] and e.relative_l2 <= BOUND[1])}


def golden_errors(vit: VisionTransformer, file: str) -> dict[str, Deviation]:
    """Return the deviation of each array from that in a golden file."""
    golden, image = np.load(FOLDER / f"{file}.npz"), golden_image(file)
    step, channels = int(golden["patch_step"]), vit.variant.width

    out = vit(image)
    patches = np.asarray(out.patches).reshape(-1, channels)
    ours = {
        "cls": out.cls[0],
        "registers": out.registers[0],
        "patches": patches[::step],
        "patches_mean": patches.mean(0),
        "patches_std": patches.std(0),
    }
    errors = {name: deviation(array, golden[name]) for name, array in ours.items() if golden[name].size}
    layers = tuple(int(i) for i in golden["layers"])
    for layer, tokens, expected in zip(layers, vit.intermediate(image, layers), golden["intermediate"], strict=True):
        errors[f"block {layer}"] = deviation(np.asarray(tokens).reshape(-1, channels)[::step], expected)
    return errors


def live_errors(
    vit: VisionTransformer, images: np.ndarray, tokens: np.ndarray, block_tokens: list[np.ndarray]
) -> dict[str, Deviation]:
    """Return the deviation of each kind of token, and of each block's tokens, from the reference.

    Args:
        tokens, block_tokens: the reference, as `tests.golden.live.live_tokens` computes it with `transformers`.
    """
    out, prefix = vit(images), 1 + vit.variant.registers

    def flatten(patches: jax.Array) -> np.ndarray:
        return np.asarray(patches).reshape(len(images), -1, vit.variant.width)

    errors = {"cls": deviation(out.cls, tokens[:, 0]), "patches": deviation(flatten(out.patches), tokens[:, prefix:])}
    if vit.variant.registers:
        errors["registers"] = deviation(out.registers, tokens[:, 1:prefix])
    blocks = range(vit.variant.depth)
    for block, ours, theirs in zip(blocks, vit.intermediate(images, blocks), block_tokens, strict=True):
        errors[f"block {block}"] = deviation(flatten(ours), theirs[:, prefix:])
    return errors


def lowest_bfloat16_cosine(vit: VisionTransformer, images: np.ndarray) -> float:
    """Return the lowest cosine between a token in bfloat16 and in float32, after the final norm."""
    abstract = nnx.eval_shape(lambda: VisionTransformer(vit.variant, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    half = nnx.merge(nnx.graphdef(abstract), nnx.state(vit))(images)
    assert half.cls.dtype == jnp.bfloat16
    lowest = 1.0
    for full_tokens, half_tokens in zip(vit(images), half, strict=True):
        a, b = np.asarray(full_tokens, np.float64), np.asarray(half_tokens, np.float64)
        cosines = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        lowest = min(lowest, float(cosines.min(initial=1)))
    return lowest
