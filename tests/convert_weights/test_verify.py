"""--verify compares a file with its checksum and runs its network."""

import json

import pytest
import torch
from safetensors.numpy import save_file

from jaxla import InputError, load_backbone
from jaxla.models.weights_format import require_undamaged
from tests.convert_weights.command import empty_state, read_weights, refuse, succeed, write_converted


@pytest.fixture
def mini(tmp_path):
    return write_converted(tmp_path / "mini.safetensors")


def test_existing_file_is_verified(mini):
    checksum = read_weights(mini)[1]["data_sha256"]
    features = 128 * (1 + 14 * 14)  # channels of the class token and of each 8 × 8 patch
    assert succeed("--verify", f"--output={mini}") == (
        f"{mini}: verified: the data match their sha256 {checksum}; "
        f"the {features} features of one 112×112 image are finite\n"
    )


def test_new_file_is_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.save(empty_state("dinov2_vits14"), tmp_path / "source.pth")
    printed = succeed("--arch=dinov2_vits14", f"--source={tmp_path / 'source.pth'}", "--verify")
    path = tmp_path / "jaxla" / "weights" / "dinov2_vits14.safetensors"
    assert printed.splitlines()[-1].startswith(f"{path}: verified: the data match their sha256 ")


@pytest.mark.parametrize("position", [-1, -5000, 100_000], ids=["last byte", "near the end", "in the middle"])
def test_one_flipped_bit_is_found(mini, position):
    content = bytearray(mini.read_bytes())
    content[position] ^= 1
    mini.write_bytes(content)
    assert refuse(mini.parent, "--verify", f"--output={mini}").startswith(
        f"{mini}: damaged: the sha256 of its data is "
    )


def edit_header(path, edit):
    """Apply `edit` to the header of a file, parsed from JSON; the data stay the same."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def swap_two_tensors(header):
    first, second = header["blocks.norm1.bias"], header["blocks.norm2.bias"]
    assert first["shape"] == second["shape"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


HEADER_EDITS = {
    "swapped tensors": swap_two_tensors,
    "the source": lambda header: header["__metadata__"].update(source="https://example.org/model.pth"),
    "the licence": lambda header: header["__metadata__"].update(licence="public domain"),
    "an additional entry": lambda header: header["__metadata__"].update(note=""),
    "the checksum": lambda header: header["__metadata__"].update(header_sha256="0" * 64),
}


@pytest.mark.parametrize("kind", HEADER_EDITS)
def test_a_changed_header_is_found(mini, kind):
    edit_header(mini, HEADER_EDITS[kind])
    assert refuse(mini.parent, "--verify", f"--output={mini}") == (
        f"{mini}: damaged: the names or positions of the arrays, or the metadata, have changed since the file was "
        "written. Convert the checkpoint again."
    )


def test_a_file_of_an_earlier_version_is_verified_without_its_header(mini):
    checksum = require_undamaged(mini)
    edit_header(mini, lambda header: header["__metadata__"].pop("header_sha256"))
    assert require_undamaged(mini) == checksum
    assert (
        "; the sha256 does not cover tensor names and metadata, because an earlier version wrote the file ("
        in succeed("--verify", f"--output={mini}")
    )


def test_weights_that_overflow_are_refused(tmp_path):
    path = write_converted(tmp_path / "mini.safetensors", scale=1e30)
    assert "the features of a test image are not finite" in refuse(tmp_path, "--verify", f"--output={path}")


def test_wrong_architecture_is_refused(mini):
    line = refuse(mini.parent, "--verify", f"--output={mini}", "--arch=dinov2_vits14")
    assert line == f"{mini}: contains vit_mini8, not dinov2_vits14. Remove --arch."
    assert "verified" in succeed("--verify", f"--output={mini}", "--arch=vit_mini8")  # although it was never released


def test_file_without_a_checksum_is_refused(mini):
    arrays, metadata = read_weights(mini)
    del metadata["data_sha256"]
    save_file(arrays, mini, metadata)
    line = refuse(mini.parent, "--verify", f"--output={mini}")
    assert line == f"{mini}: contains no checksum of its data. Convert the checkpoint again."


def test_verify_needs_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "--verify: needs a converted file. Pass --output=" in refuse(tmp_path, "--verify")
    missing = tmp_path / "jaxla" / "weights" / "resnet50.safetensors"
    assert refuse(tmp_path, "--verify", "--arch=resnet50") == (
        f"{missing}: no such weights file. Where torch is installed, run "
        f"`python -m convert_weights --arch=resnet50 --download --output={missing}`."
    )


def test_architecture_in_place_of_a_file_names_the_command_that_creates_it():
    with pytest.raises(InputError) as error:
        load_backbone("dinov2_vits14_reg")
    assert str(error.value) == (
        "dinov2_vits14_reg: no such weights file. Where torch is installed, run `python -m convert_weights "
        "--arch=dinov2_vits14_reg --download`. Then pass the .safetensors file that it writes."
    )
