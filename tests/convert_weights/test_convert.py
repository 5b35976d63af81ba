"""A conversion writes every value of the source, and metadata that name the source."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert_weights.architectures import RELEASED, architecture_rows, architecture_shapes
from convert_weights.nnunet import nnunet_rows
from jaxla import load_backbone
from jaxla.models.backbones.dinov3 import HUB_SPELLINGS
from jaxla.models.backbones.vgg import VARIANTS as VGGS
from jaxla.models.weights_format import parameter_count, read_metadata
from jaxla.nnunet.plan import read_plan
from tests.convert_weights.command import (
    GOLDEN,
    assert_same_state,
    authors_shapes,
    convert_in_new_process,
    empty_state,
    full_state,
    read_weights,
    succeed,
)
from tests.convert_weights.shards import write_shards
from tests.parity.network_references import ReferenceVGG


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The folder of a converted checkpoint, its state dict, and the output of the command."""
    folder = tmp_path_factory.mktemp("dinov2")
    state = full_state("dinov2_vits14")
    torch.save(state, folder / "vits14.pth")
    output = folder / "made" / "vits14.safetensors"
    return folder, state, succeed("--arch=dinov2_vits14", f"--source={folder / 'vits14.pth'}", f"--output={output}")


def test_metadata_state_architecture_source_and_hashes(dinov2):
    folder, _, _ = dinov2
    path = folder / "made" / "vits14.safetensors"
    metadata = {
        "format": "jaxla-1",
        "arch": "dinov2_vits14",
        "source": "vits14.pth",
        "source_sha256": hashlib.sha256((folder / "vits14.pth").read_bytes()).hexdigest(),
        "licence": "Apache-2.0",
    }
    assert read_metadata(path) == metadata
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    written = read_weights(path)[1]
    header_without_its_hash = content[:end].replace(written["header_sha256"].encode(), b"0" * 64)
    hashes = {"data_sha256": content[end:], "header_sha256": header_without_its_hash}
    assert written == metadata | {name: hashlib.sha256(part).hexdigest() for name, part in hashes.items()}


def test_command_reports_what_it_kept_and_wrote(dinov2):
    folder, _, printed = dinov2
    source, output = folder / "vits14.pth", folder / "made" / "vits14.safetensors"
    assert printed.splitlines() == [
        f"{source}: dinov2_vits14 in authors' layout, 0.09 GB",
        f"{source}: tensors that no forward pass uses are kept: mask_token",
        f"{output}: dinov2_vits14 from {source}, sha256 of its data {read_weights(output)[1]['data_sha256']}",
    ]
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_every_value_is_copied(dinov2):
    folder, state, _ = dinov2
    arrays, _ = read_weights(folder / "made" / "vits14.safetensors")
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}
    ours = np.sort(np.concatenate([array.ravel() for array in arrays.values()]))
    theirs = np.sort(np.concatenate([value.ravel() for value in state.values()]))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(arrays["blocks.mlp.expand.kernel"][7], state["blocks.7.mlp.fc1.weight"].T)
    position = 1 + 2 * 37 + 5  # the class token, then a grid of 37×37 patches
    np.testing.assert_array_equal(arrays["pos_grid"][2, 5], state["pos_embed"][0, position])
    kernel = arrays["patch_embed.kernel"].reshape(14, 14, 3, 384)
    np.testing.assert_array_equal(kernel[3, 11, 2], state["patch_embed.proj.weight"][:, 2, 3, 11])
    np.testing.assert_array_equal(arrays["unused.mask_token"], state["mask_token"])


def test_unused_tensors_are_neither_loaded_nor_counted(dinov2):
    path = dinov2[0] / "made" / "vits14.safetensors"
    unused = 384  # mask_token
    assert parameter_count(path) == (len(architecture_shapes("dinov2_vits14")), 22_056_576 - unused)
    assert load_backbone(path).variant == RELEASED["dinov2_vits14"]


def test_same_source_gives_same_bytes(dinov2, tmp_path):
    folder, _, _ = dinov2
    succeed("--arch=dinov2_vits14", f"--source={folder / 'vits14.pth'}", f"--output={tmp_path / 'again.safetensors'}")
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "made" / "vits14.safetensors").read_bytes()


def test_safetensors_are_converted_without_torch(dinov2, tmp_path):
    _, state, printed = dinov2
    save_file(state, tmp_path / "vits14.safetensors")
    (tmp_path / "blocked" / "torch").mkdir(parents=True)
    (tmp_path / "blocked" / "torch" / "__init__.py").write_text("raise ModuleNotFoundError('No module named torch')")
    arguments = (
        "--arch=dinov2_vits14",
        f"--source={tmp_path / 'vits14.safetensors'}",
        f"--output={tmp_path / 'o.safetensors'}",
    )
    done = convert_in_new_process(*arguments, PYTHONPATH=str(tmp_path / "blocked"), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert read_weights(tmp_path / "o.safetensors")[1]["data_sha256"] in printed


def test_default_output_is_where_training_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.save(empty_state("dinov3_vits16plus"), tmp_path / "source.pth")
    succeed("--arch=dinov3_vits16plus", f"--source={tmp_path / 'source.pth'}")
    path = tmp_path / "jaxla" / "weights" / "dinov3_vits_plus16.safetensors"
    assert read_metadata(path)["arch"] == "dinov3_vits_plus16"
    assert read_metadata(path)["licence"] == "DINOv3 License"


def test_force_replaces_an_output(tmp_path):
    torch.save(empty_state(), tmp_path / "source.pth")
    (tmp_path / "out.safetensors").write_text("old")
    arguments = (
        "--arch=dinov2_vits14",
        f"--source={tmp_path / 'source.pth'}",
        f"--output={tmp_path / 'out.safetensors'}",
    )
    succeed(*arguments, "--force")
    assert read_metadata(tmp_path / "out.safetensors")["arch"] == "dinov2_vits14"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "source.pth"]


