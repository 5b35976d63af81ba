"""Where a patch lies: DINOv2's learned grid of positions, DINOv3's rotary embedding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

DINOV2_OFFSET = 0.1  # DINOv2 resizes its grid by (n + 0.1) / G, and so must whoever uses its weights


def position_grid(grid: jax.Array, h: int, w: int, *, antialias: bool = False) -> jax.Array:
    """The learned position grid [G, G, C] at h × w patches, [h, w, C], as the reference code interpolates it.

    Bicubic. The models without registers: PyTorch's kernel, not antialiased, scaled by (n + 0.1) / G rather than n / G.
    Those with registers: antialiased (whose kernel is another one in PyTorch), scaled by n / G.
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
    """By what angle each pair of a head's channels is turned at each token; class token and registers stay."""

    sine: jax.Array  # [N, D]
    cosine: jax.Array  # [N, D]

    def rows(self, x: jax.Array) -> jax.Array:
        """Turn [B, N, heads, D]: channel i < D/2 pairs with i + D/2. In float32, back in the dtype of `x`."""
        return _turn(x, self.sine[:, None], self.cosine[:, None], channels=-1)

    def columns(self, x: jax.Array) -> jax.Array:
        """The same of [B, heads, D, N]."""
        return _turn(x, self.sine.T, self.cosine.T, channels=-2)


def _turn(x: jax.Array, sine: jax.Array, cosine: jax.Array, channels: int) -> jax.Array:
    first, second = jnp.split(x.astype(sine.dtype), 2, axis=channels)
    turned = jnp.concatenate([-second, first], axis=channels)
    return (x * cosine + turned * sine).astype(x.dtype)


def rotary_periods(head_width: int, base: float = 100.0) -> jax.Array:
    """Periods [D/4] of the rotary embedding in units of half the image: base^(2k / (D/2))."""
    quarter = head_width // 4
    return base ** (2 * jnp.arange(quarter, dtype=jnp.float32) / (2 * quarter))


def rotation(periods: jax.Array, h: int, w: int, prefix: int) -> Rotation:
    """The rotation of h × w patches that follow `prefix` tokens without a place.

    Rows and columns each run from -1 to 1 over the centres of the patches, whatever the image's aspect.
    """
    rows, columns = (2 * ((jnp.arange(n, dtype=jnp.float32) + 0.5) / n) - 1 for n in (h, w))
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(h * w, 2, 1)
    angles = jnp.tile((2 * jnp.pi * places / periods).reshape(h * w, -1), 2)
    angles = jnp.pad(angles, ((prefix, 0), (0, 0)))
    return Rotation(jnp.sin(angles), jnp.cos(angles))
