"""Refused checkpoints: a different architecture, wrong tensors, and damaged, incomplete or unrelated files."""

import json
import math
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from convert_weights.checkpoint import checkpoint_sha256, open_checkpoint
from jaxla.config import InputError
from tests.convert_weights.command import (
    authors_shapes,
    empty_state,
    refuse,
    refuse_source,
    save,
    succeed,
)
from tests.convert_weights.shards import write_shards

FIX = "Download the released file again, or use the --arch of this file; --arch=list shows the names."


# --- a different architecture, and tensors that do not fit ---


@pytest.mark.parametrize(
    ("found", "requested"),
    [
        ("dinov2_vitb14", "dinov2_vits14"),
        ("dinov2_vits14_reg", "dinov2_vits14"),
        ("dinov2_vits14", "dinov2_vits14_reg"),
        ("dinov3_vits16plus", "dinov3_vits16"),
        ("dinov3_vits16", "dinov3_vits16plus"),
        ("dinov2_vitl14", "dinov3_vitl16"),
        ("resnet152", "resnet50"),
    ],
)
def test_error_names_the_architecture_in_the_file(tmp_path, found, requested):
    source = save(tmp_path, empty_state(found))
    found, requested = (name.replace("s16plus", "s_plus16") for name in (found, requested))
    line = refuse_source(source, requested)
    assert line == f"{source}: contains {found} (authors' layout), not {requested}. Use --arch={found}."


def test_error_names_the_architecture_of_an_incomplete_file(tmp_path):
    state = empty_state("dinov2_vitb14")
    del state["norm.bias"]
    assert refuse_source(save(tmp_path, state)).endswith(
        "resembles dinov2_vitb14 (authors' layout) more than dinov2_vits14, but with 1 of 175 tensors missing "
        "(norm.bias). Download the released file again, and use --arch=dinov2_vitb14."
    )


def test_checkpoint_of_an_unrelated_model_resembles_no_architecture(tmp_path):
    source = save(tmp_path, {f"features.{i}.weight": torch.zeros(3) for i in range(20)})
    assert refuse_source(source) == (
        f"{source}: not dinov2_vits14: 174 of 175 tensors missing (cls_token, pos_embed, patch_embed.proj.weight, …), "
        f"20 unexpected (features.0.weight, features.1.weight, features.2.weight, …). {FIX}"
    )


@pytest.mark.parametrize("prefix", ["backbone.", "teacher.backbone."])
def test_error_names_a_common_prefix_and_the_code_that_removes_it(tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in empty_state().items()}
    line = refuse_source(save(tmp_path, state), "dinov2_vitb14")
    problem, _, code = line.partition(" Save its state dict without this prefix: ")
    assert problem == (
        f"{tmp_path / 'source.pth'}: contains dinov2_vits14 (authors' layout), but all names begin with {prefix!r}."
    )
    source = save(tmp_path, eval(code.removeprefix("`").removesuffix("`."), {"state": state}))
    succeed("--arch=dinov2_vits14", f"--source={source}", f"--output={tmp_path / 'o.safetensors'}")


def test_error_does_not_name_a_prefix_if_tensors_are_also_missing(tmp_path):
    state = {f"backbone.{name}": tensor for name, tensor in empty_state().items() if name != "norm.bias"}
    assert "not dinov2_vits14: 174 of 175 tensors missing" in refuse_source(save(tmp_path, state))


def test_error_counts_and_names_missing_unexpected_and_misshapen_tensors(tmp_path):
    state = empty_state() | {"head.weight": torch.zeros(3), "norm.weight": torch.zeros(383)}
    del state["blocks.3.mlp.fc1.bias"], state["cls_token"]
    source = save(tmp_path, state)
    assert refuse_source(source) == (
        f"{source}: not dinov2_vits14: 2 of 175 tensors missing (cls_token, blocks.3.mlp.fc1.bias), 1 unexpected "
        f"(head.weight), 1 with the wrong shape (norm.weight: (383,), expected (384,)). {FIX}"
    )


