"""Conversion of checkpoints that `transformers` writes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from convert_weights.checkpoint import open_checkpoint
from convert_weights.huggingface import hub_name, hub_shapes, to_authors
from convert_weights.vision_transformer import dinov2_rows, dinov3_rows
from jaxla import load_backbone
from jaxla.models.backbones import VARIANTS
from jaxla.models.ops.positions import rotary_periods
from tests.convert_weights.command import read_weights, refuse_source, succeed

DINOV2 = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}


def randomise(model):
    """Draw all parameters at random: new models have scales of 1 and biases of 0, which hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.03).add_(float("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    """A model, the folder where it is saved, the file that it is converted to, and the output of the command."""
    folder = tmp_path_factory.mktemp("dinov3")
    config = DINOv3ViTConfig(intermediate_size=1536, use_gated_mlp=True, hidden_act="silu", num_register_tokens=4)
    model = randomise(DINOv3ViTModel(config))
    model.save_pretrained(folder / "saved")
    output = folder / "ours.safetensors"
    printed = succeed("--arch=dinov3_vits16plus", f"--source={folder / 'saved'}", f"--output={output}")
    return model, folder / "saved", output, printed


def test_dinov3_tokens_equal_those_of_transformers(dinov3):
    model, _, output, _ = dinov3
    image = np.random.default_rng(0).standard_normal((1, 64, 96, 3), dtype=np.float32)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(image.transpose(0, 3, 1, 2))).last_hidden_state[0].numpy()
    ours = load_backbone(output)(image)
    ours = np.concatenate([ours.cls, ours.registers[0], ours.patches.reshape(-1, 384)])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # measured: 3.6e-6


def test_missing_constants_of_dinov3_are_computed(dinov3):
    _, _, output, printed = dinov3
    arrays, metadata = read_weights(output)
    np.testing.assert_array_equal(arrays["periods"], rotary_periods(64), strict=True)
    np.testing.assert_array_equal(arrays["blocks.attention.qkv_bias_mask"], np.tile(np.repeat([1, 0, 1], 384), (12, 1)))
    assert not arrays["blocks.attention.qkv_bias"][:, 384:768].any()
    assert arrays["unused.mask_token"].shape == (1, 384)
    assert "saved/model.safetensors: dinov3_vits_plus16 in Hugging Face's layout, 0.11 GB" in printed
    assert "contains no rotary periods; they are computed" in printed
    assert "convert that file to get the authors' values" in printed
    assert metadata["source"] == "saved/model.safetensors"


def test_names_in_memory_and_with_a_prefix_give_the_same_bytes(dinov3, tmp_path):
    model, _, output, _ = dinov3
    state = {f"dinov3_vit.{name}": tensor for name, tensor in model.state_dict().items()}
    assert "dinov3_vit.model.layer.0.attention.q_proj.weight" in state
    save_file(state, tmp_path / "source.safetensors")
    made = tmp_path / "made.safetensors"
    succeed("--arch=dinov3_vits_plus16", f"--source={tmp_path / 'source.safetensors'}", f"--output={made}")
    assert read_weights(made)[1]["data_sha256"] == read_weights(output)[1]["data_sha256"]


def test_checkpoint_with_a_classifier_is_refused(dinov3, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in load_file(dinov3[1] / "model.safetensors").items()}
    save_file(state | {"classifier.weight": torch.zeros(7, 384)}, tmp_path / "source.safetensors")
    line = refuse_source(tmp_path / "source.safetensors", "dinov3_vits_plus16")
    assert "not dinov3_vits_plus16: 1 unexpected (classifier.weight). Download" in line


def test_error_names_an_architecture_of_the_other_family(dinov3, tmp_path):
    source = tmp_path / "model.safetensors"
    source.symlink_to(dinov3[1] / "model.safetensors")
    line = refuse_source(source, "dinov2_vits14")
    assert line == (
        f"{source}: contains dinov3_vits_plus16 (Hugging Face's layout), not dinov2_vits14. "
        "Use --arch=dinov3_vits_plus16."
    )


# --- DINOv2 ---


def test_dinov2_in_shards_is_converted_and_converted_back(tmp_path):
    model = randomise(Dinov2Model(Dinov2Config(**DINOV2)))
    model.save_pretrained(tmp_path / "saved", max_shard_size="30MB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    output, back = tmp_path / "o.safetensors", tmp_path / "back.pth"
    printed = succeed("--arch=dinov2_vits14", f"--source={tmp_path / 'saved'}", f"--output={output}")
    assert "saved/model.safetensors.index.json: dinov2_vits14 in Hugging Face's layout, 0.09 GB" in printed
    assert "rotary" not in printed

    succeed("--to-torch", f"--source={output}", f"--output={back}")
    authors, theirs = torch.load(back, weights_only=True), model.state_dict()
    for kind in ("weight", "bias"):
        qkv = [theirs[f"encoder.layer.3.attention.{x}_proj.{kind}"] for x in "qkv"]
        assert torch.equal(authors[f"blocks.3.attn.qkv.{kind}"], torch.cat(qkv))
        assert torch.equal(authors[f"blocks.3.mlp.fc2.{kind}"], theirs[f"encoder.layer.3.mlp.fc2.{kind}"])
        assert torch.equal(authors[f"norm.{kind}"], theirs[f"layernorm.{kind}"])
    assert torch.equal(authors["pos_embed"], theirs["embeddings.position_embeddings"])
    assert torch.equal(authors["mask_token"], theirs["embeddings.mask_token"])
    assert torch.equal(authors["blocks.11.ls2.gamma"], theirs["encoder.layer.11.layer_scale2.lambda1"])


# --- small networks: exactly the tensors that transformers writes are expected ---

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2}
SMALL_VARIANT = {"width": 16, "depth": 2, "heads": 2, "patch": 2}


def small_dinov2_rows(arch, **changes):
    return dinov2_rows(replace(VARIANTS[arch], **SMALL_VARIANT, grid=3, **changes))


def small_dinov3_rows(arch, **changes):
    return dinov3_rows(arch, replace(VARIANTS[arch], **SMALL_VARIANT, **changes))


MODELS = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=6)), small_dinov2_rows("dinov2_vits14", hidden=64)),
    "dinov2 g": (
        lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=6, use_swiglu_ffn=True)),
        small_dinov2_rows("dinov2_vitg14", hidden=48),
    ),
    "dinov2 g with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=6, use_swiglu_ffn=True)),
        small_dinov2_rows("dinov2_vitg14_reg", hidden=48),
    ),
    "dinov3": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, intermediate_size=64, num_register_tokens=4)),
        small_dinov3_rows("dinov3_vits16", hidden=64),
    ),
    "dinov3 7B": (
        lambda: DINOv3ViTModel(
            DINOv3ViTConfig(
                **SMALL,
                intermediate_size=64,
                num_register_tokens=4,
                use_gated_mlp=True,
                query_bias=False,
                value_bias=False,
            )
        ),
        small_dinov3_rows("dinov3_vit7b16", hidden=64),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_tensors_are_recognised_by_their_names_on_the_hub_and_in_memory(kind, tmp_path):
    make, rows = MODELS[kind]
    model = randomise(make())
    model.save_pretrained(tmp_path)
    on_hub = open_checkpoint(tmp_path).tensors
    save_file(model.state_dict(), tmp_path / "memory.safetensors")
    in_memory = {hub_name(name): t for name, t in open_checkpoint(tmp_path / "memory.safetensors").tensors.items()}

    for tensors in (on_hub, in_memory):
        shapes = {name: shape for name, (shape, _) in hub_shapes(rows, tensors).items()}
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    first, second = to_authors(rows, on_hub), to_authors(rows, in_memory)
    assert list(first) == [name for name in dict.fromkeys(row.theirs for row in rows) if "local_cls" not in name]
    for name, tensor in first.items():
        assert tensor.read().shape == tensor.shape, name
        np.testing.assert_array_equal(tensor.read(), second[name].read(), strict=True)
    if "registers" in kind:
        np.testing.assert_array_equal(first["register_tokens"].read(), model.state_dict()["embeddings.register_tokens"])
    if "g" in kind.split():
        gate, up = (model.state_dict()[f"encoder.layer.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        np.testing.assert_array_equal(first["blocks.1.mlp.w12.weight"].read(), torch.cat([gate, up]))
