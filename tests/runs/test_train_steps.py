"""`build_network` of `jaxla.train`: a run keeps its frozen random backbone, and draws it again if it is lost."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from jaxla.experiments import EXPERIMENTS

from jaxla.config import InputError
from jaxla.data.dataset import PreparedData
from jaxla.data.labels import Labels
from jaxla.data.split import Split
from jaxla.models.weights import parameters_sha256
from jaxla.models.weights_format import read_metadata
from jaxla.runs.folder import BACKBONE
from jaxla.runs.record import Record, read_record, write_record
from jaxla.tasks.slices import SliceTask
from jaxla.train import Run, build_network

METHOD = EXPERIMENTS["quickstart"].method
FROZEN = replace(METHOD, model=replace(METHOD.model, backbone="frozen"))
EXPERIMENT = replace(EXPERIMENTS["quickstart"], method=FROZEN, seed=1)


@pytest.fixture
def run(tmp_path):
    """A run that has begun but not built its network."""
    text = dict.fromkeys(
        ("label", "network", "input", "unit", "weights_sha256", "split_sha256", "data_sha256", "command", "begun"), ""
    )
    environment = {"device": "cpu: cpu", "versions": {}}
    write_record(
        tmp_path, Record(EXPERIMENT, labels=Labels(("LA",)), weights="random", environment=environment, **text)
    )
    data = PreparedData(None, {}, Split((), (), ()))
    return Run(EXPERIMENT, data, SliceTask(EXPERIMENT, 1), tmp_path, tmp_path)


def kernel(network):
    return np.asarray(network.backbone.blocks.mlp.expand.kernel[...])


def test_a_frozen_random_backbone_is_kept_and_restored(run, caplog):
    caplog.set_level(logging.WARNING, "jaxla")
    path = run.folder / BACKBONE
    first = build_network(run)
    assert read_metadata(path)["source"] == "random, seed 1"  # the file does not claim to be pretrained
    assert read_record(run.folder).backbone_sha256 == parameters_sha256(first.backbone)
    content = path.read_bytes()
    assert np.array_equal(kernel(build_network(run)), kernel(first))
    assert caplog.messages == []

    for damaged in (content[:-4] + b"\0\0\0\1", content[:1000], None):  # changed, truncated, missing
        path.unlink() if damaged is None else path.write_bytes(damaged)
        caplog.clear()
        assert np.array_equal(kernel(build_network(run)), kernel(first))
        assert caplog.messages == [f"{path}: missing or damaged; initialised again from seed 1"]
        assert read_record(run.folder).backbone_sha256 == parameters_sha256(first.backbone)


def test_a_lost_backbone_is_never_replaced_by_a_different_one(run):
    write_record(run.folder, replace(read_record(run.folder), backbone_sha256="hash of another version's numbers"))
    with pytest.raises(InputError, match="cannot be recreated: with the installed package versions, seed 1 gives"):
        build_network(run)
    assert not (run.folder / BACKBONE).exists()
