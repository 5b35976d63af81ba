"""The planner against nnU-Net's own: its files, and plans of random scans through nnunetv2 2.8.1."""

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
from jaxla.nnunet.planner import make_plan
from jaxla.nnunet.topology import topology

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted((GOLDEN / "nnunet_plans").glob("*.json"))
RANDOM = json.loads((GOLDEN / "nnunet_plans_of_random_scans.json").read_text())


def as_json(content):
    return json.loads(json.dumps(content))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_plans_are_nnunets_value_for_value(path):
    expected = json.loads(path.read_text())
    assert as_json(plan_to_json(make_plan(read_fingerprint(path), classes=2))) == expected
    assert as_json(plan_to_json(read_plan(path))) == expected  # and read back as they are


@pytest.mark.parametrize("number", range(len(RANDOM)))
def test_plans_of_random_scans_are_nnunets(number):
    """One to six scans, isotropic or not, in any order of axes, for several GPUs and numbers of classes."""
    expected = RANDOM[number]
    plan = make_plan(fingerprint_from_json(expected["fingerprint"]), expected["classes"], expected["memory_gb"])
    content = as_json(plan_to_json(plan))
    configurations = expected["configurations"]
    configurations.get("3d_lowres", {}).pop("next_stage", None)
    assert content["configurations"] == configurations
    for name in ("median_spacing", "median_shape", "transpose_forward"):
        assert content[name] == expected[name]
    assert plan.use_mask_for_norm == expected["use_mask_for_norm"]
    assert as_json(plan_to_json(plan_from_json(content, "it"))) == content


def test_random_scans_plan_every_configuration():
    """So that the test above sees all branches."""
    planned = [set(of_scan["configurations"]) for of_scan in RANDOM]
    assert any("3d_lowres" in of_scan for of_scan in planned)
    assert any("3d_fullres" in of_scan and "3d_lowres" not in of_scan for of_scan in planned)
    assert any(of_scan["use_mask_for_norm"] for of_scan in RANDOM)
    assert any(of_scan["transpose_forward"] != [0, 1, 2] for of_scan in RANDOM)


def test_single_slices_are_planned_in_two_dimensions_alone():
    plan = make_plan(fingerprint_from_json({"spacings": [[1, 1, 1]] * 3, "shapes_after_crop": [[1, 64, 80]] * 3}), 2)
    assert list(plan.configurations) == ["2d"]


def test_less_memory_makes_smaller_patches():
    found = read_fingerprint(GOLDEN / "nnunet_plans" / "LAlike.json")
    large, small = (make_plan(found, 2, gb).configurations["3d_fullres"].patch_size for gb in (8, 2))
    assert small[0] * small[1] * small[2] < large[0] * large[1] * large[2] / 2


def test_topology_halves_long_axes_first_and_convolves_them_alone():
    """By hand: 3 mm slices of 1 mm pixels are left alone until the pixels are 2 mm, then halved together."""
    found = topology((3.0, 1.0, 1.0), (16, 64, 64))
    assert found.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert found.kernel_sizes == ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert (found.patch_size, found.multiple) == ((16, 64, 64), (4, 16, 16))
    assert topology((1.0, 1.0), (17, 30)).patch_size == (20, 32)


def nnunets_own(name, c, **further):
    """A configuration as it stands in nnUNetPlans.json, of 2.4 and later."""
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {key: c[key] for key in c if key not in OF_DATA} | {"conv_op": "torch.nn.modules.conv.Conv2d"},
        "_kw_requires_import": ["conv_op"],
    }
    of_data = {key: c[key] for key in OF_DATA}
    schemes = {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
    return {name: of_data | {"architecture": network, "data_identifier": "nnUNetPlans_2d"} | schemes | further}


OF_DATA = ("batch_size", "patch_size", "median_image_size_in_voxels", "spacing", "batch_dice")


def nnunets_file(configurations):
    return {
        "dataset_name": "Dataset004_Hippocampus",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [36, 50, 35],
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
    }


def test_nnunets_own_files_are_read():
    ours = json.loads((GOLDEN / "nnunet_plans" / "Hippocampus.json").read_text())
    planned = ours["configurations"]["2d"]
    plan = plan_from_json(nnunets_file(nnunets_own("2d", planned)), "it")
    assert as_json(plan.configurations["2d"]._asdict()) == planned
    assert plan.fingerprint is None

    older = {key: planned[key] for key in OF_DATA} | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 512,
        "pool_op_kernel_sizes": planned["strides"],
        "conv_kernel_sizes": planned["kernel_sizes"],
        "n_conv_per_stage_encoder": planned["n_conv_per_stage"],
        "n_conv_per_stage_decoder": planned["n_conv_per_stage_decoder"],
    }
    assert plan_from_json(nnunets_file({"2d": older}), "it").configurations == plan.configurations

    heir = {"inherits_from": "2d", "batch_size": 7}
    inherited = plan_from_json(nnunets_file(nnunets_own("2d", planned) | {"2d_small": heir}), "it")
    assert inherited.configurations["2d_small"] == plan.configurations["2d"]._replace(batch_size=7)

    masked = plan_from_json(nnunets_file(nnunets_own("2d", planned, use_mask_for_norm=[True])), "it")
    assert masked.use_mask_for_norm
    assert not plan.use_mask_for_norm
    ct = plan_from_json(nnunets_file(nnunets_own("2d", planned, normalization_schemes=["CTNormalization"])), "it")
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
def test_networks_of_other_layers_are_refused_by_name(name, value):
    """Their shapes fit, and their logits would be others."""
    planned = json.loads((GOLDEN / "nnunet_plans" / "Hippocampus.json").read_text())["configurations"]["2d"]
    content = nnunets_file(nnunets_own("2d", planned))
    arguments = content["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arguments |= {"nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}, "dropout_op": None}
    arguments |= {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "conv_bias": True}
    plan_from_json(content, "it")
    arguments[name] = value
    with pytest.raises(InputError, match=f"it: plans {name} .*; this package has the default planner's"):
        plan_from_json(content, "it")