def test_resnet_without_its_classifier_is_converted(tmp_path):
    state = {name: tensor for name, tensor in empty_state("resnet50").items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "source.pth")
    printed = succeed(
        "--arch=resnet50", f"--source={tmp_path / 'source.pth'}", f"--output={tmp_path / 'o.safetensors'}"
    )
    line = f"{tmp_path / 'source.pth'}: contains no classifier (fc.weight, fc.bias); --to-torch will not write one"
    assert line in printed.splitlines()


def test_vgg_gives_pytorchs_features_and_converts_back_bit_for_bit(tmp_path):
    """The checkpoint lacks the classifier, which takes 0.5 GB."""
    reference = ReferenceVGG(VGGS["vgg16_bn"].stages).eval()
    state = reference.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            scale = 2 / tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(scale * torch.rand(tensor.shape, generator=generator))
    source, ours, back = (tmp_path / name for name in ("source.pth", "ours.safetensors", "back.pth"))
    torch.save(state, source)
    printed = succeed("--arch=vgg16_bn", f"--source={source}", f"--output={ours}", "--verify")
    assert "contains no classifier (classifier.0.weight, classifier.0.bias, classifier.3.weight, …)" in printed
    succeed("--to-torch", f"--source={ours}", f"--output={back}")
    assert_same_state(torch.load(back, weights_only=True), state)

    images = np.random.default_rng(0).standard_normal((1, 48, 65, 3), dtype=np.float32)
    features = load_backbone(ours).intermediate(images)
    with torch.no_grad():
        theirs, _ = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    for a, b in zip(features, theirs, strict=True):
        b = b.numpy().transpose(0, 2, 3, 1)
        assert np.linalg.norm(a - b) / np.linalg.norm(b) <= 1e-6  # measured: 3e-7
        assert b.std() > 0


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "in shards"])
def test_safetensors_are_preferred_if_a_folder_has_both_formats(tmp_path, sharded):
    folder = tmp_path / "dinov2-small"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in empty_state().items()}, folder / "model.safetensors")
    if sharded:
        write_shards(folder, empty_state())
    else:
        torch.save(empty_state(), folder / "pytorch_model.bin")
    ignored = "pytorch_model.bin.index.json" if sharded else "pytorch_model.bin"
    printed = succeed("--arch=dinov2_vits14", f"--source={folder}", f"--output={tmp_path / 'o.safetensors'}")
    assert f"{folder}: using model.safetensors, ignoring {ignored}" in printed.splitlines()
    assert read_metadata(tmp_path / "o.safetensors")["source"] == "dinov2-small/model.safetensors"


def test_sha256_of_a_sharded_source_is_that_of_the_shards_sha256sum_lines(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    succeed("--arch=dinov2_vits14", f"--source={index}", f"--output={tmp_path / 'out.safetensors'}")
    lines = [f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}\n" for shard in shards]
    metadata = read_metadata(tmp_path / "out.safetensors")
    assert metadata["source_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert metadata["source"] == f"{tmp_path.name}/{index.name}"


def test_list_shows_released_architectures_with_their_licence():
    lines = succeed("--arch=list").splitlines()
    assert {line.split(":")[0] for line in lines} == {*RELEASED, "nnunet"}
    assert "dinov2_vits14_reg: width 384, 12 blocks, weights under Apache-2.0, use --download" in lines
    assert sum("download them yourself and use --source" in line for line in lines) == 6  # DINOv3
    assert [line.split("; ")[1:] for line in lines if line.startswith("dinov3_vith")] == [
        ["also called dinov3_vith16plus"]
    ]
    assert "resnet50: 16 blocks, weights under BSD-3-Clause, use --download" in lines
    assert "vgg16_bn: 13 convolutions, weights under BSD-3-Clause, use --download" in lines


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.shapes.json")), ids=lambda path: path.stem.split(".")[0])
def test_tables_list_the_authors_tensors_in_their_order(file):
    name = file.name.removesuffix(".shapes.json")
    if name.startswith("nnunet_"):
        plan = read_plan(GOLDEN / "nnunet_plans" / "Hippocampus.json")
        file_rows = nnunet_rows(plan.configuration(name.removeprefix("nnunet_hippocampus_")), 3)
    else:
        file_rows = architecture_rows(HUB_SPELLINGS.get(name, name))
    rows = {row.theirs: row for row in file_rows}
    expected = authors_shapes(name)
    assert [(theirs, row.shape) for theirs, row in rows.items() if theirs in expected] == list(expected.items())
    assert all(row.optional for theirs, row in rows.items() if theirs not in expected)
