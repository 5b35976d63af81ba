"""Weights files: written and read back to the bit, and every file that does not fit is refused by name."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxla
from jaxla import InputError
from jaxla.models.backbones import VARIANTS, build_backbone
from jaxla.models.weights import load_into, parameter_shapes, weights_file
from jaxla.models.weights_format import read_metadata, save_weights, writing
from tests.tiny import flat_arrays, tiny_backbone

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
    """Assert that `call` raises an InputError of one line that holds all of `words`."""
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert not [str(word) for word in words if str(word) not in message], message
    return message


def rewritten(path, change):
    """The file with its arrays changed, under the same metadata."""
    arrays, metadata = load_file(path), read_metadata(path)
    change(arrays)
    save_file(arrays, path, metadata=metadata)
    return path


# --- the round trip ---


def test_saved_weights_come_back_to_the_bit(mini, mini_file):
    loaded = jaxla.load_backbone(mini_file)
    before, after = flat_arrays(mini), flat_arrays(loaded)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, strict=True)
    assert loaded.variant == VARIANTS["vit_mini8"]

    images = np.random.default_rng(0).standard_normal((1, 48, 64, 3), dtype=np.float32)
    np.testing.assert_array_equal(loaded(images).patches, mini(images).patches)


def test_metadata_comes_back(mini_file):
    assert read_metadata(mini_file) == {"format": "jaxla-1", **METADATA}


def test_a_file_holds_exactly_the_named_parameters(mini, mini_file):
    shapes = {name: array.shape for name, array in load_file(mini_file).items()}
    assert shapes == parameter_shapes(mini)
    assert shapes["blocks.attention.qkv.kernel"] == (4, 128, 384)
    assert shapes["pos_grid"] == (12, 12, 128)


def test_writing_leaves_no_other_file(mini_file):
    assert [path.name for path in mini_file.parent.iterdir()] == ["mini.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(mini, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.safetensors"
    refusal(lambda: save_weights(path, flat_arrays(mini), METADATA), path, "cannot be written", "choose another place")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with writing(path) as first:
        first.write(b"first")
        with writing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- files that do not fit ---


def test_a_missing_parameter_is_named(mini_file):
    rewritten(mini_file, lambda arrays: arrays.pop("blocks.mlp.expand.bias"))
    refusal(
        lambda: jaxla.load_backbone(mini_file), mini_file, "lacks 1 parameter", "vit_mini8", "blocks.mlp.expand.bias"
    )


def test_an_extra_parameter_is_named(mini_file):
    rewritten(mini_file, lambda arrays: arrays.update(head=np.zeros(3, np.float32)))
    refusal(lambda: jaxla.load_backbone(mini_file), mini_file, "has 1 parameter", "vit_mini8", "head")


def test_a_parameter_of_wrong_shape_is_named_with_both_shapes(mini_file):
    rewritten(mini_file, lambda arrays: arrays.update(pos_cls=np.zeros((1, 128), np.float32)))
    refusal(lambda: jaxla.load_backbone(mini_file), mini_file, "pos_cls", "(1, 128)", "(128,)")


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "F16"), (np.float64, "F64")])
def test_a_parameter_of_another_dtype_is_named(mini_file, dtype, name):
    rewritten(mini_file, lambda arrays: arrays.update(pos_cls=arrays["pos_cls"].astype(dtype)))
    message = refusal(lambda: jaxla.load_backbone(mini_file))
    assert message == f"{mini_file}: pos_cls is {name}, not F32 as it was written; convert it again"


def test_another_architecture_than_asked_for_is_refused(mini_file):
    abstract = nnx.eval_shape(lambda: build_backbone("dinov2_vits14", rngs=nnx.Rngs(0)))
    message = refusal(
        lambda: load_into(abstract, mini_file, "dinov2_vits14"),
        f"{mini_file}: holds vit_mini8, not dinov2_vits14; pass --model.arch=vit_mini8, or a file of dinov2_vits14",
    )
    assert message == refusal(lambda: weights_file("dinov2_vits14", str(mini_file)))
    # no method can be built on either
    refusal(lambda: weights_file("vgg16_bn", str(mini_file)), "holds vit_mini8, not vgg16_bn; pass a file of vgg16_bn")


@pytest.mark.parametrize("weights", ["imagenet", "Random", "runs"])
def test_what_is_no_weights_file_by_its_name_is_refused(weights):
    refusal(
        lambda: weights_file("resnet50", weights), f"--model.weights={weights}: not the name of a .safetensors file"
    )


def test_an_architecture_unknown_here_is_refused_with_the_nearest(mini, tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, flat_arrays(mini), {**METADATA, "arch": "dinov2_vits41"})
    refusal(lambda: jaxla.load_backbone(path), path, "dinov2_vits41", "unknown", "did you mean dinov2_vits14?")


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_is_refused(mini_file, kept):
    mini_file.write_bytes(mini_file.read_bytes()[:kept])
    refusal(lambda: jaxla.load_backbone(mini_file), mini_file, "truncated, or not a safetensors file", "again")


def test_something_else_under_that_name_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("<!DOCTYPE html><html><body>404: Not found</body></html>")
    refusal(lambda: jaxla.load_backbone(path), path, "not a safetensors file")


def test_a_foreign_safetensors_file_is_refused(mini, tmp_path):
    path = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "jaxla-1"}, {"arch": "vit_mini8"}):
        save_file(flat_arrays(mini), path, metadata=metadata)
        message = refusal(lambda: jaxla.load_backbone(path))
        assert message == (
            f"{path}: not written by convert_weights; if it is a released checkpoint, convert it: python -m "
            f"convert_weights --arch=ARCH --source={path}"
        )


def test_a_file_that_does_not_exist_is_refused_with_the_command_that_makes_it(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path / f"{300 * 'a'}.safetensors"):
        refusal(
            lambda path=path: jaxla.load_backbone(path),
            f"{path}: no such weights file; make it, where torch is installed, with: "
            f"python -m convert_weights --arch=ARCH --source=CHECKPOINT "
            f"--output={path}",
        )
    refusal(lambda: jaxla.load_backbone(tmp_path), tmp_path, "is a folder; give the .safetensors file in it")


# --- where weights are looked for ---


def test_default_weights_lie_in_the_cache_folder(mini, tmp_path):
    path = tmp_path / "weights" / "dinov2_vitb14.safetensors"
    refusal(
        lambda: weights_file("dinov2_vitb14", "", tmp_path),
        f"looked for {path}",
        f"python -m convert_weights --arch=dinov2_vitb14 --download --output={path}, or",
        "--model.weights=FILE",
        "--model.weights=random",
    )
    path = path.with_stem("vit_mini8")
    save_weights(path, flat_arrays(mini), METADATA)
    assert weights_file("vit_mini8", "", tmp_path) == path


def test_what_is_never_downloaded_names_its_licence(tmp_path):
    path = tmp_path / "the weights" / "dinov3_vitb16.safetensors"
    refusal(
        lambda: weights_file("dinov3_vitb16", str(path)),
        f"--arch=dinov3_vitb16 --source=CHECKPOINT --output='{path}' (CHECKPOINT: what you download once you have "
        "accepted the licence at https://ai.meta.com/dinov3/), or pass --model.weights=FILE",
    )


def test_an_architecture_without_released_weights_says_so(tmp_path):
    for weights in ("", str(tmp_path / "mine.safetensors")):
        message = refusal(
            lambda weights=weights: weights_file("vit_mini8", weights, tmp_path),
            "weights of vit_mini8 are missing",
            "none were released: pass --model.weights=FILE, or --model.weights=random",
        )
        assert "convert_weights" not in message


def test_a_pretrained_method_without_its_weights_is_never_started_from_random(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "jaxla" / "weights" / "dinov2_vitb14.safetensors"
    refusal(lambda: jaxla.build_network("dinov2_vitb14"), f"looked for {path}", "convert_weights --arch=dinov2_vitb14")


# --- networks by name ---


@pytest.fixture(scope="module")
def quickstart_networks():
    options = {"a": {"seed": 1}, "again": {"seed": 1}, "b": {"seed": 2, "classes": 3}}
    return {key: jaxla.build_network("vit_mini8", **named) for key, named in options.items()}


def test_random_parameters_repeat_with_the_seed_and_differ_without(quickstart_networks):
    a, again, b = (flat_arrays(quickstart_networks[key]) for key in ("a", "again", "b"))
    for name, array in a.items():
        np.testing.assert_array_equal(array, again[name])
        if name != "decoder.logits.kernel" and (name.endswith("kernel") or name.startswith("backbone.pos")):
            assert np.mean(array == b[name]) < 0.01, name


def test_quickstart_network_maps_grey_and_colour_images_to_logits(quickstart_networks):
    network = quickstart_networks["a"]
    shapes = {(2, 96, 96, 1): (2, 96, 96, 1), (1, 48, 64, 3): (1, 48, 64, 1)}
    for shape, expected in shapes.items():
        assert jax.eval_shape(network, jax.ShapeDtypeStruct(shape, np.float32)).shape == expected


def test_several_classes_are_several_logits(quickstart_networks):
    image = jax.ShapeDtypeStruct((1, 96, 96, 1), np.float32)
    assert jax.eval_shape(quickstart_networks["b"], image).shape == (1, 96, 96, 3)


def test_released_architecture_can_start_from_random_weights():
    network = jaxla.build_network("dinov2_vits14", weights="random")
    count = sum(array.size for name, array in flat_arrays(network).items() if name.startswith("backbone"))
    assert count == 22_056_576 - 384  # the released model's, without its mask token
    assert jax.eval_shape(network, jax.ShapeDtypeStruct((1, 28, 42, 1), np.float32)).shape == (1, 28, 42, 1)


def test_network_is_built_with_the_backbone_of_a_file(mini, mini_file):
    network = jaxla.build_network("vit_mini8", weights=mini_file)
    for name, array in flat_arrays(mini).items():
        np.testing.assert_array_equal(flat_arrays(network.backbone)[name], array)


@pytest.mark.parametrize(("name", "nearest"), [("vit_mini", "vit_mini8"), ("dinov2_vitb_14", "dinov2_vitb14")])
def test_unknown_method_names_the_nearest(name, nearest):
    refusal(lambda: jaxla.build_network(name), f"method {name!r} is unknown", f"did you mean {nearest}?")
