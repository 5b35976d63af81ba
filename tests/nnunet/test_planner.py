"""The planner against nnU-Net's: its plan files, and the plans that nnunetv2 2.8.1 makes for random scans."""

import json
from pathlib import Path

import pytest

from jaxla.config import InputError
from jaxla.nnunet.plan import (
    Fingerprint,
    fingerprint_from_json,
    plan_from_json,
    plan_to_json,
    read_fingerprint,
    read_plan,
    write_plan,
)
from jaxla.nnunet.planner import make_plan, plan_topology

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted((GOLDEN / "nnunet_plans").glob("*.json"))
RANDOM = json.loads((GOLDEN / "nnunet_plans_of_random_scans.json").read_text())


def to_json(content):
    return json.loads(json.dumps(content))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_plans_equal_nnunet(path):
    expected = json.loads(path.read_text())
    assert to_json(plan_to_json(make_plan(read_fingerprint(path), class_count=2))) == expected
    assert to_json(plan_to_json(read_plan(path))) == expected


@pytest.mark.parametrize("number", range(len(RANDOM)))
def test_plans_of_random_scans_equal_nnunet(number):
    """One to six scans with any spacing and axes, for several GPUs and numbers of classes."""
    expected = RANDOM[number]
    plan = make_plan(fingerprint_from_json(expected["fingerprint"]), expected["classes"], expected["memory_gb"])
    content = to_json(plan_to_json(plan))
    configurations = expected["configurations"]
    configurations.get("3d_lowres", {}).pop("next_stage", None)
    assert content["configurations"] == configurations
    for name in ("median_spacing", "median_shape", "transpose_forward"):
        assert content[name] == expected[name]
    assert plan.use_mask_for_norm == expected["use_mask_for_norm"]
    assert to_json(plan_to_json(plan_from_json(content, "it"))) == content


def test_random_scans_cover_every_branch_of_the_planner():
    planned = [set(scan["configurations"]) for scan in RANDOM]
    assert any("3d_lowres" in names for names in planned)
    assert any("3d_fullres" in names and "3d_lowres" not in names for names in planned)
    assert any(scan["use_mask_for_norm"] for scan in RANDOM)
    assert any(scan["transpose_forward"] != [0, 1, 2] for scan in RANDOM)


def test_single_slices_are_planned_only_in_2d():
    plan = make_plan(fingerprint_from_json({"spacings": [[1, 1, 1]] * 3, "shapes_after_crop": [[1, 64, 80]] * 3}), 2)
    assert list(plan.configurations) == ["2d"]


def test_less_memory_gives_smaller_patches():
    found = read_fingerprint(GOLDEN / "nnunet_plans" / "LAlike.json")
    large, small = (make_plan(found, 2, gb).configurations["3d_fullres"].patch_size for gb in (8, 2))
    assert small[0] * small[1] * small[2] < large[0] * large[1] * large[2] / 2


def test_topology_halves_fine_axes_first():
    """Pixels of 1 mm are halved first; once they are 2 mm, slices of 3 mm are halved with them."""
    found = plan_topology((3.0, 1.0, 1.0), (16, 64, 64))
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert found.kernel_sizes == ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert (found.patch_size, found.multiples) == ((16, 64, 64), (4, 16, 16))
    assert plan_topology((1.0, 1.0), (17, 30)).patch_size == (20, 32)


def make_nnunet_configuration(name, configuration, **more):
    """Return a configuration in the layout of nnUNetPlans.json, version 2.4 and later."""
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {key: value for key, value in configuration.items() if key not in DATA_KEYS}
        | {"conv_op": "torch.nn.modules.conv.Conv2d"},
        "_kw_requires_import": ["conv_op"],
    }
    data = {key: configuration[key] for key in DATA_KEYS}
    schemes = {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
    return {name: data | {"architecture": network, "data_identifier": "nnUNetPlans_2d"} | schemes | more}


DATA_KEYS = ("batch_size", "patch_size", "median_image_size_in_voxels", "spacing", "batch_dice")


def make_nnunet_file(configurations):
    return {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [36, 50, 35],
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
    }


def test_nnunets_plan_files_are_read():
    ours = json.loads((GOLDEN / "nnunet_plans" / "Hippocampus.json").read_text())
    planned = ours["configurations"]["2d"]
    plan = plan_from_json(make_nnunet_file(make_nnunet_configuration("2d", planned)), "it")
    assert to_json(plan.configurations["2d"]._asdict()) == planned
    assert plan.fingerprint is None

    older = {key: planned[key] for key in DATA_KEYS} | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 512,
        "pool_op_kernel_sizes": planned["strides"],
        "conv_kernel_sizes": planned["kernel_sizes"],
        "n_conv_per_stage_encoder": planned["n_conv_per_stage"],
        "n_conv_per_stage_decoder": planned["n_conv_per_stage_decoder"],
    }
    assert plan_from_json(make_nnunet_file({"2d": older}), "it").configurations == plan.configurations

    heir = {"inherits_from": "2d", "batch_size": 7}
    inherited = plan_from_json(make_nnunet_file(make_nnunet_configuration("2d", planned) | {"2d_small": heir}), "it")
    assert inherited.configurations["2d_small"] == plan.configurations["2d"]._replace(batch_size=7)

    masked = plan_from_json(make_nnunet_file(make_nnunet_configuration("2d", planned, use_mask_for_norm=[True])), "it")
    assert masked.use_mask_for_norm
    assert not plan.use_mask_for_norm
    ct = plan_from_json(
        make_nnunet_file(make_nnunet_configuration("2d", planned, normalization_schemes=["CTNormalization"])), "it"
    )
    assert ct.normalisation == "CTNormalization"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonlin", "torch.nn.ReLU"),
        ("nonlin_kwargs", {"inplace": True, "negative_slope": 0.2}),
        ("dropout_op", "torch.nn.Dropout3d"),
        ("norm_op_kwargs", {"eps": 1e-3, "affine": True}),
        ("conv_bias", False),
    ],
)
def test_unsupported_layers_are_refused_by_name(name, value):
    """The parameters would fit, but the logits would differ."""
    planned = json.loads((GOLDEN / "nnunet_plans" / "Hippocampus.json").read_text())["configurations"]["2d"]
    content = make_nnunet_file(make_nnunet_configuration("2d", planned))
    arguments = content["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arguments |= {"nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}, "dropout_op": None}
    arguments |= {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "conv_bias": True}
    plan_from_json(content, "it")
    arguments[name] = value
    with pytest.raises(
        InputError, match=rf"it: {name} .* is not supported, only .* Use a plan of nnU-Net's default planner\."
    ):
        plan_from_json(content, "it")


