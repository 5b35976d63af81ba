"""The vision transformer of both families: positions of tokens, outputs, memory, bad input."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxla.models.backbones.vision_transformer import VisionTransformer, _features, _intermediate
from tests.tiny import REGISTERS, ROTARY, TINY, TINY_VARIANTS, flat_arrays, tiny_backbone

# Tests with the same variant and image shape share its compiled functions. The values of all variants are compared in
# tests/parity/test_transformers.py.
plain_and_rotary = pytest.mark.parametrize("variant", [TINY, ROTARY], ids=["plain", "rotary"])


def random_images(batch, height, width, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, height, width, 3), dtype=np.float32)


def image_with_one_patch(row, column, rows, columns):
    """Return an image with the same random pixels in the given patch, and zeros elsewhere."""
    image = np.zeros((1, 8 * rows, 8 * columns, 3), np.float32)
    image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = random_images(1, 8, 8)
    return image


# --- positions of tokens ---


@pytest.mark.parametrize("variant", [TINY, REGISTERS, ROTARY], ids=["plain", "registers", "rotary"])
def test_embedding_changes_only_the_token_of_a_changed_patch(variant):
    vit, (rows, columns) = tiny_backbone(variant=variant), (3, 5)
    prefix = 1 + variant.registers
    embed = jax.jit(vit.embed)
    empty = np.asarray(embed(np.zeros((1, 24, 40, 3), np.float32)))
    moved = []
    for row in range(rows):
        for column in range(columns):
            image = image_with_one_patch(row, column, rows, columns)
            tokens = embed(image)
            change = np.asarray(vit.to_map(tokens, (rows, columns)) - vit.to_map(empty, (rows, columns)))[0]
            assert np.argwhere(np.abs(change).max(-1) > 0).tolist() == [[row, column]]
            assert np.argwhere(np.abs(tokens - empty).max(-1) > 0).tolist() == [[0, prefix + row * columns + column]]
            moved.append(change[row, column])
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], (15, 32)), atol=2e-6)  # measured: 2.4e-7


@pytest.mark.parametrize("variant", [TINY, REGISTERS, ROTARY], ids=["plain", "registers", "rotary"])
def test_tokens_keep_their_position_through_all_blocks(variant):
    vit = tiny_backbone(variant=variant)
    for scale in (vit.blocks.scale1, vit.blocks.scale2):  # blocks add nothing, so a token depends on its own patch only
        scale.gamma.set_value(jnp.zeros_like(scale.gamma[...]))
    empty = vit(np.zeros((2, 24, 40, 3), np.float32))
    for positions in (((0, 0), (0, 4)), ((1, 2), (2, 0)), ((2, 4), (1, 0))):
        out = vit(np.concatenate([image_with_one_patch(row, column, 3, 5) for row, column in positions]))
        changed = np.argwhere(np.abs(out.patches - empty.patches).max(-1) > 0)
        assert changed.tolist() == [[image, row, column] for image, (row, column) in enumerate(positions)]
        np.testing.assert_array_equal(out.cls, empty.cls)
        np.testing.assert_array_equal(out.registers, empty.registers)


def test_embedding_equals_the_references_strided_convolution():
    vit, images = tiny_backbone(), random_images(2, 32, 32)
    kernel = np.asarray(vit.patch_embed.kernel).reshape(8, 8, 3, 32)  # rows, columns, channels in; out
    convolved = torch.nn.functional.conv2d(
        torch.from_numpy(images.transpose(0, 3, 1, 2)),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
        torch.from_numpy(np.array(vit.patch_embed.bias)),
        stride=8,
    )
    expected = convolved.permute(0, 2, 3, 1).numpy() + np.asarray(vit.pos_grid)
    tokens = jax.jit(vit.embed)(images)
    np.testing.assert_allclose(vit.to_map(tokens, (4, 4)), expected, atol=2e-6)  # measured: 0
    np.testing.assert_array_equal(tokens[:, 0], np.tile(vit.cls_token[...] + vit.pos_cls[...], (2, 1)))


@pytest.mark.parametrize("variant", [REGISTERS, ROTARY], ids=["registers", "rotary"])
def test_registers_follow_the_class_token_and_have_no_position(variant):
    vit = tiny_backbone(variant=variant)
    tokens = jax.jit(vit.embed)(random_images(2, 24, 40))
    assert tokens.shape == (2, 1 + variant.registers + 15, 32)
    for registers in tokens[:, 1 : 1 + variant.registers]:
        np.testing.assert_array_equal(registers, vit.register_tokens[...])


def test_rotary_positions_change_the_tokens():
    """Swapping two patches changes their tokens, not only their order."""
    vit, image = tiny_backbone(variant=ROTARY), random_images(1, 8, 16)
    swapped = np.concatenate([image[:, :, 8:], image[:, :, :8]], axis=2)
    patches, swapped_patches = vit(image).patches[0, 0], vit(swapped).patches[0, 0]
    embed = jax.jit(vit.embed)
    np.testing.assert_array_equal(*(embed(x)[0, 1 + ROTARY.registers :].sum(0) for x in (image, swapped)))
    assert np.abs(patches - swapped_patches[::-1]).max() > 0.01


# --- outputs ---


def test_images_of_a_batch_are_independent():
    vit, images = tiny_backbone(variant=ROTARY), random_images(2, 24, 40)
    group_commands, alone = vit(images), [vit(images[i : i + 1]) for i in range(2)]
    for i in range(2):
        np.testing.assert_allclose(group_commands.cls[i], alone[i].cls[0], atol=5e-6)  # measured: 0
        np.testing.assert_allclose(group_commands.patches[i], alone[i].patches[0], atol=5e-6)  # measured: 0


def test_intermediate_tokens_equal_those_of_a_shorter_network():
    vit, images = tiny_backbone(variant=ROTARY), random_images(2, 24, 40)
    kept = vit.intermediate(images, blocks=(2, 0, 1))
    for tokens, depth in zip(kept, (3, 1, 2), strict=True):
        graph, state = nnx.split(tiny_backbone(variant=replace(ROTARY, depth=depth)))
        cut = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(vit))}
        for path, variable in nnx.to_flat_state(state):
            variable.set_value(cut[path][:depth] if path[0] == "blocks" else cut[path])
        short = nnx.merge(graph, state)
        run_short = jax.jit(lambda images, short=short: short.run_blocks(short.embed(images), (3, 5))[0])
        expected = short.to_map(run_short(images), (3, 5))
        assert tokens.shape == (2, 3, 5, 32)
        np.testing.assert_allclose(tokens, expected, atol=5e-6)  # measured: 0, for values up to 10


def test_intermediate_tokens_follow_the_order_of_blocks_with_repeats():
    vit, images = tiny_backbone(), random_images(2, 24, 40)
    first, last = vit.intermediate(images, blocks=(0, 2))
    assert np.abs(first - last).max() > 0.1
    for tokens, expected in zip(vit.intermediate(images, blocks=[2, 0, 2]), (last, first, last), strict=True):
        np.testing.assert_array_equal(tokens, expected)
    assert len(vit.intermediate(images, blocks=reversed(range(3)))) == 3
    assert vit.intermediate(images, blocks=()) == ()


def test_memory_of_intermediate_tokens_grows_with_their_number_not_with_the_depth():
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    token_bytes = (1 + 32 * 32) * 32 * 4  # tokens of one image after one block

    def temporary_memory(depth, blocks):
        """Return the temporary memory of the compiled call, in units of one block's tokens."""
        vit = nnx.eval_shape(lambda: VisionTransformer(replace(TINY, depth=depth), rngs=nnx.Rngs(0)))
        compiled = _intermediate.lower(*nnx.split(vit), images, blocks, False).compile()
        return compiled.memory_analysis().temp_size_in_bytes / token_bytes

    four = temporary_memory(40, (9, 19, 29, 39))
    # measured differences: 0, 4.0 and 36.0
    assert abs(four - temporary_memory(20, (4, 9, 14, 19))) < 0.5
    assert temporary_memory(40, tuple(range(4, 40, 5))) - four < 5
    assert temporary_memory(40, tuple(range(40))) - four > 30