@pytest.mark.parametrize(
    ("arch", "dropped"),
    [
        ("resnet50", ["fc.bias"]),
        ("resnet50", ["layer4.2.bn3.num_batches_tracked", "bn1.num_batches_tracked"]),
        ("dinov3_vitl16", ["local_cls_norm.bias"]),
    ],
    ids=["classifier", "counters", "second norm"],
)
def test_a_group_of_optional_tensors_may_not_be_incomplete(tmp_path, arch, dropped):
    state = empty_state(arch)
    if arch == "dinov3_vitl16":
        state |= {f"local_cls_norm.{name}": torch.zeros(1024) for name in ("weight", "bias")}
    for name in dropped:
        del state[name]
    source, count = save(tmp_path, state), len(state) + len(dropped)
    line = refuse_source(source, arch)
    assert line.startswith(f"{source}: not {arch}: {len(dropped)} of {count} tensors missing (")
    assert not [name for name in dropped if name not in line]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_error_names_a_wrong_dtype(tmp_path, dtype):
    source = save(tmp_path, empty_state() | {"norm.weight": torch.zeros(384, dtype=dtype)})
    name = str(dtype).removeprefix("torch.")
    line = f"{source}: wrong dtype in 1 of 175 tensors (norm.weight: {name}, expected float32). Use the file as"
    assert refuse_source(source).startswith(line)


def test_bfloat16_copy_in_safetensors_is_refused(tmp_path):
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in authors_shapes("dinov2_vits14").items()}
    save_file(state, tmp_path / "source.safetensors")
    line = refuse_source(tmp_path / "source.safetensors")
    assert "wrong dtype in 175 of 175 tensors (cls_token: bfloat16, expected float32, pos_embed: bfloat16" in line


def test_a_sparse_tensor_is_refused(tmp_path):
    source = save(tmp_path, empty_state() | {"norm.weight": torch.ones(384).to_sparse()})
    assert "norm.weight: sparse_coo, expected float32" in refuse_source(source)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_values_are_refused(tmp_path, value):
    source = save(tmp_path, empty_state() | {"norm.bias": torch.full((384,), value)})
    assert refuse_source(source).startswith(f"{source}: norm.bias contains NaN or infinite values.")


# --- files that are not a checkpoint, or incomplete ---


@pytest.mark.parametrize("name", ["source.pth", "source.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>404: Not found</body></html>",
        b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 86\n",
        b"Not found\n",
        b"",
        b"../weights/dinov2_vits14_pretrain.pth\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        bytes(64),
        b"{}",
        b'{"weight_map": {"norm.weight": "../elsewhere.bin"}}',
        b'{"weight_map": {"norm.weight": ".."}}',
        b'{"weight_map": {"norm.weight": "."}}',
        b'{"weight_map": {"norm.weight": ""}}',
        b'{"weight_map": ' + 100_000 * b"[",
        b"\x80\x02}q\x00.",
        b"PK\x03\x04" + bytes(64),
        (2**63).to_bytes(8, "little") + b'{"a":1}',
    ],
    ids=[
        "html", "xml", "lfs", "text", "empty", "path", "png", "zeros", "json", "elsewhere", "folder above", "folder",
        "no name", "deep json", "empty pickle", "zip", "header too long",
    ],
)  # fmt: skip
def test_file_that_is_not_a_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    line = refuse_source(tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: ")
    assert line.endswith(" Download the file again.")
    assert "missing" not in line


# The file begins with the length, in little-endian order, so with " <" or " {".
@pytest.mark.parametrize("length", [0x3C20, 0x7B20], ids=["like a web page", "like an index"])
def test_safetensors_are_recognised_whatever_the_length_of_their_header(tmp_path, length):
    header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    source = tmp_path / "source.safetensors"
    source.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode() + bytes(4))
    assert "not dinov2_vits14: 173 of 175 tensors missing" in refuse_source(source)


