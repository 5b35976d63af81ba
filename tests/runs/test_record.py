"""What a record says of its run."""

from dataclasses import replace

import pytest
from jaxla.experiments import EXPERIMENTS, METHODS

from jaxla.config import with_method
from jaxla.runs.machine import describe_device
from jaxla.runs.record import method_label


def test_an_architecture_that_is_not_the_methods_own_stands_beside_its_name():
    for name, method in METHODS.items():
        experiment = with_method(EXPERIMENTS["paper1"], method)
        assert method_label(experiment) == name
    exchanged = replace(experiment, method="dinov2_vitb14", model=replace(experiment.model, arch="dinov3_vitb16"))
    assert method_label(exchanged) == "dinov2_vitb14 with dinov3_vitb16"
    assert method_label(replace(experiment, method="of another version")) == "of another version"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"device": "cpu: cpu", "processor": "Z80, 2 cores", "devices": 1, "processes": 1}, "cpu: Z80, 2 cores"),
        ({"device": "cpu: cpu"}, "cpu: cpu"),  # an older record
        ({"device": "gpu: Fast", "processor": "Z80, 2 cores", "devices": 4}, "gpu: Fast, 4 of them"),
        ({"device": "gpu: Fast", "devices": 4, "processes": 2}, "gpu: Fast, 4 of them, in 2 processes"),
    ],
)
def test_a_device_is_named_by_what_it_is(environment, said):
    assert describe_device(environment) == said
