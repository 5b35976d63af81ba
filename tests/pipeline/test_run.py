"""The stages of a run: the backbone that it keeps, and the cases that it shows."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.labels import Labels
from jaxla.experiments import EXPERIMENTS
from jaxla.models.weights import parameters_sha256
from jaxla.models.weights_format import read_metadata
from jaxla.pipeline.run import build
from jaxla.runs.folder import BACKBONE
from jaxla.runs.record import Record, read_record, write_record

QUICKSTART = EXPERIMENTS["quickstart"]
EXPERIMENT = replace(QUICKSTART, seed=4, model=replace(QUICKSTART.model, backbone="frozen"))


@pytest.fixture
def run_dir(tmp_path):
    unknown = dict.fromkeys(("weights_sha256", "split_sha256", "data_sha256", "command", "begun"), "")
    write_record(
        tmp_path,
        Record(EXPERIMENT, Labels(("LA",)), "random", environment={"device": "cpu: cpu", "versions": {}}, **unknown),
    )
    return tmp_path


def kernel(network):
    return np.asarray(network.backbone.blocks.mlp.expand.kernel[...])


def test_a_random_backbone_that_stays_frozen_is_kept_and_read_again(run_dir, caplog):
    caplog.set_level(logging.WARNING, "jaxla")
    first = build(EXPERIMENT, 1, run_dir)
    assert read_metadata(run_dir / BACKBONE)["source"] == "random, seed 4"  # it is never passed off as another
    assert read_record(run_dir).weights_sha256 == parameters_sha256(first.backbone)
    kept = (run_dir / BACKBONE).read_bytes()
    assert np.array_equal(kernel(build(EXPERIMENT, 1, run_dir)), kernel(first))
    assert caplog.messages == []

    for content in (kept[:-4] + b"\0\0\0\1", kept[:1000], None):  # another value, truncated, gone
        (run_dir / BACKBONE).unlink() if content is None else (run_dir / BACKBONE).write_bytes(content)
        caplog.clear()
        assert np.array_equal(kernel(build(EXPERIMENT, 1, run_dir)), kernel(first))
        assert caplog.messages == [f"{run_dir / BACKBONE}: missing or damaged; drawn again from seed 4"]
        assert parameters_sha256(build(EXPERIMENT, 1, run_dir).backbone) == read_record(run_dir).weights_sha256


def test_a_backbone_that_cannot_be_drawn_again_is_never_replaced_by_another(run_dir):
    write_record(run_dir, replace(read_record(run_dir), weights_sha256="of another version's random numbers"))
    with pytest.raises(InputError, match="missing or damaged, and seed 4 gives another backbone"):
        build(EXPERIMENT, 1, run_dir)
    assert not (run_dir / BACKBONE).exists()
