"""A conversion and its reverse give the authors' state dict, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flax import nnx

from convert_weights.checkpoint import Tensor
from convert_weights.layout import to_ours, to_theirs
from convert_weights.resnet import resnet_rows
from convert_weights.vgg import vgg_rows
from convert_weights.vision_transformer import dinov2_rows, dinov3_rows
from jaxla import InputError, load_backbone
from jaxla.models.backbones import dinov2, dinov3, resnet, vgg
from jaxla.models.backbones.vision_transformer import VisionTransformer
from jaxla.models.weights import parameter_shapes
from tests.convert_weights.command import assert_same_state, full_state, read_weights, refuse, succeed, write_converted


def convert_and_back(folder, state, arch):
    """Return our arrays, our metadata, and the state dict of the reverse conversion."""
    source, ours, back = folder / "source.pth", folder / "ours.safetensors", folder / "back.pth"
    torch.save(state, source)
    succeed(f"--arch={arch}", f"--source={source}", f"--output={ours}")
    printed = succeed("--to-torch", f"--source={ours}", f"--output={back}")
    assert printed.splitlines()[-1] == f"{back}: {arch} from {ours}, {len(state)} tensors of the authors' state dict"
    return *read_weights(ours), torch.load(back, weights_only=True)


def test_dinov2_with_registers_survives_a_round_trip_bit_for_bit(tmp_path):
    state = full_state("dinov2_vits14_reg")
    arrays, _, back = convert_and_back(tmp_path, state, "dinov2_vits14_reg")
    assert_same_state(back, state)
    np.testing.assert_array_equal(arrays["register_tokens"], state["register_tokens"][0])


def test_dinov3_with_bfloat16_constants_and_an_unusual_mask_survives_a_round_trip_bit_for_bit(tmp_path):
    state = full_state("dinov3_vits16plus")
    state["rope_embed.periods"] = torch.tensor([1.3359375 ** (k / 2) for k in range(16)]).bfloat16()
    mask = "blocks.4.attn.qkv.bias_mask"
    state[mask] = torch.arange(3 * 384).remainder(2).bfloat16()
    del state["mask_token"]
    arrays, metadata, back = convert_and_back(tmp_path, state, "dinov3_vits_plus16")
    assert_same_state(back, state)
    assert metadata["bfloat16"] == f"rope_embed.periods {mask}"
    np.testing.assert_array_equal(arrays["periods"], state["rope_embed.periods"].float())
    np.testing.assert_array_equal(arrays["blocks.attention.qkv_bias_mask"][4, :4], [0, 1, 0, 1])
    np.testing.assert_array_equal(arrays["blocks.attention.qkv_bias"][4], state["blocks.4.attn.qkv.bias"])
    kernel = arrays["blocks.mlp.expand.kernel"][5]  # the gate, then the gated branch
    np.testing.assert_array_equal(kernel[:, :1536], state["blocks.5.mlp.w1.weight"].T)
    np.testing.assert_array_equal(kernel[:, 1536:], state["blocks.5.mlp.w2.weight"].T)


# --- every kind of layer, in networks with a few thousand parameters ---

SMALL = {"width": 16, "depth": 3, "heads": 2, "hidden": 20, "patch": 2}


def small_architecture(arch):
    """Return the rows of a smaller variant, and the shapes of its parameters."""
    if arch.startswith("resnet"):
        variant = replace(resnet.VARIANTS[arch], blocks=(2, 3, 2, 2))
        return resnet_rows(variant), abstract_shapes(resnet.ResNet, variant)
    if arch.startswith("vgg"):
        variant = replace(vgg.VARIANTS[arch], stages=((2, 3), (4,)))
        return vgg_rows(variant), abstract_shapes(vgg.VGG, variant)
    if arch.startswith("dinov2"):
        variant = replace(dinov2.VARIANTS[arch], **SMALL, grid=3)
        return dinov2_rows(variant), abstract_shapes(VisionTransformer, variant)
    variant = replace(dinov3.VARIANTS[arch], **SMALL)
    return dinov3_rows(arch, variant), abstract_shapes(VisionTransformer, variant)


def abstract_shapes(network, variant):
    return parameter_shapes(nnx.eval_shape(lambda: network(variant, rngs=nnx.Rngs(0))))


ARCHITECTURES = (
    "dinov2_vits14", "dinov2_vitg14_reg", "dinov3_vits16", "dinov3_vitl16", "dinov3_vith_plus16", "dinov3_vit7b16",
    "resnet50", "vgg16_bn",
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("with_optional", [True, False], ids=["with optional tensors", "without"])
def test_every_kind_of_layer_survives_a_round_trip_bit_for_bit(arch, with_optional):
    rows, shapes = small_architecture(arch)
    rng = np.random.default_rng(0)
    theirs = {
        row.theirs: rng.integers(9, size=row.shape) if row.dtypes == ("int64",) else rng.random(row.shape, np.float32)
        for row in rows
        if with_optional or not row.optional
    }
    tensors = {name: Tensor(array.shape, "", lambda array=array: array) for name, array in theirs.items()}
    arrays = {}
    for name, stream in to_ours(rows, tensors, shapes).items():
        chunks = list(stream.chunks())
        arrays[name] = np.concatenate([chunk.ravel() for chunk in chunks]).reshape(stream.shape)
        if name.startswith("blocks."):
            assert len(chunks) == SMALL["depth"]  # one chunk per block, so that memory never holds all blocks
    assert {name: array.shape for name, array in arrays.items() if not name.startswith("unused.")} == shapes
    assert {name for name in arrays if name.startswith("unused.")} == {
        f"unused.{row.theirs}" for row in rows if row.optional and with_optional
    }

    back = dict(to_theirs(rows, arrays, lambda name, block: arrays[name] if block is None else arrays[name][block]))
    assert list(back) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array, strict=True)


# --- refusals ---


@pytest.fixture
def mini(tmp_path):
    return write_converted(tmp_path / "mini.safetensors")


def test_architecture_without_an_authors_format_is_refused(mini):
    folder = mini.parent
    line = refuse(folder, "--to-torch", f"--source={mini}", f"--output={folder / 'back.pth'}")
    assert line == f"{mini}: contains vit_mini8, which was never released in a PyTorch format."


@pytest.mark.parametrize("zipped", [True, False])
def test_file_that_was_not_converted_is_refused(tmp_path, zipped):
    source = tmp_path / "vits14.pth"
    torch.save({"norm.weight": torch.zeros(384)}, source, _use_new_zipfile_serialization=zipped)
    line = (
        f"{source}: not written by convert_weights. If it is a released checkpoint, convert it: "
        f"`python -m convert_weights --arch=ARCH --source={source}`."
    )
    assert refuse(tmp_path, "--to-torch", f"--source={source}", f"--output={tmp_path / 'back.pth'}") == line
    assert refuse(tmp_path, "--verify", f"--output={source}") == line
    with pytest.raises(InputError) as error:
        load_backbone(source)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--source={}"], "--output: required with --to-torch. Pass --source=FILE.safetensors and --output=FILE.pth."),
        (
            ["--output={}.pth"],
            "--source: required with --to-torch. Pass --source=FILE.safetensors and --output=FILE.pth.",
        ),
        (
            ["--source={}", "--output=back.npz"],
            "--output=back.npz: the file name does not end in .pth. Choose a name that ends in .pth.",
        ),
        (
            ["--source={}", "--output={}.pth", "--verify"],
            "--verify: cannot be combined with --to-torch. Remove the option.",
        ),
        (
            ["--source={}", "--output={}.pth", "--arch=dinov2_vits14"],
            "{}: contains vit_mini8, not dinov2_vits14. Remove --arch.",
        ),
    ],
    ids=["no output", "no source", "wrong suffix", "verify", "wrong architecture"],
)
def test_options_that_do_not_fit_are_refused(mini, arguments, line):
    arguments = [argument.format(mini) for argument in arguments]
    assert refuse(mini.parent, "--to-torch", *arguments) == line.format(mini)


def test_existing_output_is_kept(mini):
    back = mini.with_name("back.pth")
    back.write_text("precious")
    line = refuse(mini.parent, "--to-torch", f"--source={mini}", f"--output={back}")
    assert line == f"--output={back}: already exists. Choose another --output, or add --force to replace it."


def test_source_is_never_overwritten(tmp_path):
    source = write_converted(tmp_path / "source.pth", "dinov2_vits14")
    line = refuse(tmp_path, "--to-torch", f"--source={source}", f"--output={source}", "--force")
    assert line == f"--output={source}: is the source itself. Choose another --output."


def test_damaged_file_is_not_converted_back(tmp_path):
    ours, back = write_converted(tmp_path / "ours.safetensors", "dinov2_vits14"), tmp_path / "back.pth"
    with ours.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x3f")
    line = refuse(tmp_path, "--to-torch", f"--source={ours}", f"--output={back}")
    assert line.startswith(f"{ours}: damaged: the sha256 of its data is ")
