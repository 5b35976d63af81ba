"""Weights files are read back bit for bit, and every file that does not fit is refused in one line."""

import hashlib
import os

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxla
from jaxla import InputError
from jaxla.config import command_line_wording
from jaxla.models.backbones import VARIANTS, build_backbone
from jaxla.models.weights import load_parameters, parameter_shapes, weights_file
from jaxla.models.weights_format import open_atomically, read_metadata, require_undamaged, save_weights
from tests.tiny import flat_arrays, tiny_backbone

pytestmark = pytest.mark.usefixtures("fast_compilation")

METADATA = {
    "arch": "vit_mini8",
    "source": "mini.pth",
    "source_sha256": "0" * 64,
    "licence": "none",
}


@pytest.fixture(scope="module")
def mini():
    """A small registered architecture with random parameters."""
    return tiny_backbone(variant=VARIANTS["vit_mini8"])


@pytest.fixture
def mini_file(mini, tmp_path):
    path = tmp_path / "mini.safetensors"
    save_weights(path, flat_arrays(mini), METADATA)
    return path


def refusal(call, *words):
    """Return the message of the InputError that `call` raises, after checking that it contains all of `words`."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert not [str(word) for word in words if str(word) not in message], message
    return message


def rewrite(path, change):
    """Change the arrays of a file, and keep its metadata."""
    arrays, metadata = load_file(path), read_metadata(path)
    change(arrays)
    save_file(arrays, path, metadata=metadata)
    return path


# --- the round trip ---


def test_saved_weights_are_read_back_bit_for_bit(mini, mini_file):
    loaded = jaxla.load_backbone(mini_file)
    before, after = flat_arrays(mini), flat_arrays(loaded)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, strict=True)
    assert loaded.variant == VARIANTS["vit_mini8"]

    images = np.random.default_rng(0).standard_normal((1, 48, 64, 3), dtype=np.float32)
    np.testing.assert_array_equal(loaded(images).patches, mini(images).patches)


def test_saved_metadata_are_read_back(mini_file):
    assert read_metadata(mini_file) == {"format": "jaxla-1", **METADATA}


def test_file_contains_exactly_the_networks_parameters(mini, mini_file):
    shapes = {name: array.shape for name, array in load_file(mini_file).items()}
    assert shapes == parameter_shapes(mini)
    assert shapes["blocks.attention.qkv.kernel"] == (4, 128, 384)
    assert shapes["pos_grid"] == (12, 12, 128)


def test_writing_leaves_no_other_file(mini_file):
    assert [path.name for path in mini_file.parent.iterdir()] == ["mini.safetensors"]


def test_error_names_a_file_that_cannot_be_written(mini, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.safetensors"
    refusal(lambda: save_weights(path, flat_arrays(mini), METADATA), path, "cannot be written", "choose another file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_writers_of_one_file_do_not_interfere(tmp_path):
    path = tmp_path / "x"
    with open_atomically(path) as first:
        first.write(b"first")
        with open_atomically(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- files that do not fit ---


def test_error_names_a_missing_parameter(mini_file):
    rewrite(mini_file, lambda arrays: arrays.pop("blocks.mlp.expand.bias"))
    refusal(
        lambda: jaxla.load_backbone(mini_file), mini_file, "lacks 1 parameter", "vit_mini8", "blocks.mlp.expand.bias"
    )


def test_error_names_an_unexpected_parameter(mini_file):
    rewrite(mini_file, lambda arrays: arrays.update(head=np.zeros(3, np.float32)))
    refusal(lambda: jaxla.load_backbone(mini_file), mini_file, "contains 1 parameter", "vit_mini8", "head")


def test_error_names_the_wrong_and_the_expected_shape(mini_file):
    rewrite(mini_file, lambda arrays: arrays.update(pos_cls=np.zeros((1, 128), np.float32)))
    refusal(lambda: jaxla.load_backbone(mini_file), mini_file, "pos_cls", "(1, 128)", "(128,)")


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "F16"), (np.float64, "F64")])
def test_error_names_a_wrong_dtype(mini_file, dtype, name):
    rewrite(mini_file, lambda arrays: arrays.update(pos_cls=arrays["pos_cls"].astype(dtype)))
    message = refusal(lambda: jaxla.load_backbone(mini_file))
    assert message == f"{mini_file}: pos_cls has dtype {name}, not F32. Convert the checkpoint again."


def test_wrong_architecture_is_refused(mini_file):
    abstract = nnx.eval_shape(lambda: build_backbone("dinov2_vits14", rngs=nnx.Rngs(0)))
    message = refusal(
        lambda: load_parameters(abstract, mini_file, "dinov2_vits14"),
        f"{mini_file}: contains vit_mini8, not dinov2_vits14. Use model.arch=vit_mini8 or a weights file of "
        "dinov2_vits14.",
    )
    assert message == refusal(lambda: weights_file("dinov2_vits14", str(mini_file)))
    # no method supports both architectures, so changing model.arch is not suggested
    words = "contains vit_mini8, not vgg16_bn. Use a weights file of vgg16_bn."
    refusal(lambda: weights_file("vgg16_bn", str(mini_file)), words)


@pytest.mark.parametrize("weights", ["imagenet", "Random", "runs"])
def test_value_that_is_not_a_file_name_is_refused(weights):
    refusal(lambda: weights_file("resnet50", weights), f"model.weights={weights}: not the name of a .safetensors file")


def test_unknown_architecture_is_refused(mini, tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, flat_arrays(mini), {**METADATA, "arch": "dinov2_vits41"})
    refusal(lambda: jaxla.load_backbone(path), path, "'dinov2_vits41', which is not a backbone", "use load_network")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_file_is_refused(mini_file, kept):
    mini_file.write_bytes(mini_file.read_bytes()[:kept])
    refusal(lambda: jaxla.load_backbone(mini_file), mini_file, "truncated, or not a safetensors file", "again")


def test_file_with_different_content_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("<!DOCTYPE html><html><body>404: Not found</body></html>")
    refusal(lambda: jaxla.load_backbone(path), path, "not a safetensors file")


def test_foreign_safetensors_file_is_refused(mini, tmp_path):
    path = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "jaxla-1"}, {"arch": "vit_mini8"}):
        save_file(flat_arrays(mini), path, metadata=metadata)
        message = refusal(lambda: jaxla.load_backbone(path))
        assert message == (
            f"{path}: not written by convert_weights. If it is a released checkpoint, convert it: "
            f"`python -m convert_weights --arch=ARCH --source={path}`."
        )


def test_error_for_a_missing_file_states_the_command_that_creates_it(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path / f"{300 * 'a'}.safetensors"):
        refusal(
            lambda path=path: jaxla.load_backbone(path),
            f"{path}: no such weights file. Where torch is installed, run "
            f"`python -m convert_weights --arch=ARCH --source=CHECKPOINT --output={path}`.",
        )
    refusal(lambda: jaxla.load_backbone(tmp_path), tmp_path, "is a folder. Pass the .safetensors file in it.")


# --- where weights are found ---


def test_default_weights_are_in_the_cache_folder(mini, tmp_path):
    path = tmp_path / "weights" / "dinov2_vitb14.safetensors"
    refusal(
        lambda: weights_file("dinov2_vitb14", "", tmp_path),
        f"{path}: weights of dinov2_vitb14 not found. Where torch is installed, run `python -m convert_weights "
        f"--arch=dinov2_vitb14 --download --output={path}`. Or use model.weights=FILE, or model.weights=random for an "
        "untrained backbone.",
    )
    path = path.with_stem("vit_mini8")
    save_weights(path, flat_arrays(mini), METADATA)
    assert weights_file("vit_mini8", "", tmp_path) == path


def test_error_for_missing_dinov3_weights_names_their_licence(tmp_path):
    path = tmp_path / "the weights" / "dinov3_vitb16.safetensors"
    refusal(
        lambda: weights_file("dinov3_vitb16", str(path)),
        f"--arch=dinov3_vitb16 --source=CHECKPOINT --output='{path}'` with the CHECKPOINT from "
        "https://ai.meta.com/dinov3/, where you accept the licence. Or use model.weights=FILE",
    )


def test_error_for_an_architecture_without_released_weights_does_not_suggest_conversion(tmp_path):
    for weights in ("", str(tmp_path / "mine.safetensors")):
        message = refusal(
            lambda weights=weights: weights_file("vit_mini8", weights, tmp_path),
            "weights of vit_mini8 not found.",
            "No weights were released. Or use model.weights=FILE, or model.weights=random",
        )
        assert "convert_weights" not in message


def test_pretrained_method_never_falls_back_to_random_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "jaxla" / "weights" / "dinov2_vitb14.safetensors"
    refusal(
        lambda: jaxla.build_network("dinov2_vitb14"),
        f"{path}: weights of dinov2_vitb14 not found",
        "convert_weights --arch=dinov2_vitb14",
    )


def test_command_and_notebook_name_the_option_differently(tmp_path):
    path = tmp_path / "none.safetensors"
    refusal(lambda: weights_file("vit_mini8", str(path)), " model.weights=random ")
    with command_line_wording():
        refusal(lambda: weights_file("vit_mini8", str(path)), " --model.weights=random ")


# --- checksums ---


def test_an_unchanged_file_is_hashed_once_and_a_changed_file_again(mini_file, monkeypatch):
    hashed = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: hashed.append(1) or file_digest(*arguments))
    link = mini_file.with_name("link.safetensors")
    link.symlink_to(mini_file)
    checksum = require_undamaged(mini_file)
    assert require_undamaged(mini_file) == require_undamaged(link) == checksum
    assert len(hashed) == 1

    content = bytearray(mini_file.read_bytes())
    content[-1] ^= 1
    mini_file.write_bytes(content)
    os.utime(mini_file, ns=(0, mini_file.stat().st_mtime_ns + 1))
    refusal(lambda: require_undamaged(mini_file), f"{mini_file}: damaged: the sha256 of its data is ", checksum)
    assert len(hashed) == 2


# --- networks by name ---


@pytest.fixture(scope="module")
def quickstart_networks():
    options = {"a": {"seed": 1}, "again": {"seed": 1}, "b": {"seed": 2, "classes": 3}}
    return {key: jaxla.build_network("vit_mini8", **arguments) for key, arguments in options.items()}


def test_random_parameters_depend_only_on_the_seed(quickstart_networks):
    a, again, b = (flat_arrays(quickstart_networks[key]) for key in ("a", "again", "b"))
    for name, array in a.items():
        np.testing.assert_array_equal(array, again[name])
        if name != "decoder.logits.kernel" and (name.endswith("kernel") or name.startswith("backbone.pos")):
            assert np.mean(array == b[name]) < 0.01, name


def test_network_maps_grey_and_colour_images_to_logits(quickstart_networks):
    network = quickstart_networks["a"]
    shapes = {(2, 96, 96, 1): (2, 96, 96, 1), (1, 48, 64, 3): (1, 48, 64, 1)}
    for shape, expected in shapes.items():
        assert jax.eval_shape(network, jax.ShapeDtypeStruct(shape, np.float32)).shape == expected


def test_several_classes_give_several_logits(quickstart_networks):
    image = jax.ShapeDtypeStruct((1, 96, 96, 1), np.float32)
    assert jax.eval_shape(quickstart_networks["b"], image).shape == (1, 96, 96, 3)


def test_released_architecture_can_use_random_weights():
    network = jaxla.build_network("dinov2_vits14", weights="random")
    count = sum(array.size for name, array in flat_arrays(network).items() if name.startswith("backbone"))
    assert count == 22_056_576 - 384  # the released model without its mask token
    assert jax.eval_shape(network, jax.ShapeDtypeStruct((1, 28, 42, 1), np.float32)).shape == (1, 28, 42, 1)


def test_network_uses_the_backbone_of_a_file(mini, mini_file):
    network = jaxla.build_network("vit_mini8", weights=mini_file)
    for name, array in flat_arrays(mini).items():
        np.testing.assert_array_equal(flat_arrays(network.backbone)[name], array)


@pytest.mark.parametrize(("name", "nearest"), [("vit_mini", "vit_mini8"), ("dinov2_vitb_14", "dinov2_vitb14")])
def test_error_for_an_unknown_method_names_the_nearest(name, nearest):
    refusal(lambda: jaxla.build_network(name), "method", name, f"(did you mean {nearest}?)")
