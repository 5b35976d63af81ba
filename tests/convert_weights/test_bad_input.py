"""What the conversion refuses: one line, exit status 2, and nothing written."""

import json
import math
import random
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from convert_weights.checkpoint import checkpoint_sha256, open_checkpoint
from jaxla.config import InputError
from tests.commands import tree
from tests.convert_weights.command import (
    ROOT,
    convert,
    empty_state,
    refuse,
    refuse_source,
    shapes_of,
    succeed,
)
from tests.convert_weights.shards import write_shards
from tests.training.faults import files_at_most, leave_free


def saved(folder, state):
    torch.save(state, folder / "source.pth")
    return folder / "source.pth"


MEND = "; download the released file again, or pass the --arch that it holds; --arch=list names them"


# --- another architecture, and tensors that do not fit ---


@pytest.mark.parametrize(
    ("held", "asked"),
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
def test_the_architecture_that_a_file_holds_is_named(tmp_path, held, asked):
    source = saved(tmp_path, empty_state(held))
    held, asked = (name.replace("s16plus", "s_plus16") for name in (held, asked))
    assert refuse_source(source, asked) == f"{source}: holds {held} (authors' layout), not {asked}; pass --arch={held}"


def test_a_damaged_checkpoint_of_another_architecture_is_named_too(tmp_path):
    state = empty_state("dinov2_vitb14")
    del state["norm.bias"]
    assert refuse_source(saved(tmp_path, state)).endswith(
        "looks like dinov2_vitb14 (authors' layout), not dinov2_vits14; but of dinov2_vitb14 too it lacks 1 of its 175 "
        "tensors (norm.bias); download the released file again, and pass --arch=dinov2_vitb14"
    )


def test_a_checkpoint_of_another_model_looks_like_none(tmp_path):
    source = saved(tmp_path, {f"features.{i}.weight": torch.zeros(3) for i in range(20)})
    assert refuse_source(source) == (
        f"{source}: not dinov2_vits14: it lacks 174 of its 175 tensors (cls_token, pos_embed, patch_embed.proj.weight, "
        f"…), has 20 too many (features.0.weight, features.1.weight, features.2.weight, …){MEND}"
    )


@pytest.mark.parametrize("prefix", ["backbone.", "teacher.backbone."])
def test_a_prefix_of_all_names_is_named_with_the_way_to_strip_it(tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in empty_state().items()}
    line = refuse_source(saved(tmp_path, state), "dinov2_vitb14")
    said, _, way = line.partition("; save its state dict without that: ")
    assert said == (
        f"{tmp_path / 'source.pth'}: holds dinov2_vits14 (authors' layout), but all names begin with {prefix!r}"
    )
    source = saved(tmp_path, eval(way, {"state": state}))
    succeed("--arch=dinov2_vits14", f"--source={source}", f"--output={tmp_path / 'o.safetensors'}")


def test_a_prefix_is_not_named_where_more_is_amiss(tmp_path):
    state = {f"backbone.{name}": tensor for name, tensor in empty_state().items() if name != "norm.bias"}
    assert "not dinov2_vits14: it lacks 174 of its 175" in refuse_source(saved(tmp_path, state))


def test_missing_extra_and_misshapen_tensors_are_counted_and_named(tmp_path):
    state = empty_state() | {"head.weight": torch.zeros(3), "norm.weight": torch.zeros(383)}
    del state["blocks.3.mlp.fc1.bias"], state["cls_token"]
    source = saved(tmp_path, state)
    assert refuse_source(source) == (
        f"{source}: not dinov2_vits14: it lacks 2 of its 175 tensors (cls_token, blocks.3.mlp.fc1.bias), has 1 too "
        f"many (head.weight), has 1 of another shape (norm.weight: (383,), expected (384,)){MEND}"
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
def test_what_may_be_lacking_is_lacking_whole(tmp_path, arch, dropped):
    state = empty_state(arch)
    if arch == "dinov3_vitl16":
        state |= {f"local_cls_norm.{name}": torch.zeros(1024) for name in ("weight", "bias")}
    for name in dropped:
        del state[name]
    source, count = saved(tmp_path, state), len(state) + len(dropped)
    line = refuse_source(source, arch)
    assert line.startswith(f"{source}: not {arch}: it lacks {len(dropped)} of its {count} tensors (")
    assert not [name for name in dropped if name not in line]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_another_dtype_is_named(tmp_path, dtype):
    source = saved(tmp_path, empty_state() | {"norm.weight": torch.zeros(384, dtype=dtype)})
    name = str(dtype).removeprefix("torch.")
    line = f"{source}: 1 of its 175 tensors are of another dtype (norm.weight: {name}, expected float32); a copy"
    assert refuse_source(source).startswith(line)


def test_a_rounded_copy_is_refused_in_safetensors_too(tmp_path):
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes_of("dinov2_vits14").items()}
    save_file(state, tmp_path / "source.safetensors")
    line = refuse_source(tmp_path / "source.safetensors")
    assert (
        "175 of its 175 tensors are of another dtype (cls_token: bfloat16, expected float32, pos_embed: bfloat16"
        in line
    )


def test_a_sparse_tensor_is_refused(tmp_path):
    source = saved(tmp_path, empty_state() | {"norm.weight": torch.ones(384).to_sparse()})
    assert "norm.weight: sparse_coo, expected float32" in refuse_source(source)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    source = saved(tmp_path, empty_state() | {"norm.bias": torch.full((384,), value)})
    assert refuse_source(source).startswith(f"{source}: norm.bias holds numbers that are not finite (NaN or infinite)")


# --- files that are no checkpoint, or not whole ---


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
def test_something_that_is_no_checkpoint_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    line = refuse_source(tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: ")
    assert "download" in line
    assert "again" in line
    assert "missing" not in line


@pytest.mark.parametrize("length", [0x3C20, 0x7B20], ids=["like a web page", "like an index"])
def test_safetensors_are_known_whatever_their_length(tmp_path, length):
    header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    source = tmp_path / "source.safetensors"
    source.write_bytes(length.to_bytes(8, "little") + header.ljust(length).encode() + bytes(4))
    assert "not dinov2_vits14: it lacks 173 of its 175 tensors" in refuse_source(source)


class Malicious:
    """Unpickled the careless way, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path, zipped):
    trace, source = tmp_path / "trace", tmp_path / "source.pth"
    torch.save({**empty_state(), "extra": Malicious(trace)}, source, _use_new_zipfile_serialization=zipped)
    line = refuse_source(source)
    assert "would run code" in line
    assert "nothing was run" in line
    assert line.endswith(
        "or, if the file is your own, save its state dict alone: torch.save(model.state_dict(), 'new.pth')"
    )
    assert not trace.exists()
    torch.load(source, weights_only=False)
    assert trace.exists()  # the checkpoint was a dangerous one


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path, kind, kept):
    source = tmp_path / f"source.{kind.split()[-1]}"
    state = {name: torch.zeros(math.prod(shape[:1])) for name, shape in shapes_of("dinov2_vits14").items()}
    if kind == "safetensors":
        save_file(state, source)
    else:
        torch.save(state, source, _use_new_zipfile_serialization=kind == "pth")
    whole = source.read_bytes()
    source.write_bytes(whole[: int(kept * len(whole))])
    line = refuse_source(source)
    assert line.startswith(f"{source}: ")
    assert "again" in line


def test_what_kept_a_checkpoint_from_being_loaded_is_quoted_in_short(tmp_path):
    source = tmp_path / "source.pth"
    said = f"{source}: truncated, damaged or no checkpoint, unless memory or the disk failed"
    source.write_bytes(b"PK\x03\x04" + bytes(64))  # of this torch says much, and nothing to a user
    assert refuse_source(source) == f"{said}; download it again"
    torch.save({"norm.weight": torch.zeros(384)}, source, _use_new_zipfile_serialization=False)
    source.write_bytes(source.read_bytes()[:-100])
    line = refuse_source(source)
    assert line.startswith(f"{said} (unexpected EOF, expected ")
    assert line.endswith(" more bytes); download it again")


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    state = empty_state() | {"norm.weight": torch.arange(384.0)}
    source = saved(tmp_path, state)
    content = bytearray(source.read_bytes())
    content[content.index(state["norm.weight"].numpy().tobytes()) + 800] ^= 1
    source.write_bytes(content)
    line = refuse_source(source)
    assert line.startswith(f"{source}: damaged (source/data/")
    assert line.endswith("differs from its checksum); download it again")


def test_a_flipped_bit_that_gives_a_tensor_the_numbers_of_another_is_found(tmp_path):
    source = saved(tmp_path, empty_state())
    content = bytearray(source.read_bytes())
    content[content.index(b"X\x01\x00\x00\x004") + 5] ^= 1  # storage 4 -> 5
    source.write_bytes(content)
    line = refuse_source(source)
    assert line == f"{source}: damaged (source/data.pkl differs from its checksum); download it again"


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    torch.manual_seed(0)
    source = saved(tmp_path, {"a.weight": torch.rand(3, 2), "b.weight": torch.rand(3, 2), "n": torch.tensor(4)})

    def read():
        checkpoint = open_checkpoint(source)
        checkpoint_sha256(checkpoint)
        return {name: (*tensor[:2], tensor.read().tobytes()) for name, tensor in checkpoint.tensors.items()}

    whole, expected, refused = source.read_bytes(), read(), 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 700):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        source.write_bytes(damaged)
        try:
            assert read() == expected, bit
        except InputError:
            refused += 1
    assert refused > 200  # the others were in padding, dates and the like


def test_a_checkpoint_without_checksums_is_taken(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        source = saved(tmp_path, empty_state())
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(source) as archive:
        assert archive.testzip()
    succeed("--arch=dinov2_vits14", f"--source={source}", f"--output={tmp_path / 'o.safetensors'}")


@pytest.mark.parametrize("key", ["model", "state_dict", "teacher"])
def test_the_key_under_which_a_state_dict_stands_is_named(tmp_path, key):
    source = saved(tmp_path, {"epoch": 3, key: empty_state()})
    assert refuse_source(source).endswith(
        f"something around one, which stands under {key!r}; save that alone: "
        f"torch.save(torch.load('{source}', weights_only=True)[{key!r}], 'new.pth')"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.zeros(3)], " but a list"),
        ({"epoch": 3}, ": has 'epoch'"),
        ({0: torch.zeros(3), "norm.weight": torch.zeros(3)}, ": has 0"),
        (torch.zeros(3), " but a Tensor"),
    ],
    ids=["list", "number", "key that is no name", "tensor"],
)
def test_something_else_than_a_state_dict_is_refused(tmp_path, content, what):
    source = saved(tmp_path, content)
    assert refuse_source(source) == (
        f"{source}: not a state dict (a mapping of names to tensors){what}; give the file of weights that was released"
    )


def test_a_file_that_was_converted_already_is_refused(tmp_path):
    arguments = ("--arch=dinov2_vits14", f"--output={tmp_path / 'source.safetensors'}")
    succeed(*arguments, f"--source={saved(tmp_path, empty_state())}")
    line = refuse_source(tmp_path / "source.safetensors")
    assert line.startswith(f"{tmp_path / 'source.safetensors'}: converted already; ")
    assert "--to-torch" in line


# --- shards and folders ---


def test_a_missing_shard_is_named(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    shards[1].unlink()
    assert refuse_source(index) == (
        f"{index}: missing: 1 of its 3 shards (pytorch_model-00002-of-00003.bin); download into {tmp_path} what is "
        "missing"
    )


def test_a_shard_that_lacks_what_the_index_places_in_it_is_named(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    shard_of = json.loads(index.read_text())["weight_map"]
    shard_of["pos_embed"] = shards[2].name
    index.write_text(json.dumps({"weight_map": shard_of}))
    expected = f"{shards[1]}: has 1 that {index.name} does not name (pos_embed); download both again"
    assert refuse_source(index) == expected
    del shard_of["pos_embed"], shard_of["cls_token"]
    shard_of["norm.extra"] = shards[0].name
    index.write_text(json.dumps({"weight_map": shard_of}))
    assert refuse_source(index) == (
        f"{shards[0]}: lacks 1 of what {index.name} places in it (norm.extra); download both again"
    )


def test_one_shard_alone_is_called_so(tmp_path):
    _, shards = write_shards(tmp_path, empty_state())
    line = refuse_source(shards[0])
    assert "lacks 115 of its 175 tensors" in line
    assert "; it is one of several shards: give the *.index.json that names them all, or pass" in line


def test_an_index_that_cannot_be_read_is_named(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.symlink_to("../../blobs/0")
    arguments = ("--arch=dinov2_vits14", f"--source={folder}", f"--output={tmp_path / 'o.safetensors'}")
    assert refuse(tmp_path, *arguments) == (
        f"{index}: cannot be read (No such file or directory); mend that, or download it again"
    )


def test_a_damaged_shard_is_named(tmp_path):
    index, shards = write_shards(tmp_path, empty_state())
    shards[2].write_bytes(shards[2].read_bytes()[:1000])
    assert refuse_source(index).startswith(f"{shards[2]}: ")


def test_a_folder_must_hold_one_checkpoint(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    arguments = ("--arch=dinov2_vits14", f"--source={folder}", f"--output={tmp_path / 'o.safetensors'}")
    assert refuse(tmp_path, *arguments).startswith(f"--source={folder}: holds no checkpoint (")
    index, shards = write_shards(folder, empty_state())
    named = index.read_text()
    index.unlink()
    assert refuse(tmp_path, *arguments) == (
        f"--source={folder}: holds shards ({', '.join(shard.name for shard in shards)}) without their *.index.json; "
        "download that too, or give one whole file"
    )
    index.write_text(named)
    torch.save(empty_state(), folder / "other.pth")
    line = refuse(tmp_path, *arguments)
    assert line == f"--source={folder}: holds 2 checkpoints (pytorch_model.bin.index.json, other.pth); give one"
    (folder / "other.pth").unlink()
    succeed(*arguments)


# --- options ---


def test_a_source_that_does_not_exist_is_refused(tmp_path):
    source = tmp_path / "source.pth"
    output = tmp_path / "out.safetensors"
    output.write_text("precious")  # of two mistakes the first is told
    for given in (source, "https://host/source.pth", "facebook/dinov2-small"):
        line = refuse(tmp_path, "--arch=dinov2_vits14", f"--source={given}", f"--output={output}")
        assert line == (
            f"--source={given}: no such file; give a file or folder on this machine, such as the checkpoint that you "
            "downloaded"
        )


def test_names_that_are_too_long_are_refused(tmp_path):
    long = tmp_path / f"{300 * 'a'}.safetensors"
    source = saved(tmp_path, {"norm.weight": torch.zeros(3)})
    assert "no such file" in refuse(
        tmp_path, "--arch=resnet50", f"--source={long}", f"--output={tmp_path / 'o.safetensors'}"
    )
    for output in (long, long / "o.safetensors"):
        line = refuse(tmp_path, "--arch=resnet50", f"--source={source}", f"--output={output}")
        assert line == f"--output={output}: cannot be written (File name too long); choose another"
    assert "no such weights file" in refuse(tmp_path, "--verify", f"--output={long}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "option --source is required to convert, or --download; --help describes both"),
        (["--arch=dinov2_vits14"], "option --source is required to convert, or --download; --help describes both"),
        (["--source=x.pth"], "option --arch is required to convert; --arch=list names the architectures"),
        (
            ["--source=x.safetensors", "--verify"],
            "option --arch is required to convert; --arch=list names the architectures; to verify a converted file, "
            "give it as --output",
        ),
        (["--arch=dinov2_vits14", "--source=x.pth", "--download"], "options --source and --download: give one of them"),
        (
            ["--verify", "--output=x.safetensors", "--force"],
            "option --force goes with a conversion; --verify alone writes nothing",
        ),
    ],
)
def test_options_that_lack_or_do_not_go_together_are_named(tmp_path, arguments, line):
    assert refuse(tmp_path, *arguments) == line


@pytest.mark.parametrize(
    ("given", "nearest"), [("dinov2_vits15", "dinov2_vits14"), ("dinov3_vits17plus", "dinov3_vits_plus16")]
)
def test_an_unknown_architecture_names_the_nearest(tmp_path, given, nearest):
    line = refuse_source(saved(tmp_path, empty_state()), given)
    assert line.startswith(f"--arch {given!r} is unknown; did you mean {nearest}?")


def test_an_output_that_exists_is_kept(tmp_path):
    source, output = saved(tmp_path, empty_state()), tmp_path / "out.safetensors"
    output.write_text("precious")
    assert refuse_source(source) == f"{output}: exists already; choose another --output, or replace it with --force"


def test_a_forced_output_is_kept_until_there_is_another(tmp_path):
    source, output = (
        saved(tmp_path, empty_state() | {"norm.bias": torch.full((384,), math.nan)}),
        tmp_path / "o.safetensors",
    )
    output.write_text("precious")
    arguments = ("--arch=dinov2_vits14", f"--source={source}", f"--output={output}", "--force")
    assert "norm.bias holds numbers that are not finite" in refuse(tmp_path, *arguments)
    assert output.read_text() == "precious"


def test_the_source_is_never_the_output(tmp_path):
    source, link = tmp_path / "source.safetensors", tmp_path / "link.safetensors"
    save_file({"norm.weight": torch.zeros(3)}, source)
    link.symlink_to(source)
    for given, output in [(source, source), (link, source), (source, link)]:
        line = refuse(tmp_path, "--arch=resnet50", f"--source={given}", f"--output={output}", "--force")
        assert line == f"--output={output}: is the source itself; choose another --output"

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": source.name}}))
    line = refuse(tmp_path, "--arch=resnet50", f"--source={index}", f"--output={source}", "--force")
    assert line == f"--output={source}: is the source itself; choose another --output"


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    source = saved(tmp_path, empty_state())
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for output, word in {
        "file/out.safetensors": "cannot be written",
        "folder.safetensors": "is a folder",
        "out.npz": "must end in .safetensors",
    }.items():
        arguments = ("--arch=dinov2_vits14", f"--source={source}", f"--output={tmp_path / output}", "--force")
        line = refuse(tmp_path, *arguments)
        assert line.startswith("--output=")
        assert word in line


@pytest.mark.parametrize(
    ("torch_there", "line"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            "which is not installed: pip install 'torch>=2.10'",
        ),
        (
            "__version__ = '2.9.1'",
            "but 2.9.1 is too old to read files safely: pip install 'torch>=2.10'",
        ),
        (
            "raise ImportError('libc10.so: no such file')",
            "which is installed but cannot be imported (libc10.so: no such file): pip install 'torch>=2.10' "
            "--force-reinstall",
        ),
    ],
    ids=["none", "too old", "broken"],
)
def test_without_a_torch_that_can_be_used_the_way_to_install_it_is_named(tmp_path, torch_there, line):
    source = saved(tmp_path, empty_state())
    blocked = tmp_path / "blocked" / "torch"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text(torch_there)

    def run(*arguments):
        return convert(*arguments, PYTHONPATH=str(blocked.parent), PYTHONDONTWRITEBYTECODE="1")

    needs = "a PyTorch file, and reading it needs torch,"
    assert refuse_source(source, run=run) == f"{source}: {needs} {line}"


# --- writing that comes to no end ---


@pytest.mark.parametrize("size", [100, 30_000_000], ids=["in the header", "in the data"])
def test_a_disk_that_gets_full_leaves_nothing_behind(tmp_path, size):
    source = saved(tmp_path, empty_state())
    with files_at_most(size):
        line = refuse_source(source)
    assert line == (
        f"{tmp_path / 'out.safetensors'}: cannot be written (File too large); mend that, or choose another place"
    )


def test_a_disk_that_gets_full_on_the_way_back_leaves_nothing_behind(tmp_path):
    source, ours, back = saved(tmp_path, empty_state()), tmp_path / "ours.safetensors", tmp_path / "back.pth"
    succeed("--arch=dinov2_vits14", f"--source={source}", f"--output={ours}")
    with files_at_most(30_000_000):
        line = refuse(tmp_path, "--to-torch", f"--source={ours}", f"--output={back}")
    assert line.startswith(f"{back}: cannot be written (")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = saved(tmp_path, empty_state())
    leave_free(monkeypatch, 10_000_000)
    line = refuse_source(source)
    output = tmp_path / "out.safetensors"
    assert line == f"{output}: needs 0.09 GB, 0.01 are free; make room, or choose another place"


def test_a_conversion_that_is_ended_leaves_nothing_behind(tmp_path):
    source = saved(tmp_path, empty_state("dinov2_vitl14"))
    before = tree(tmp_path, but=None)
    arguments = ["--arch=dinov2_vitl14", f"--source={source}", f"--output={tmp_path / 'out.safetensors'}"]
    process = subprocess.Popen([sys.executable, "-m", "convert_weights", *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not any(
        path.name.endswith("out.safetensors") and path.stat().st_size > 1_000_000 for path in tmp_path.iterdir()
    ):
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, b"interrupted\n")
    assert tree(tmp_path, but=None) == before
