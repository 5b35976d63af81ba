"""Transformers and a plan that are small enough for fast tests, and random parameters."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxla.models.backbones.vision_transformer import Variant, VisionTransformer
from jaxla.models.ops.positions import rotary_periods
from jaxla.nnunet.plan import Fingerprint
from jaxla.nnunet.planner import make_plan

TINY = Variant(width=32, depth=3, heads=2, hidden=128, patch=8, grid=4)
REGISTERS = replace(TINY, registers=3, antialias=True)
ROTARY = replace(TINY, grid=0, registers=4, qkv_bias="masked", epsilon=1e-5)
TINY_VARIANTS = {
    "dinov2": TINY,
    "dinov2 with registers": REGISTERS,
    "dinov2 g": replace(TINY, mlp="swiglu", hidden=88),
    "dinov2 g with registers": replace(REGISTERS, mlp="swiglu", hidden=88),
    "dinov3": ROTARY,
    "dinov3 plus": replace(ROTARY, mlp="swiglu"),
    "dinov3 7B": replace(ROTARY, mlp="swiglu", qkv_bias="none"),
}


TINY_PLAN = make_plan(Fingerprint(((2.0, 1.0, 1.0),) * 4, ((10, 20, 18),) * 4), class_count=3)


def tiny_backbone(seed=0, variant=TINY, **options):
    return randomise(nnx.eval_shape(lambda: VisionTransformer(variant, rngs=nnx.Rngs(0), **options)), seed)


def randomise(module, seed=0):
    """Draw every parameter and statistic. No scale is 1 and no bias 0, so leaving one out changes the result.

    `module` may be abstract, from `nnx.eval_shape`.
    """
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        draw = rng.standard_normal(variable.shape, dtype=np.float32)
        match path[-1]:
            case "kernel":
                draw /= np.sqrt(np.prod(variable.shape[-2:-1] if path[0] == "blocks" else variable.shape[:-1]))
            case "scale" | "gamma":
                draw = 1 + 0.2 * draw
            case "var":
                draw = 0.5 + np.abs(draw)
            case "periods":  # near the formula, but different: the network must use the values of the weights
                draw = rotary_periods(4 * draw.size) * (1 + 0.1 * draw)
            case "qkv_bias_mask":
                draw = np.broadcast_to(np.repeat([1.0, 0.0, 1.0], draw.shape[-1] // 3), draw.shape)
            case _:
                draw *= 0.3
        variable.set_value(jnp.asarray(draw, jnp.float32))
    return module


def flat_arrays(module, kind=nnx.Param):
    """Return name -> array of every variable of a kind."""
    state = nnx.to_flat_state(nnx.state(module, kind))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in state}


def flat_state(state):
    """Return name -> array of a state."""
    return {".".join(map(str, path)): np.asarray(variable) for path, variable in nnx.to_flat_state(state)}
