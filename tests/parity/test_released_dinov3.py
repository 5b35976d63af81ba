"""A checkpoint with the peculiarities of DINOv3's released files, converted, against live PyTorch.

Those files contain a bias of queries, keys and values with a mask of zeros, and constants rounded to bfloat16.
"""

import jax.numpy as jnp
import numpy as np
import torch

from jaxla import load_backbone
from jaxla.models.ops.positions import rotary_periods
from tests.golden.checkpoints import checkpoint_parameter, convert, reference_shapes
from tests.golden.errors import beyond_bounds, live_errors
from tests.golden.fake_weights import fake_image
from tests.golden.live import live_model, live_tokens


def test_tokens_of_a_checkpoint_like_the_released_ones_equal_live_pytorch(tmp_path):
    source, output = tmp_path / "released.pth", tmp_path / "converted.safetensors"
    state = {
        name: torch.from_numpy(checkpoint_parameter(name, shape))
        for name, shape in reference_shapes("dinov3_vits16").items()
    }
    for name, tensor in state.items():
        if name.endswith("bias_mask"):
            state[name] = torch.zeros_like(tensor, dtype=torch.bfloat16)
    state["rope_embed.periods"] = state["rope_embed.periods"].to(torch.bfloat16)
    torch.save(state, source)
    convert("dinov3_vits16", source, output)
    vit = load_backbone(output, jnp.float32)
    for file in (source, output):  # pytest would keep these large files for three sessions
        file.unlink()

    assert np.asarray(vit.blocks.attention.qkv_bias[...]).any()
    np.testing.assert_array_equal(vit.periods[...], state["rope_embed.periods"].float())
    assert np.abs(vit.periods[...] - rotary_periods(64)).max() > 0.01

    model, images = live_model(vit), fake_image(96, 128, batch=2).transpose(0, 2, 3, 1)
    assert not any(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in model.state_dict())
    assert not beyond_bounds(live_errors(vit, images, *live_tokens(model, images)))
