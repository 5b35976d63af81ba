"""The record of a run, and how it names methods and devices."""

import json
from dataclasses import replace

import pytest
from jaxla.experiments import EXPERIMENTS, METHODS

from jaxla.config import InputError
from jaxla.data.labels import Labels
from jaxla.runs.machine import describe_device
from jaxla.runs.record import Record, describe_network, differences, method_label, read_record, write_record

pytestmark = pytest.mark.quick

PAPER1 = EXPERIMENTS["paper1"]


def with_model(experiment, **options):
    return replace(experiment, method=replace(experiment.method, model=replace(experiment.method.model, **options)))


def test_a_record_is_read_as_it_was_written(tmp_path):
    environment = {"device": "cpu: cpu", "versions": {"jax": "0.10.0"}}
    record = Record(
        PAPER1, "dinov2_vitb14", "dinov2_vitb14 (random weights, frozen)", "448 × 448 pixels", "per volume",
        Labels(("LA", "wall"), ((1,), (2, 3))), "random", "", "split", "data", "python -m jaxla.train",
        "2026-01-01T00:00:00+00:00", environment, backbone_sha256="hash", resumed=({"begun": "later"},), extent=1.5,
    )  # fmt: skip
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_an_option_that_a_record_lacks_has_its_default(tmp_path):
    """Records of earlier versions lack options that were added later."""
    about = dict.fromkeys(("label", "network", "input", "unit", "split_sha256", "data_sha256", "command", "begun"), "")
    environment = {"device": "cpu: cpu", "versions": {}}
    record = Record(
        PAPER1, labels=Labels(("LA",)), weights="random", weights_sha256="", environment=environment, **about
    )
    write_record(tmp_path, record)
    path = tmp_path / "experiment.json"
    content = json.loads(path.read_text())
    assert content["experiment"]["preprocessing"].pop("patch_size") == 0
    path.write_text(json.dumps(content))
    assert read_record(tmp_path) == record


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"method": "', '"method": "unknown_', r"'unknown_\w+' is missing"),
        ('"preprocessing": ', '"preprocessed": ', "'preprocessing' is missing"),
    ],
)
def test_a_record_of_an_unknown_method_or_without_a_group_of_options_is_refused(tmp_path, old, new, problem):
    record = Record(
        PAPER1, "", "", "", "", Labels(("LA",)), "random", "", "", "", "", "", {"device": "cpu: cpu", "versions": {}}
    )
    write_record(tmp_path, record)
    path = tmp_path / "experiment.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=f"experiment.json: damaged: {problem} or unknown"):
        read_record(tmp_path)


def test_the_label_contains_a_changed_architecture():
    for name, method in METHODS.items():
        assert method_label(replace(PAPER1, method=method), METHODS) == name
    exchanged = with_model(replace(PAPER1, method=METHODS["dinov2_vitb14"]), arch="dinov3_vitb16")
    assert method_label(exchanged, METHODS) == "dinov2_vitb14 with dinov3_vitb16"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dinov2_vitb14", {"weights": "/cache/dinov2_vitb14.safetensors"}, "(dinov2_vitb14.safetensors, frozen)"),
        ("dinov2_vitb14", {"weights": "random", "backbone": "finetuned"}, "(random weights, trained)"),
        ("fusion_vitb14", {"weights": "random"}, "on dinov2_vitb14 (random weights, frozen)"),
        ("unet", {}, "(random weights, trained)"),
        ("unet_small", {}, "(random weights, trained)"),
    ],
)
def test_a_network_is_described_by_its_label_and_weights(name, options, words):
    experiment = with_model(replace(PAPER1, method=METHODS[name]), **options)
    assert describe_network(experiment, METHODS) == f"{name} {words}"


def test_only_differences_that_prevent_resuming_are_listed():
    moved = replace(PAPER1, data=replace(PAPER1.data, root="/elsewhere", split="other.json"))
    assert list(differences(moved, PAPER1)) == []  # the content of files is compared instead
    assert list(differences(with_model(PAPER1, weights="a.safetensors"), with_model(PAPER1, weights="b"))) == []
    random = with_model(PAPER1, weights="random")
    assert list(differences(random, PAPER1)) == [("model.weights", "random", "")]
    changed = replace(PAPER1, seed=3, data=replace(PAPER1.data, train_patients=4))
    assert list(differences(changed, PAPER1)) == [("seed", 3, 0), ("data.train_patients", 4, 0)]


@pytest.mark.parametrize(
    ("environment", "description"),
    [
        ({"device": "cpu: cpu", "processor": "Z80, 2 cores", "devices": 1, "processes": 1}, "cpu: Z80, 2 cores"),
        ({"device": "gpu: Fast", "processor": "Z80, 2 cores", "devices": 4, "processes": 1}, "gpu: Fast, 4 devices"),
        ({"device": "gpu: Fast", "devices": 4, "processes": 2}, "gpu: Fast, 4 devices, in 2 processes"),
    ],
)
def test_the_description_of_a_device_contains_its_name_and_counts(environment, description):
    assert describe_device(environment) == description