def changed(**values):
    content = json.loads((GOLDEN / "nnunet_plans" / "Hippocampus.json").read_text())
    content["configurations"] = {"2d": content["configurations"]["2d"] | values}
    return content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "it: not a plan"),
        ({"configurations": {}}, "it: not a plan"),
        (changed(patch_size=[56, 41]), "the strides do not divide the patch [56, 41]"),
        (changed(features_per_stage=[32, 64, 128]), "features_per_stage has 3 entries, not 4"),
        (changed(spacing=[1.0, 0.0]), "the spacing is [1.0, 0.0]"),
        (changed(kernel_sizes=[[3, 3], [3, 3], [2, 3], [3, 3]]), "a kernel has an even side"),
        (changed(strides=[[2, 2], [2, 2], [2, 2], [1, 1]]), "the first stage has a stride"),
        (changed(strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]), "strides are not of the patch's 2 axes"),
        (changed(batch_size=0), "must be whole numbers above 0"),
        (changed(batch_size="2"), "must be whole numbers above 0"),
        (changed(patch_size=[56], median_image_size_in_voxels=[50]), "cannot be built: a patch of 1 axes and 4 stages"),
        (changed(median_image_size_in_voxels=[50, 0]), "the median size of an image is [50, 0]"),
        (changed(median_image_size_in_voxels=5), "it: not a plan"),
        (changed(features_per_stage=32), "it: not a plan"),
        (changed(patch_size=64), "it: not a plan"),
        (changed(n_stages="4"), "it: not a plan"),
        (changed(strides=[1, 2, 2, 2]), "it: not a plan"),
        (
            nnunets_file(
                {"2d": {**changed()["configurations"]["2d"], "architecture": {"network_class_name": "a.ResEnc"}}}
            ),
            "plans the network a.ResEnc; this package has",
        ),
        (nnunets_file({"2d": {"inherits_from": "2d"}}), "2d inherits from itself"),
    ],
)
def test_what_is_no_plan_is_refused_in_a_line(content, says):
    with pytest.raises(InputError) as refused:
        plan_from_json(content, "it").configuration("2d", "it")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a fingerprint"),
        ('{"spacings": [[1, 1, 1]], "shapes_after_crop": []}', "of the same cases"),
        ('{"spacings": [[1, 0, 1]], "shapes_after_crop": [[4, 4, 4]]}', "case 0 has the spacing [1.0, 0.0, 1.0]"),
        ('{"spacings": [[1, 1, 1]], "shapes_after_crop": [[4, -4, 4]]}', "case 0 has the shape [4, -4, 4]"),
        ('{"spacings": [[1, NaN, 1]], "shapes_after_crop": [[4, 4, 4]]}', "case 0 has the spacing [1.0, nan, 1.0]"),
    ],
)
def test_what_is_no_fingerprint_is_refused_in_a_line(tmp_path, text, says):
    path = tmp_path / "fingerprint.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_fingerprint(path)
    assert str(refused.value).startswith(str(path))
    assert says in str(refused.value)


def test_a_configuration_that_was_not_planned_is_named(tmp_path):
    write_plan(tmp_path / "plan.json", plan_from_json(changed(), "it"))
    with pytest.raises(InputError, match=r"^the plan: has no configuration 3d_fullres; take 2d, which it has"):
        read_plan(tmp_path / "plan.json").configuration("3d_fullres")


def test_a_plan_of_very_small_scans_is_read_and_refused_where_no_network_can_be_built(tmp_path):
    """nnU-Net plans a network of one stage, which has no way up."""
    plan = make_plan(Fingerprint(((1.0, 1.0, 1.0),) * 3, ((20, 7, 7),) * 3, 1.0), 2)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    with pytest.raises(InputError, match="its configuration 2d cannot be built: a patch of 2 axes and 1 stages"):
        plan.configuration("2d", "here")