class Malicious:
    """Create a file when unpickled without weights_only."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_executed(tmp_path, zipped):
    trace, source = tmp_path / "trace", tmp_path / "source.pth"
    torch.save({**empty_state(), "extra": Malicious(trace)}, source, _use_new_zipfile_serialization=zipped)
    line = refuse_source(source)
    assert "would run code" in line
    assert "nothing was run" in line
    assert line.endswith(
        "If the file is your own, save only its state dict: `torch.save(model.state_dict(), 'new.pth')`."
    )
    assert not trace.exists()
    torch.load(source, weights_only=False)
    assert trace.exists()  # the checkpoint was dangerous


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_truncated_checkpoint_is_refused(tmp_path, kind, kept):
    source = tmp_path / f"source.{kind.split()[-1]}"
    state = {name: torch.zeros(math.prod(shape[:1])) for name, shape in authors_shapes("dinov2_vits14").items()}
    if kind == "safetensors":
        save_file(state, source)
    else:
        torch.save(state, source, _use_new_zipfile_serialization=kind == "pth")
    content = source.read_bytes()
    source.write_bytes(content[: int(kept * len(content))])
    line = refuse_source(source)
    assert line.startswith(f"{source}: ")
    assert line.endswith(" Download the file again.")


def test_error_for_a_truncated_file_quotes_torch(tmp_path):
    source = tmp_path / "source.pth"
    torch.save({"norm.weight": torch.zeros(384)}, source, _use_new_zipfile_serialization=False)
    source.write_bytes(source.read_bytes()[:-100])
    line = refuse_source(source)
    assert line.startswith(f"{source}: cannot be loaded (unexpected EOF, expected 100 more bytes")
    assert line.endswith("); it may be truncated or damaged. Download the file again.")


def test_flipped_bit_in_a_tensor_is_found(tmp_path):
    state = empty_state() | {"norm.weight": torch.arange(384.0)}
    source = save(tmp_path, state)
    content = bytearray(source.read_bytes())
    content[content.index(state["norm.weight"].numpy().tobytes()) + 800] ^= 1
    source.write_bytes(content)
    line = refuse_source(source)
    assert line.startswith(f"{source}: damaged: source/data/")
    assert line.endswith(" differs from its checksum. Download the file again.")


def test_flipped_bit_that_exchanges_the_data_of_two_tensors_is_found(tmp_path):
    source = save(tmp_path, empty_state())
    content = bytearray(source.read_bytes())
    content[content.index(b"X\x01\x00\x00\x004") + 5] ^= 1  # storage 4 -> 5
    source.write_bytes(content)
    line = refuse_source(source)
    assert line == f"{source}: damaged: source/data.pkl differs from its checksum. Download the file again."


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    torch.manual_seed(0)
    source = save(tmp_path, {"a.weight": torch.rand(3, 2), "b.weight": torch.rand(3, 2), "n": torch.tensor(4)})

    def read():
        checkpoint = open_checkpoint(source)
        checkpoint_sha256(checkpoint)
        return {name: (*tensor[:2], tensor.read().tobytes()) for name, tensor in checkpoint.tensors.items()}

    content, expected, refused = source.read_bytes(), read(), 0
    for bit in random.Random(0).sample(range(8 * len(content)), 700):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        source.write_bytes(damaged)
        try:
            assert read() == expected, bit
        except InputError:
            refused += 1
    assert refused > 200  # other bits are in fields without effect, such as padding and dates


def test_checkpoint_without_checksums_is_converted(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        source = save(tmp_path, empty_state())
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(source) as archive:
        assert archive.testzip()
    succeed("--arch=dinov2_vits14", f"--source={source}", f"--output={tmp_path / 'o.safetensors'}")


@pytest.mark.parametrize("key", ["model", "state_dict", "teacher"])
def test_error_names_the_key_of_a_nested_state_dict(tmp_path, key):
    source = save(tmp_path, {"epoch": 3, key: empty_state()})
    assert refuse_source(source).endswith(
        f"not a state dict, but contains one under {key!r}. Save only this: "
        f"`torch.save(torch.load('{source}', weights_only=True)[{key!r}], 'new.pth')`."
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.zeros(3)], " but a list"),
        ({"epoch": 3}, ": contains 'epoch'"),
        ({0: torch.zeros(3), "norm.weight": torch.zeros(3)}, ": contains 0"),
        (torch.zeros(3), " but a Tensor"),
    ],
    ids=["list", "number", "integer key", "tensor"],
)
def test_content_that_is_not_a_state_dict_is_refused(tmp_path, content, problem):
    source = save(tmp_path, content)
    expected = f"{source}: not a state dict (names mapped to tensors){problem}. Pass the released weights."
    assert refuse_source(source) == expected


def test_converted_file_is_refused_as_a_source(tmp_path):
    arguments = ("--arch=dinov2_vits14", f"--output={tmp_path / 'source.safetensors'}")
    succeed(*arguments, f"--source={save(tmp_path, empty_state())}")
    line = refuse_source(tmp_path / "source.safetensors")
    assert line.startswith(f"{tmp_path / 'source.safetensors'}: already converted. ")
    assert "--to-torch" in line


# --- shards and folders ---


def test_error_names_a_missing_shard(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    shards[1].unlink()
    assert refuse_source(index) == (
        f"{index}: lacks 1 of its 3 shards (pytorch_model-00002-of-00003.bin). Download them into {tmp_path}."
    )


def test_error_names_a_shard_that_does_not_match_the_index(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    shard_names = json.loads(index.read_text())["weight_map"]
    shard_names["pos_embed"] = shards[2].name
    index.write_text(json.dumps({"weight_map": shard_names}))
    problem = f"contains 1 tensor that {index.name} does not list (pos_embed)"
    assert refuse_source(index) == f"{shards[1]}: {problem}. Download both files again."
    del shard_names["pos_embed"], shard_names["cls_token"]
    shard_names["norm.extra"] = shards[0].name
    index.write_text(json.dumps({"weight_map": shard_names}))
    problem = f"lacks 1 tensor that {index.name} lists (norm.extra)"
    assert refuse_source(index) == f"{shards[0]}: {problem}. Download both files again."


def test_error_for_a_single_shard_asks_for_the_index(tmp_path):
    _, shards = write_shards(tmp_path, empty_state())
    line = refuse_source(shards[0])
    assert "115 of 175 tensors missing" in line
    assert " This is one of several shards. Pass the *.index.json that lists all of them, or use" in line


def test_error_names_an_index_that_cannot_be_read(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.symlink_to("../../blobs/0")
    arguments = ("--arch=dinov2_vits14", f"--source={folder}", f"--output={tmp_path / 'o.safetensors'}")
    assert refuse(tmp_path, *arguments) == (
        f"{index}: cannot be read (No such file or directory). Fix this, or download the file again."
    )


def test_error_names_a_damaged_shard(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    shards[2].write_bytes(shards[2].read_bytes()[:1000])
    assert refuse_source(index).startswith(f"{shards[2]}: ")


def test_folder_must_contain_one_checkpoint(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    arguments = ("--arch=dinov2_vits14", f"--source={folder}", f"--output={tmp_path / 'o.safetensors'}")
    assert refuse(tmp_path, *arguments).startswith(f"--source={folder}: contains no checkpoint (")
    index, shards = write_shards(folder, empty_state())
    index_text = index.read_text()
    index.unlink()
    assert refuse(tmp_path, *arguments) == (
        f"--source={folder}: contains shards ({', '.join(shard.name for shard in shards)}) without their *.index.json. "
        "Download the index too, or pass a checkpoint that is a single file."
    )
    index.write_text(index_text)
    torch.save(empty_state(), folder / "other.pth")
    problem = "contains 2 checkpoints (pytorch_model.bin.index.json, other.pth)"
    assert refuse(tmp_path, *arguments) == f"--source={folder}: {problem}. Pass one of these files."
    (folder / "other.pth").unlink()
    succeed(*arguments)