@plain_and_rotary
def test_program_does_not_grow_with_the_depth(variant):
    def lines(depth):
        vit = nnx.eval_shape(lambda: VisionTransformer(replace(variant, depth=depth), rngs=nnx.Rngs(0)))
        program = _features.lower(*nnx.split(vit), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
        return len(program.as_text().splitlines())

    assert lines(40) == lines(2)


@plain_and_rotary
def test_last_intermediate_tokens_after_the_norm_are_the_patches(variant):
    vit, images = tiny_backbone(variant=variant), random_images(2, 24, 40)
    (normed,) = vit.intermediate(images, blocks=[2], norm=True)
    np.testing.assert_allclose(normed, vit(images).patches, atol=5e-6)  # measured: 0
    (plain,) = vit.intermediate(images, blocks=[2])
    assert np.abs(plain - normed).max() > 0.1


def test_remat_gives_the_same_gradient():
    images = random_images(2, 24, 40)
    gradients = []
    for remat in (False, True):
        graph, state, constants = nnx.split(
            tiny_backbone(variant=TINY_VARIANTS["dinov3 plus"], remat=remat), nnx.Param, ...
        )

        def mean(state, graph=graph, constants=constants):
            return jnp.mean(nnx.merge(graph, state, constants)(images).patches ** 3)

        gradients.append(jax.jit(jax.grad(mean))(state))
    plain, recomputed = (jax.tree.leaves(g) for g in gradients)
    assert max(np.abs(g).max() for g in plain) > 1e-3
    for gradient, again in zip(plain, recomputed, strict=True):
        np.testing.assert_allclose(gradient, again, atol=1e-6)  # measured: 6e-8


def test_bfloat16_keeps_the_direction_of_every_token():
    variant, images = TINY_VARIANTS["dinov3 plus"], random_images(2, 24, 40)
    full, half = (tiny_backbone(variant=variant, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert {str(x.dtype) for x in flat_arrays(half, nnx.Variable).values()} == {"float32"}
    a, b = full(images), half(images)
    assert {x.dtype for x in b} == {jnp.dtype("bfloat16")}
    for x, y in zip(a, b, strict=True):
        y = y.astype(jnp.float32)
        cosine = (x * y).sum(-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
        assert cosine.min(initial=1) >= 0.999  # measured: 0.99996


# --- bad input ---


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 32, 32), ["(1, 3, 32, 32)", "[B, H, W, 3]", "channels must come last"]),
        ((1, 32, 32, 1), ["(1, 32, 32, 1)", "[B, H, W, 3]"]),
        ((32, 32, 3), ["(32, 32, 3)", "[B, H, W, 3]"]),
        ((1, 32, 33, 3), ["32×33", "multiples of 8, such as 32×32"]),
        ((1, 21, 32, 3), ["21×32", "multiples of 8, such as 24×32"]),
        ((1, 3, 32, 3), ["3×32", "multiples of 8, such as 8×32"]),
        ((1, 0, 32, 3), ["(1, 0, 32, 3)", "no pixel"]),
        ((0, 32, 32, 3), ["(0, 32, 32, 3)", "no pixel"]),
    ],
)
def test_images_with_a_wrong_shape_are_refused(shape, words):
    vit = tiny_backbone()
    for call in (vit, lambda images: vit.intermediate(images, blocks=(0,))):
        with pytest.raises(ValueError, match="images of") as error:
            call(np.zeros(shape, np.float32))
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("images", "kind"), [(torch.zeros(1, 32, 32, 3), "Tensor"), ([[[[0.0] * 3]]], "list")], ids=["torch", "list"]
)
def test_types_other_than_arrays_are_refused(images, kind):
    with pytest.raises(ValueError, match=rf"^images of type {kind}: expected a NumPy or JAX array \[B, H, W, 3\]$"):
        tiny_backbone()(images)


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="images of uint8: expected floating point, normalised"):
        tiny_backbone()(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("blocks", [(3,), (0, -1)])
def test_missing_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="has blocks 0 to 2"):
        tiny_backbone().intermediate(random_images(1, 32, 32), blocks)
