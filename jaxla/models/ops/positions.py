"""Positions of patches: DINOv2's learned grid and DINOv3's rotary embedding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

DINOV2_OFFSET = 0.1  # DINOv2's code scales its position grid by (n + 0.1) / G


def resize_grid(grid: jax.Array, h: int, w: int, *, antialias: bool = False) -> jax.Array:
    """Resize the learned position grid [G, G, C] to [h, w, C], bicubically, as the reference code does.

    Args:
        antialias: False for models without registers: PyTorch's bicubic kernel, scaled by (n + 0.1) / G. True for
            models with registers: PyTorch's antialiased kernel, which differs, scaled by n / G.
    """
    side = grid.shape[0]
    if (h, w) == (side, side):
        return grid
    method, offset = ("bicubic", 0.0) if antialias else ("bicubic-pytorch", DINOV2_OFFSET)
    scale = jnp.array([(n + offset) / side for n in (h, w)])
    return jax.image.scale_and_translate(
        grid, (h, w, grid.shape[-1]), (0, 1), scale, jnp.zeros(2), method=method, antialias=antialias,
        precision="highest",
    )  # fmt: skip


class Rotation(NamedTuple):
    """Sine and cosine of the rotation angle of each pair of a head's channels; 0 for class token and registers."""

    sine: jax.Array  # [N, D]
    cosine: jax.Array  # [N, D]

    def rotate(self, x: jax.Array) -> jax.Array:
        """Rotate queries or keys [B, N, heads, D], in float32; channel i < D/2 is paired with i + D/2."""
        first, second = jnp.split(x.astype(self.sine.dtype), 2, axis=-1)
        orthogonal = jnp.concatenate([-second, first], axis=-1)
        return (x * self.cosine[:, None] + orthogonal * self.sine[:, None]).astype(x.dtype)


def rotary_periods(head_width: int) -> jax.Array:
    """Return the periods [D/4] of the rotary embedding, 100^(2k / (D/2)), in units of half the image."""
    quarter = head_width // 4
    return 100.0 ** (2 * jnp.arange(quarter, dtype=jnp.float32) / (2 * quarter))


def rotary_rotation(periods: jax.Array, h: int, w: int, prefix: int) -> Rotation:
    """Return the rotation of h × w patches after `prefix` tokens without a position.

    The centres of the patches have coordinates between -1 and 1 along rows and along columns, for any aspect ratio.
    """
    rows, columns = (2 * ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n) - 1 for n in (h, w))
    centres = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(h * w, 2, 1)
    angles = jnp.tile((2 * jnp.pi * centres / periods).reshape(h * w, -1), 2)
    angles = jnp.pad(angles, ((prefix, 0), (0, 0)))
    return Rotation(jnp.sin(angles), jnp.cos(angles))
