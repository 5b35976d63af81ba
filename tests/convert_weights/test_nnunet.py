"""What nnU-Net trained, converted and back; its checkpoints as it writes them, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import jaxla
from convert_weights.nnunet import nnunet_rows
from jaxla.nnunet.plan import plan_from_json, plan_to_json, read_plan
from tests.convert_weights.command import refuse, succeed
from tests.golden.fake_weights import fake_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
PLANS = GOLDEN / "nnunet_plans" / "Hippocampus.json"


def state_of(name, copies=True):
    """A state dict of nnU-Net's network: with the copies under other names that PyTorch saves, or without."""
    rows = nnunet_rows(read_plan(PLANS).configuration(name), 3)
    golden = json.loads((GOLDEN / f"nnunet_hippocampus_{name}.shapes.json").read_text())
    filled = fake_state_dict({key: tuple(shape) for key, shape in golden.items()})
    named = {row.ours: filled[row.theirs] for row in rows if not row.optional}
    return {row.theirs: torch.from_numpy(named[row.ours].copy()) for row in rows if copies or not row.optional}


def checkpoint(path, state):
    """As nnU-Net's trainer writes it: the state dict among what else it needs, NumPy's numbers too."""
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
    said = succeed(
        "--arch=nnunet",
        f"--plans={plans}",
        f"--configuration={name}",
        f"--source={source}",
        f"--output={output}",
        "--verify",
    )
    return output, said


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_a_checkpoint_gives_nnunets_own_logits_and_comes_back_to_the_bit(tmp_path, name):
    state = state_of(name)
    output, said = convert(tmp_path, name, checkpoint(tmp_path / "checkpoint_final.pth", state))
    assert "logits of one " in said
    network = jaxla.load_network(output)
    golden = np.load(GOLDEN / f"nnunet_hippocampus_{name}.npz")
    logits = np.asarray(network(golden["image"][None, ..., None]))
    assert np.abs(logits[0] - np.moveaxis(golden["logits0"], 0, -1)).max() <= 1e-5  # measured: 4.9e-6

    back = tmp_path / "back.pth"
    succeed("--to-torch", f"--source={output}", f"--output={back}")
    found = torch.load(back, weights_only=True)
    assert list(found) == list(state)  # in PyTorch's own order
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_state_dict_alone_and_one_without_copies_are_read_too(tmp_path):
    source = tmp_path / "state.pth"
    torch.save(state_of("2d", copies=False), source)
    output, _ = convert(tmp_path, "2d", source)
    succeed("--to-torch", f"--source={output}", f"--output={tmp_path / 'back.pth'}")
    found = torch.load(tmp_path / "back.pth", weights_only=True)
    assert found.keys() == state_of("2d").keys()  # as PyTorch's module asks for them
    assert torch.equal(
        found["decoder.encoder.stages.0.0.convs.0.conv.bias"], found["encoder.stages.0.0.convs.0.conv.bias"]
    )


def test_nnunets_own_plans_are_read(tmp_path):
    own = json.loads(PLANS.read_text())
    for name, c in own["configurations"].items():
        arch = {"network_class_name": "x.PlainConvUNet", "arch_kwargs": dict(c), "_kw_requires_import": []}
        own["configurations"][name] = {**{k: c[k] for k in c if k not in ("strides", "n_stages")}, "architecture": arch}
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(own))
    source = checkpoint(tmp_path / "c.pth", state_of("2d"))
    output, _ = convert(tmp_path, "2d", source, tmp_path / "nnUNetPlans.json")
    assert jaxla.load_network(output)(np.zeros((1, 56, 40, 1), np.float32)).shape == (1, 56, 40, 3)


def options(folder, **changed):
    source = checkpoint(folder / "c.pth", state_of("2d"))
    given = {"plans": PLANS, "configuration": "2d", "source": source, "output": folder / "new.safetensors"} | changed
    return ["--arch=nnunet", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


def small_plan(folder):
    plan = read_plan(PLANS)
    c = plan.configurations["2d"]
    (folder / "other.json").write_text(
        json.dumps(plan_to_json(plan._replace(configurations={"2d": c._replace(features_per_stage=(16, 32, 64, 128))})))
    )
    return folder / "other.json"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"plans": None}, "option --plans is required with --arch=nnunet"),
        ({"configuration": None}, "option --configuration is required with --arch=nnunet"),
        ({"output": None}, "option --output is required with --arch=nnunet"),
        (
            {"configuration": "3d_lowres"},
            "configuration '3d_lowres' is not supported. Use 2d or 3d_fullres.",
        ),
        ({"configuration": "3d_fullres"}, "has 50 of another shape"),
        ({"plans": "nothing.json"}, "nothing.json: cannot be read"),
        ({"source": "nothing.pth"}, "--source=nothing.pth: no such file"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, changed, says):
    assert says in refuse(tmp_path, *options(tmp_path, **changed))


def test_another_plan_a_lost_tensor_and_copies_that_differ_are_refused(tmp_path):
    said = refuse(tmp_path, *options(tmp_path, plans=small_plan(tmp_path)))
    assert "of another shape" in said
    assert "give the plan and the configuration that it was trained with" in said

    state = state_of("2d")
    del state["decoder.transpconvs.1.weight"]
    source = checkpoint(tmp_path / "lost.pth", state)
    assert "lacks 1 of its" in refuse(tmp_path, *options(tmp_path, source=source))

    state = state_of("2d")
    state["decoder.encoder.stages.0.0.convs.0.conv.weight"] += 1
    source = checkpoint(tmp_path / "differ.pth", state)
    assert "are one module's and differ" in refuse(tmp_path, *options(tmp_path, source=source))

    torch.save({"network_weights": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    assert "has no decoder.seg_layers.0.weight" in refuse(tmp_path, *options(tmp_path, source=tmp_path / "other.pth"))


def test_a_pickle_with_code_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"network_weights": state_of("2d"), "logging": Bomb()}, tmp_path / "bomb.pth")
    said = refuse(tmp_path, *options(tmp_path, source=tmp_path / "bomb.pth"))
    assert "nothing was run" in said
    assert not (tmp_path / "exploded").exists()


def test_backbones_and_networks_are_told_apart(tmp_path):
    output, _ = convert(tmp_path, "2d", checkpoint(tmp_path / "c.pth", state_of("2d")))
    with pytest.raises(jaxla.InputError, match="unknown here"):
        jaxla.load_backbone(output)
    said = refuse(
        tmp_path, "--arch=dinov2_vits14", f"--source={tmp_path / 'c.pth'}", f"--output={tmp_path / 'b.safetensors'}"
    )
    assert "not a plain file of weights" in said  # NumPy's numbers are read where nnU-Net is asked for
    said = refuse(tmp_path, "--arch=dinov2_vits14", "--configuration=2d", f"--source={tmp_path / 'c.pth'}")
    assert "options --plans and --configuration go with --arch=nnunet" in said
    assert plan_from_json(json.loads(PLANS.read_text()), "it").fingerprint is not None
