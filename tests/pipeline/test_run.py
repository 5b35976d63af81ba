"""The stages of a run: the backbone that it keeps, and the cases that it shows."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.pipeline.checks import unread_options
from jaxla.pipeline.run import build
from jaxla.pipeline.session import remove_unbegun
from jaxla.pipeline.sources import image_sources

from jaxla.config import InputError, with_method
from jaxla.data.dataset import PreparedData
from jaxla.data.labels import Labels
from jaxla.data.split import Split
from jaxla.memory import StepTooLarge
from jaxla.models.weights import parameters_sha256
from jaxla.models.weights_format import read_metadata
from jaxla.runs.folder import BACKBONE
from jaxla.runs.record import Record, read_record, write_record
from jaxla.training.step import make_gradient
from jaxla.training.two_pass import make_two_pass_gradient
from tests.training.scans import disc_scans

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


OF_WINDOWS = {"model.windows", "model.depth_places", "model.convolutions", "training.gradient"}
OF_A_FUSION = {"model.blocks", "model.block_weights", "model.image_stages"}
OF_NNUNET = {"model.plan", "model.memory_gb", "augmentation.nnunet"}
OF_IMAGES = {"preprocessing.image_size", "preprocessing.pad_to"} | {
    f"augmentation.{name}" for name in ("rotation", "scale", "flips", "intensity", "elastic")
}


@pytest.mark.parametrize(
    ("method", "unread"),
    [
        ("vit_mini8", {"model.widths", "training.backbone_learning_rate", "training.cache_features"} | OF_A_FUSION),
        ("dinov2_vitb14", {"model.widths", "training.backbone_learning_rate"} | OF_A_FUSION),
        ("fusion_vitb14", {"model.widths", "model.decoder", "training.backbone_learning_rate"}),
        ("windows_dinov3_vits16", {"model.widths", "model.decoder", "training.backbone_learning_rate"} | OF_A_FUSION),
        ("resnet50_unet", {"model.widths", "model.decoder", "training.cache_features"} | OF_A_FUSION),
        (
            "unet",
            {"model.weights", "model.backbone", "model.decoder", "model.decoder_widths"}
            | {"training.backbone_learning_rate", "training.cache_features"}
            | OF_A_FUSION,
        ),
        (
            "nnunet_3d",
            {"model.weights", "model.backbone", "model.decoder", "model.decoder_widths", "model.widths"}
            | {"training.backbone_learning_rate", "training.cache_features"}
            | OF_A_FUSION
            | OF_IMAGES,
        ),
    ],
)
def test_options_that_a_method_does_not_read_are_known(method, unread):
    experiment = with_method(QUICKSTART, METHODS[method])
    if method != "nnunet_3d":
        unread = unread | OF_NNUNET
    if method != "windows_dinov3_vits16":
        unread = unread | OF_WINDOWS
    assert unread_options(experiment) == unread
    on_scans = replace(experiment, data=replace(experiment.data, root="scans"))
    assert unread_options(on_scans) == unread | {"data.phantom_size", "data.phantom_cases"}


def test_a_run_that_memory_ended_is_removed_only_if_nothing_was_saved(tmp_path):
    """Of folds too: those that are finished are days of work."""
    for saved in ("checkpoints/latest", "fold_0/checkpoints/latest", "fold_3/checkpoints/latest"):
        run_dir = tmp_path / saved.replace("/", "_")
        (run_dir / saved).mkdir(parents=True)
        (run_dir / saved / "12.sha256").write_text("{}")
        remove_unbegun(run_dir, StepTooLarge, StepTooLarge(2, "too large"), None)
        assert (run_dir / saved / "12.sha256").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    remove_unbegun(empty, InputError, InputError("another fault"), None)
    assert empty.exists()
    remove_unbegun(empty, StepTooLarge, StepTooLarge(2, "too large"), None)
    assert not empty.exists()


def test_gradients_are_taken_as_the_recipe_says(tmp_path):
    volumes = {volume.id: volume for volume in disc_scans(tmp_path)}
    first, second, third = volumes
    data = PreparedData(None, volumes, Split(train=(first, second), val=(third,), test=(), unused=()))
    method = METHODS["windows_vit_mini8"]
    for word, taken in (("two_pass", make_two_pass_gradient), ("whole", make_gradient)):
        experiment = with_method(QUICKSTART, replace(method, training=replace(method.training, gradient=word)))
        sources = image_sources(experiment, data)
        assert sources.gradient_of is taken
        assert [len(source) for source in (sources.train, sources.val)] == [2, 1]
        assert {source[0]["mask"].shape for source in (sources.train, sources.val)} == {(7, 64, 64)}  # the deepest
