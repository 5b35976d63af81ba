"""All tokens and blocks of small random configurations of both families against the models of `transformers`.

The tests at the end show where `transformers` differs from the authors' code, which this package follows.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from jaxla.models.ops.positions import resize_grid, rotary_periods
from tests.golden.errors import beyond_bounds, live_errors
from tests.golden.live import authors_resize, live_model, live_tokens
from tests.tiny import REGISTERS, ROTARY, TINY, TINY_VARIANTS, tiny_backbone


def random_images(batch, height, width):
    return np.random.default_rng(height).standard_normal((batch, height, width, 3), dtype=np.float32)


IMAGES = random_images(3, 24, 40)  # one shape, so that each function compiles once


@pytest.mark.parametrize("variant", TINY_VARIANTS.values(), ids=TINY_VARIANTS)
def test_all_tokens_of_all_blocks_equal(variant):
    vit = tiny_backbone(variant=variant)
    # measured (max abs and relative L2): at most 2.6e-6 and 5.2e-7 after the final norm, 3.2e-6 and 4.3e-7 before the
    # norm, where values reach 10
    assert not beyond_bounds(live_errors(vit, IMAGES, *live_tokens(live_model(vit), IMAGES)))


@pytest.mark.parametrize("variant", [TINY, REGISTERS], ids=["plain", "registers"])
def test_all_tokens_equal_at_the_size_of_the_learned_grid(variant):
    vit, images = tiny_backbone(variant=variant), random_images(2, 32, 32)
    assert not beyond_bounds(live_errors(vit, images, *live_tokens(live_model(vit, authors_grid=False), images)))


# --- DINOv3 as it was released ---


def test_a_bias_with_a_mask_of_zeros_has_no_effect():
    vit = tiny_backbone(variant=ROTARY)
    biased = vit(IMAGES)
    mask = vit.blocks.attention.qkv_bias_mask
    mask.set_value(jnp.zeros_like(mask[...]))
    model = live_model(vit)
    assert not any(getattr(model.config, f"{name}_bias") for name in ("query", "key", "value"))
    assert not beyond_bounds(live_errors(vit, IMAGES, *live_tokens(model, IMAGES)))
    assert np.abs(biased.patches - vit(IMAGES).patches).max() > 0.1


def test_periods_come_from_the_checkpoint():
    """Released files contain periods rounded to bfloat16."""
    vit = tiny_backbone(variant=ROTARY)
    formula = rotary_periods(ROTARY.width // ROTARY.heads)
    vit.periods.set_value(formula)
    formula_tokens = vit(IMAGES)
    vit.periods.set_value(formula.astype(jnp.bfloat16).astype(jnp.float32))
    model = live_model(vit)
    np.testing.assert_allclose(1 / model.rope_embeddings.inv_freq, vit.periods[...], rtol=1e-6)
    assert not beyond_bounds(live_errors(vit, IMAGES, *live_tokens(model, IMAGES)))
    assert np.abs(formula_tokens.patches - vit(IMAGES).patches).max() > 1e-3


# --- where `transformers` and the authors' code differ ---


def test_transformers_resizes_the_grid_without_the_authors_offset():
    """`transformers` scales the grid by n / G, the authors' code by (n + 0.1) / G, so the tokens differ."""
    vit = tiny_backbone(variant=TINY)
    tokens, hidden = live_tokens(live_model(vit), IMAGES)
    other_tokens, _ = live_tokens(live_model(vit, authors_grid=False), IMAGES)
    assert np.abs(other_tokens - tokens).max() > 0.01  # measured: 0.05
    assert not beyond_bounds(live_errors(vit, IMAGES, tokens, hidden))


def test_transformers_resizes_the_grid_of_register_models_as_the_authors_do():
    vit = tiny_backbone(variant=REGISTERS)
    assert not beyond_bounds(live_errors(vit, IMAGES, *live_tokens(live_model(vit, authors_grid=False), IMAGES)))


@pytest.mark.parametrize("registers", [False, True])
def test_offset_and_antialiasing_change_the_grid(registers):
    """Resizing one kind of model like the other differs by far more than rounding."""
    grid = torch.randn(1, 8, 37, 37, generator=torch.Generator().manual_seed(0))
    expected, different = (
        authors_resize(grid, 32, 45, like_registers)[0].permute(1, 2, 0)
        for like_registers in (registers, not registers)
    )
    ours = resize_grid(jnp.asarray(grid[0].permute(1, 2, 0)), 32, 45, antialias=registers)
    np.testing.assert_allclose(ours, expected, atol=5e-6)  # measured: 3.4e-6, for values up to 4.3
    assert np.abs(ours - different.numpy()).max() > 0.1


def test_periods_equal_those_of_transformers():
    """`transformers` multiplies by the inverse periods, so the two differ by rounding."""
    model = DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=1, hidden_size=128, num_attention_heads=2))
    np.testing.assert_allclose(1 / model.rope_embeddings.inv_freq, rotary_periods(64), rtol=1e-6)