def make_2d_plan(**values):
    content = json.loads((GOLDEN / "nnunet_plans" / "Hippocampus.json").read_text())
    content["configurations"] = {"2d": content["configurations"]["2d"] | values}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it: not a plan"),
        ({"configurations": {}}, "it: not a plan"),
        (make_2d_plan(patch_size=[56, 41]), "the strides do not divide the patch [56, 41]"),
        (make_2d_plan(features_per_stage=[32, 64, 128]), "features_per_stage has 3 entries, not 4"),
        (make_2d_plan(spacing=[1.0, 0.0]), "the spacing is [1.0, 0.0]"),
        (make_2d_plan(kernel_sizes=[[3, 3], [3, 3], [2, 3], [3, 3]]), "a kernel has an even side"),
        (make_2d_plan(strides=[[2, 2], [2, 2], [2, 2], [1, 1]]), "the first stage has a stride"),
        (make_2d_plan(strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]), "strides do not have the patch's 2 axes"),
        (make_2d_plan(batch_size=0), "must be positive integers"),
        (make_2d_plan(batch_size="2"), "it: not a plan (batch_size: Expected `int`, got `str`)"),
        (
            make_2d_plan(patch_size=[56], median_image_size_in_voxels=[50]),
            "cannot be built: the patch has 1 axes and the network 4 stages",
        ),
        (make_2d_plan(median_image_size_in_voxels=[50, 0]), "the median image size is [50, 0]"),
        (make_2d_plan(median_image_size_in_voxels=5), "it: not a plan"),
        (make_2d_plan(features_per_stage=32), "it: not a plan"),
        (make_2d_plan(patch_size=64), "it: not a plan"),
        (make_2d_plan(n_stages="4"), "it: not a plan"),
        (make_2d_plan(strides=[1, 2, 2, 2]), "it: not a plan"),
        (
            make_nnunet_file(
                {"2d": {**make_2d_plan()["configurations"]["2d"], "architecture": {"network_class_name": "a.ResEnc"}}}
            ),
            "network ResEnc is not supported, only PlainConvUNet",
        ),
        (make_nnunet_file({"2d": {"inherits_from": "2d"}}), "2d inherits from itself"),
    ],
)
def test_invalid_plan_is_refused_in_one_line(content, message):
    with pytest.raises(InputError) as refused:
        plan_from_json(content, "it").configuration("2d", "it")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a fingerprint"),
        ('{"spacings": [[1, 1, 1]], "shapes_after_crop": []}', "of the same cases"),
        ('{"spacings": [[1, 0, 1]], "shapes_after_crop": [[4, 4, 4]]}', "case 0 has the spacing [1.0, 0.0, 1.0]"),
        ('{"spacings": [[1, 1, 1]], "shapes_after_crop": [[4, -4, 4]]}', "case 0 has the shape [4, -4, 4]"),
        ('{"spacings": [[1, NaN, 1]], "shapes_after_crop": [[4, 4, 4]]}', "case 0 has the spacing [1.0, nan, 1.0]"),
    ],
)
def test_invalid_fingerprint_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "fingerprint.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_fingerprint(path)
    assert str(refused.value).startswith(str(path))
    assert message in str(refused.value)


def test_missing_configuration_is_named(tmp_path):
    write_plan(tmp_path / "plan.json", plan_from_json(make_2d_plan(), "it"))
    with pytest.raises(InputError, match=r"^the plan: no configuration 3d_fullres, only 2d"):
        read_plan(tmp_path / "plan.json").configuration("3d_fullres")


def test_plan_of_tiny_scans_is_read_but_cannot_be_built(tmp_path):
    """nnU-Net plans a network of one stage, without a decoder."""
    plan = make_plan(Fingerprint(((1.0, 1.0, 1.0),) * 3, ((20, 7, 7),) * 3, 1.0), 2)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    with pytest.raises(
        InputError, match="configuration 2d cannot be built: the patch has 2 axes and the network 1 stages"
    ):
        plan.configuration("2d", "here")
