"""The vision transformer: where its tokens stand, what it refuses, and the same numbers as `transformers`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.models.positions import position_grid
from tests.tiny import TINY, flat_arrays, tiny_backbone


def random_images(batch, height, width, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, height, width, 3), dtype=np.float32)


def image_with_one_patch(row, column, rows, columns):
    """Random pixels in one patch, the same wherever it lies; zero elsewhere."""
    image = np.zeros((1, 8 * rows, 8 * columns, 3), np.float32)
    image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = random_images(1, 8, 8)
    return image


# --- where tokens stand ---


def test_embedding_puts_a_patch_into_its_own_token_and_no_other():
    vit, (rows, columns) = tiny_backbone(), (3, 5)
    embed = jax.jit(vit.embed)
    empty = np.asarray(embed(np.zeros((1, 24, 40, 3), np.float32)))
    moved = []
    for row in range(rows):
        for column in range(columns):
            image = image_with_one_patch(row, column, rows, columns)
            tokens = embed(image)
            change = np.asarray(vit.to_map(tokens, (rows, columns)) - vit.to_map(empty, (rows, columns)))[0]
            assert np.argwhere(np.abs(change).max(-1) > 0).tolist() == [[row, column]]
            assert np.argwhere(np.abs(tokens - empty).max(-1) > 0).tolist() == [[0, 1 + row * columns + column]]
            moved.append(change[row, column])
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], (15, 32)), atol=2e-6)  # measured: 2.4e-7


def test_tokens_stay_in_place_through_the_whole_network():
    vit = tiny_backbone()
    for scale in (vit.blocks.scale1, vit.blocks.scale2):  # blocks that add nothing: a token sees its own patch only
        scale.gamma.set_value(jnp.zeros_like(scale.gamma[...]))
    empty = vit(np.zeros((1, 24, 40, 3), np.float32))
    for row, column in ((0, 0), (0, 4), (1, 2), (2, 0), (2, 4)):
        out = vit(image_with_one_patch(row, column, 3, 5))
        assert np.argwhere(np.abs(out.patches - empty.patches)[0].max(-1) > 0).tolist() == [[row, column]]
        np.testing.assert_array_equal(out.cls, empty.cls)


def test_embedding_is_the_strided_convolution_of_the_reference():
    vit, images = tiny_backbone(), random_images(2, 32, 32)
    kernel = np.asarray(vit.patch_embed.kernel).reshape(8, 8, 3, 32)  # rows, columns, channels in; out
    convolved = torch.nn.functional.conv2d(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
        torch.from_numpy(np.array(vit.patch_embed.bias)),
        stride=8,
    )
    expected = convolved.permute(0, 2, 3, 1).numpy() + np.asarray(vit.pos_grid)
    tokens = vit.embed(images)
    np.testing.assert_allclose(vit.to_map(tokens, (4, 4)), expected, atol=2e-6)  # measured: 0
    np.testing.assert_array_equal(tokens[:, 0], np.tile(vit.cls_token[...] + vit.pos_cls[...], (2, 1)))


# --- positions ---


@pytest.mark.parametrize(("h", "w"), [(7, 7), (32, 32), (16, 45), (45, 16), (37, 36), (38, 37), (1, 60), (74, 37)])
def test_positions_are_interpolated_as_the_reference_does(h, w):
    grid = np.random.default_rng(0).standard_normal((37, 37, 8), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None].permute(0, 3, 1, 2),
        mode="bicubic",
        antialias=False,
        scale_factor=(float(h + 0.1) / 37, float(w + 0.1) / 37),
    )
    expected = expected[0].permute(1, 2, 0).numpy()
    assert expected.shape == (h, w, 8)
    # measured: 1.5e-5 at 38×37, 3e-6 at most sizes; in float32 the reference itself is 1.1e-5 from its float64
    np.testing.assert_allclose(position_grid(jnp.asarray(grid), h, w), expected, atol=3e-5)


def test_positions_at_the_native_size_are_the_learned_ones():
    grid = jax.random.normal(jax.random.key(0), (37, 37, 8))
    np.testing.assert_array_equal(position_grid(grid, 37, 37), grid)


# --- what comes out ---


def test_outputs_have_the_promised_shapes():
    out = tiny_backbone()(random_images(2, 24, 40))
    assert (out.cls.shape, out.registers.shape, out.patches.shape) == ((2, 32), (2, 0, 32), (2, 3, 5, 32))
    assert {x.dtype for x in out} == {jnp.dtype("float32")}


def test_images_of_a_batch_do_not_see_each_other():
    vit, images = tiny_backbone(), random_images(2, 24, 40)
    together, alone = vit(images), [vit(images[i : i + 1]) for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(together.cls[i], alone[i].cls[0], atol=5e-6)  # measured: 0
        np.testing.assert_allclose(together.patches[i], alone[i].patches[0], atol=5e-6)  # measured: 0


def test_intermediate_tokens_are_those_of_a_network_cut_off_there():
    vit, images = tiny_backbone(), random_images(1, 24, 40)
    kept = vit.intermediate(images, blocks=(2, 0, 1))
    for tokens, depth in zip(kept, (3, 1, 2), strict=True):
        graph, state = nnx.split(tiny_backbone(variant=replace(TINY, depth=depth)))
        cut = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(vit))}
        for path, variable in nnx.to_flat_state(state):
            variable.set_value(cut[path][:depth] if path[0] == "blocks" else cut[path])
        short = nnx.merge(graph, state)
        tokens_of = jax.jit(lambda images, short=short: short.run_blocks(short.embed(images), (3, 5))[0])
        expected = short.to_map(tokens_of(images), (3, 5))
        assert tokens.shape == (1, 3, 5, 32)
        np.testing.assert_allclose(tokens, expected, atol=5e-6)  # measured: 0, of values up to 10


def test_last_intermediate_tokens_normed_are_the_patches():
    vit, images = tiny_backbone(), random_images(1, 24, 40)
    (normed,) = vit.intermediate(images, blocks=[2], norm=True)
    np.testing.assert_allclose(normed, vit(images).patches, atol=5e-6)  # measured: 0
    (plain,) = vit.intermediate(images, blocks=[2])
    assert np.abs(plain - normed).max() > 0.1


def test_scan_over_blocks_equals_a_loop():
    vit = tiny_backbone()
    tokens = vit.embed(random_images(2, 24, 40))
    scanned, _ = vit.run_blocks(tokens, (3, 5))
    graph, parameters = nnx.split(vit.blocks)
    for i in range(TINY.depth):
        block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], parameters))
        tokens = block(tokens, None)
    np.testing.assert_allclose(scanned, tokens, atol=1e-5)  # measured: 1.7e-6, of values up to 10


def test_rematerialised_blocks_have_the_same_gradient():
    images = random_images(1, 24, 40)
    gradients = []
    for remat in (False, True):
        graph, state = nnx.split(tiny_backbone(remat=remat))
        mean = lambda state, graph=graph: jnp.mean(nnx.merge(graph, state)(images).patches ** 3)  # noqa: E731
        gradients.append(jax.jit(jax.grad(mean))(state))
    plain, remade = (jax.tree.leaves(g) for g in gradients)
    assert max(np.abs(g).max() for g in plain) > 1e-3
    for a, b in zip(plain, remade, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # measured: 6e-8


def test_bfloat16_keeps_the_direction_of_every_token():
    images = random_images(2, 24, 40)
    full, half = tiny_backbone(), tiny_backbone(dtype=jnp.bfloat16)
    assert {str(x.dtype) for x in flat_arrays(half).values()} == {"float32"}
    a, b = full(images), half(images)
    assert b.patches.dtype == jnp.bfloat16
    for x, y in ((a.cls, b.cls), (a.patches, b.patches)):
        y = y.astype(jnp.float32)
        cosine = (x * y).sum(-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
        assert cosine.min() >= 0.999  # measured: 0.99996


# --- the same numbers as the port in `transformers` ---


BEFORE_VERSION_5 = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def transformers_model():
    """-> its model of our tiny variant with random parameters, and these under our names."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=8, image_size=32, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.ndim == 1 else 0.0  # scales away from 0 and 1, biases away from 0
            parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))

    theirs = {name: value.detach().numpy() for name, value in model.named_parameters()}
    position = theirs["embeddings.position_embeddings"][0]
    ours = {
        "cls_token": theirs["embeddings.cls_token"][0, 0],
        "pos_cls": position[0],
        "pos_grid": position[1:].reshape(4, 4, 32),
        "patch_embed.kernel": theirs["embeddings.patch_embeddings.projection.weight"]
        .transpose(2, 3, 1, 0)
        .reshape(-1, 32),
        "patch_embed.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.scale": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    of_block = {
        "norm1.scale": "norm1.weight",
        "norm1.bias": "norm1.bias",
        "attention.projection.kernel": "attention.o_proj.weight",
        "attention.projection.bias": "attention.o_proj.bias",
        "scale1.gamma": "layer_scale1.lambda1",
        "norm2.scale": "norm2.weight",
        "norm2.bias": "norm2.bias",
        "mlp.expand.kernel": "mlp.fc1.weight",
        "mlp.expand.bias": "mlp.fc1.bias",
        "mlp.contract.kernel": "mlp.fc2.weight",
        "mlp.contract.bias": "mlp.fc2.bias",
        "scale2.gamma": "layer_scale2.lambda1",
    }
    blocks = [{} for _ in range(3)]
    for name, value in theirs.items():
        if name.startswith("encoder.layer."):
            number, name = name.removeprefix("encoder.layer.").split(".", 1)
            for old, new in BEFORE_VERSION_5.items():
                name = name.replace(old, new)
            blocks[int(number)][name] = value.T
    for name, their_name in of_block.items():
        ours[f"blocks.{name}"] = np.stack([block[their_name] for block in blocks])
    for name, their_name in (("kernel", "weight"), ("bias", "bias")):
        parts = [[block[f"attention.{x}_proj.{their_name}"] for x in "qkv"] for block in blocks]
        ours[f"blocks.attention.qkv.{name}"] = np.stack([np.concatenate(qkv, axis=-1) for qkv in parts])
    return model, ours


def test_tokens_equal_those_of_transformers_at_the_native_size():
    model, parameters = transformers_model()
    vit = tiny_backbone()
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(vit))}
    assert variables.keys() == parameters.keys()
    for name, variable in variables.items():
        assert variable.shape == parameters[name].shape
        variable.set_value(parameters[name])

    images = random_images(2, 32, 32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
    out = vit(images)
    expected = theirs.last_hidden_state.numpy()
    np.testing.assert_allclose(out.cls, expected[:, 0], atol=1e-5)  # measured: 1.2e-6
    np.testing.assert_allclose(out.patches.reshape(2, 16, 32), expected[:, 1:], atol=1e-5)  # measured: 1.5e-6
    for tokens, hidden in zip(vit.intermediate(images, (0, 1, 2)), theirs.hidden_states[1:], strict=True):
        hidden = hidden.numpy()[:, 1:].reshape(2, 4, 4, 32)
        np.testing.assert_allclose(tokens, hidden, atol=3e-5)  # measured: 1.2e-5, of values up to 24


# --- what is refused ---


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 32, 32), ["(1, 3, 32, 32)", "[B, H, W, 3]", "channels come last"]),
        ((1, 32, 32, 1), ["(1, 32, 32, 1)", "[B, H, W, 3]"]),
        ((32, 32, 3), ["(32, 32, 3)", "[B, H, W, 3]"]),
        ((1, 32, 33, 3), ["32×33", "multiples of 8"]),
        ((1, 20, 32, 3), ["20×32", "multiples of 8"]),
    ],
)
def test_images_of_a_wrong_shape_are_refused(shape, words):
    vit = tiny_backbone()
    for call in (vit, lambda images: vit.intermediate(images, blocks=(0,))):
        with pytest.raises(ValueError, match="images of") as error:
            call(np.zeros(shape, np.float32))
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("blocks", [(3,), (0, -1)])
def test_blocks_that_do_not_exist_are_refused(blocks):
    with pytest.raises(ValueError, match="has blocks 0 to 2"):
        tiny_backbone().intermediate(random_images(1, 32, 32), blocks)
