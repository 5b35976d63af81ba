"""Conversion of nnU-Net's checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import jaxla
from convert_weights.nnunet import nnunet_rows
from jaxla.nnunet.plan import plan_from_json, plan_to_json, read_plan
from tests.convert_weights.command import refuse, succeed
from tests.golden.fake_weights import fake_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
PLANS = GOLDEN / "nnunet_plans" / "Hippocampus.json"


def nnunet_state(name, copies=True):
    """Return a state dict of nnU-Net's network, with or without the copies that PyTorch saves under other names."""
    rows = nnunet_rows(read_plan(PLANS).configuration(name), 3)
    golden = json.loads((GOLDEN / f"nnunet_hippocampus_{name}.shapes.json").read_text())
    filled = fake_state_dict({key: tuple(shape) for key, shape in golden.items()})
    named = {row.ours: filled[row.theirs] for row in rows if not row.optional}
    return {row.theirs: torch.from_numpy(named[row.ours].copy()) for row in rows if copies or not row.optional}


def write_checkpoint(path, state):
    """Write a state dict with the other content that nnU-Net's trainer saves, including NumPy scalars."""
    content = {
        "network_weights": state,
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "nesterov": True}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "lrs": [0.01]},
        "_best_ema": np.float64(0.75),
        "current_epoch": 7,
        "init_args": {"plans": {}, "configuration": "2d", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(content, path)
    return path


def convert(folder, name, source, plans=PLANS):
    output = folder / f"{name}.safetensors"
    options = [f"--plans={plans}", f"--configuration={name}", f"--source={source}", f"--output={output}"]
    succeed("--arch=nnunet", *options)
    return output


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_checkpoint_gives_nnunets_logits_at_every_resolution_and_converts_back_bit_for_bit(tmp_path, name):
    state = nnunet_state(name)
    output = convert(tmp_path, name, write_checkpoint(tmp_path / "checkpoint_final.pth", state))
    assert " logits of one " in succeed("--verify", f"--output={output}")
    network, golden = jaxla.load_network(output), np.load(GOLDEN / f"nnunet_hippocampus_{name}.npz")
    resolutions = nnx.jit(lambda network, image: network.multiscale_logits(image))(
        network, golden["image"][None, ..., None]
    )
    assert len(resolutions) == read_plan(PLANS).configuration(name).n_stages - 1
    for level, logits in enumerate(resolutions):
        expected = np.moveaxis(golden[f"logits{level}"], 0, -1)
        assert np.abs(np.asarray(logits[0]) - expected).max() <= 1e-5  # measured: 5.1e-6, for values up to 2.6

    back = tmp_path / "back.pth"
    succeed("--to-torch", f"--source={output}", f"--output={back}")
    found = torch.load(back, weights_only=True)
    assert list(found) == list(state)  # in PyTorch's order
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_bare_state_dict_without_copies_is_converted(tmp_path):
    source = tmp_path / "state.pth"
    torch.save(nnunet_state("2d", copies=False), source)
    output = convert(tmp_path, "2d", source)
    succeed("--to-torch", f"--source={output}", f"--output={tmp_path / 'back.pth'}")
    found = torch.load(tmp_path / "back.pth", weights_only=True)
    assert found.keys() == nnunet_state("2d").keys()  # PyTorch's module requires the copies
    assert torch.equal(
        found["decoder.encoder.stages.0.0.convs.0.conv.bias"], found["encoder.stages.0.0.convs.0.conv.bias"]
    )


def test_plans_in_nnunets_format_are_read(tmp_path):
    plans = json.loads(PLANS.read_text())
    for configuration in plans["configurations"].values():
        arguments = dict(configuration)
        configuration["architecture"] = {
            "network_class_name": "x.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": [],
        }
        del configuration["strides"], configuration["n_stages"]
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    source = write_checkpoint(tmp_path / "c.pth", nnunet_state("2d"))
    output = convert(tmp_path, "2d", source, tmp_path / "nnUNetPlans.json")
    image = jax.ShapeDtypeStruct((1, 56, 40, 1), np.float32)
    assert jax.eval_shape(jaxla.load_network(output), image).shape == (1, 56, 40, 3)


def command_options(folder, **changed):
    source = write_checkpoint(folder / "c.pth", nnunet_state("2d"))
    given = {"plans": PLANS, "configuration": "2d", "source": source, "output": folder / "new.safetensors"} | changed
    return ["--arch=nnunet", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


def write_small_plan(folder):
    plan = read_plan(PLANS)
    configuration = plan.configurations["2d"]._replace(features_per_stage=(16, 32, 64, 128))
    (folder / "other.json").write_text(json.dumps(plan_to_json(plan._replace(configurations={"2d": configuration}))))
    return folder / "other.json"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"plans": None}, "--plans: required with --arch=nnunet. Pass --plans="),
        ({"configuration": None}, "--configuration: required with --arch=nnunet"),
        ({"output": None}, "--output: required with --arch=nnunet"),
        (
            {"configuration": "3d_lowres"},
            "configuration '3d_lowres' is not supported. Use 2d or 3d_fullres.",
        ),
        ({"configuration": "3d_fullres"}, "50 with the wrong shape"),
        ({"plans": "nothing.json"}, "nothing.json: cannot be read"),
        ({"source": "nothing.pth"}, "--source=nothing.pth: no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changed, problem):
    assert problem in refuse(tmp_path, *command_options(tmp_path, **changed))


def test_wrong_plan_missing_tensor_and_differing_copies_are_refused(tmp_path):
    line = refuse(tmp_path, *command_options(tmp_path, plans=write_small_plan(tmp_path)))
    assert "with the wrong shape" in line
    assert "Pass the plan and the configuration of the training run" in line

    state = nnunet_state("2d")
    del state["decoder.transpconvs.1.weight"]
    source = write_checkpoint(tmp_path / "lost.pth", state)
    assert "tensors missing (decoder.transpconvs.1.weight)" in refuse(
        tmp_path, *command_options(tmp_path, source=source)
    )

    state = nnunet_state("2d")
    state["decoder.encoder.stages.0.0.convs.0.conv.weight"] += 1
    source = write_checkpoint(tmp_path / "differ.pth", state)
    assert "are copies of the same tensor, but differ" in refuse(tmp_path, *command_options(tmp_path, source=source))

    torch.save({"network_weights": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    assert "not an nnU-Net checkpoint (decoder.seg_layers.0.weight is missing)" in refuse(
        tmp_path, *command_options(tmp_path, source=tmp_path / "other.pth")
    )


def test_code_in_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"network_weights": nnunet_state("2d"), "logging": Bomb()}, tmp_path / "bomb.pth")
    assert "nothing was run" in refuse(tmp_path, *command_options(tmp_path, source=tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


def test_backbones_and_networks_are_distinguished(tmp_path):
    output = convert(tmp_path, "2d", write_checkpoint(tmp_path / "c.pth", nnunet_state("2d")))
    with pytest.raises(jaxla.InputError, match="contains 'nnunet', which is not a backbone"):
        jaxla.load_backbone(output)
    line = refuse(
        tmp_path, "--arch=dinov2_vits14", f"--source={tmp_path / 'c.pth'}", f"--output={tmp_path / 'b.safetensors'}"
    )
    assert "loading it would run code" in line  # NumPy scalars are read only with --arch=nnunet
    line = refuse(tmp_path, "--arch=dinov2_vits14", "--configuration=2d", f"--source={tmp_path / 'c.pth'}")
    assert "--configuration: applies only to --arch=nnunet" in line
    assert plan_from_json(json.loads(PLANS.read_text()), "plans").fingerprint is not None
