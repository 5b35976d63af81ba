"""The command line of `jaxla.train` accepts every option of the method, and no others."""

import shlex
from dataclasses import replace

import pytest
from jaxla.experiments import EXPERIMENTS, METHODS

from jaxla.cli.command_line import parse_experiment, set_option, strip_run_options
from jaxla.config import InputError, option_groups, option_values
from tests.commands import succeed

pytestmark = pytest.mark.quick


def parse(*arguments):
    return parse_experiment(list(arguments), EXPERIMENTS, METHODS)


@pytest.mark.parametrize(
    ("command", "changed"),
    [
        ("--exp=quickstart", {}),
        ("--exp quickstart --seed 3", {"seed": 3}),
        ("--exp=quickstart --data.root=/scans --preprocessing.image_size=64 --training.epochs=2",
         {"data.root": "/scans", "preprocessing.image_size": 64, "training.epochs": 2}),
        ("--exp=quickstart --model.decoder_widths=[16,8] --model.backbone=frozen --training.cache_features=false",
         {"model.decoder_widths": (16, 8), "model.backbone": "frozen", "training.cache_features": False}),
        ("--exp=quickstart --method=unet --model.widths=[8,12,16] --augmentation.rotation=10 --augmentation.flips=true",
         {"model.widths": (8, 12, 16), "augmentation.rotation": 10.0, "augmentation.flips": True}),
        ("--exp=paper1 --model.arch=dinov3_vitb16 --model.weights=w.safetensors --training.learning_rate=1e-4",
         {"model.arch": "dinov3_vitb16", "model.weights": "w.safetensors", "training.learning_rate": 1e-4}),
        ("--exp=paper1 --model.decoder=linear --fold=all --data.labels=LA:1;wall:2",
         {"model.decoder": "linear", "fold": "all", "data.labels": "LA:1;wall:2"}),
        ("--exp=paper2 --model.blocks=[1,-1] --model.block_weights=shared --model.image_stages=last",
         {"model.blocks": (1, -1), "model.block_weights": "shared", "model.image_stages": "last"}),
        ("--exp=paper3_left_atrium --model.windows=2x2x2 --model.depth_places=0 --training.gradient=whole",
         {"model.windows": "2x2x2", "model.depth_places": 0, "training.gradient": "whole"}),
        ("--exp=quickstart --method=nnunet_2d --model.memory_gb=4 --training.steps=10 --postprocessing.largest=never",
         {"model.memory_gb": 4.0, "training.steps": 10, "postprocessing.largest": "never"}),
        ("--exp=fewshot_5patients --data.subset_seed=2 --postprocessing.opening=3 --training.checkpoint=last",
         {"data.subset_seed": 2, "postprocessing.opening": 3, "training.checkpoint": "last"}),
    ],
)  # fmt: skip
def test_command_lines_of_earlier_versions_are_parsed(command, changed):
    """All other options keep the values of the experiment and its method."""
    experiment = parse(*shlex.split(command)).experiment
    defaults = EXPERIMENTS[experiment.name]
    expected = option_values(defaults) | {
        f"{group}.{name}": value
        for group, options in option_groups(experiment).items()
        if group != "data"
        for name, value in vars(getattr(METHODS[experiment.method.name], group)).items()
    }
    values = option_values(experiment)
    assert changed.items() <= values.items()
    assert {name: value for name, value in values.items() if name not in changed} == {
        name: expected[name] for name in values if name not in changed
    }


def test_run_options_are_parsed():
    options = parse(
        *("--exp=quickstart", "--run-dir=runs/a", "--cache-dir", "cache", "--resume", "--devices=2", "--shard-params")
    )
    assert (str(options.run_dir), str(options.cache_dir)) == ("runs/a", "cache")
    assert (options.resume, options.dry_run, options.devices, options.shard_params) == (True, False, 2, True)


@pytest.mark.parametrize("name", ["vit_mini8", "fusion_vitb14", "windows_vit_mini8", "unet", "segnet", "nnunet_3d"])
def test_help_lists_the_options_of_the_method_and_no_others(tmp_path, name):
    text = succeed(tmp_path, "jaxla.train", "--exp=quickstart", f"--method={name}", "--help")
    listed = {word.split("=")[0].rstrip(",") for word in text.split() if word.startswith("--")}
    options = {
        method.name: {f"--{option}" for option in option_values(replace(EXPERIMENTS["quickstart"], method=method))}
        for method in METHODS.values()
    }
    assert options[name] <= listed
    assert not (set.union(*options.values()) - options[name]) & listed


def test_quickstart_uses_a_different_method_for_the_users_scans():
    methods = [
        parse("--exp=quickstart", *words).experiment.method.name
        for words in ((), ("--data.root=phantom",), ("--data.root=/scans",), ("--data.root", "x", "--method=vit_mini8"))
    ]
    assert methods == ["vit_mini8", "vit_mini8", "unet_small", "vit_mini8"]


def test_an_option_of_another_method_is_refused():
    for arguments, line in (
        (
            ("--method=unet", "--model.blocks=[0]"),
            "--model.blocks: method unet has no such option; fusion_vitb14, ",
        ),
        (("--method=unet", "--model.network=x"), "--model.network: fixed by --method=unet. Remove the option."),
    ):
        with pytest.raises(InputError, match=line):
            parse("--exp=quickstart", *arguments)


@pytest.mark.parametrize(
    ("command", "stripped"),
    [
        ("python -m jaxla.train --exp=a --run-dir=r --resume", "python -m jaxla.train --exp=a"),
        ("python -m jaxla.train --run-dir 'my run' --exp=a", "python -m jaxla.train --exp=a"),
        ("python -m jaxla.train --exp=a --coordinator=h:1 --processes 2 --process=0", "python -m jaxla.train --exp=a"),
    ],
)
def test_run_options_are_stripped_from_a_command(command, stripped):
    assert strip_run_options(command) == stripped


def test_set_option_replaces_earlier_values():
    command = "python -m jaxla.train --fold all --exp=a --fold=1"
    assert set_option(command, "--fold", 2) == "python -m jaxla.train --exp=a --fold=2"
    assert set_option("train --exp=a", "--run-dir", "my run") == "train --exp=a '--run-dir=my run'"
