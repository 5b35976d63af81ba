"""Properties of every method: its network's shapes, features and options. Networks are only traced."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxla.experiments import EXPERIMENTS, METHODS, PUBLISHED, STUDIES

from jaxla.config import Data, Experiment, unread_options
from jaxla.models.networks.base import TransformerOptions, build_network
from jaxla.runs.checks import check_experiment
from jaxla.runs.record import experiment_from_json, experiment_to_json
from jaxla.tasks import TASKS
from jaxla.training.step import split_network
from tests.tiny import TINY_PLAN

CLASSES = 3


@pytest.fixture(params=METHODS, scope="module")
def method(request):
    return METHODS[request.param]


@pytest.fixture(scope="module")
def network(method):
    """The method's network with abstract parameters, in evaluation mode."""
    return nnx.eval_shape(lambda: build_network(method.model.with_weights("random"), CLASSES, 0, plan=TINY_PLAN))


def make_quickstart(method):
    return replace(EXPERIMENTS["quickstart"], method=method)


def trace(network, *arguments):
    graph, state = nnx.split(network)
    return jax.eval_shape(lambda state, *arguments: nnx.merge(graph, state)(*arguments), state, *arguments)


def abstract_images(method, slices=3):
    plan = [TINY_PLAN] if method.preprocessing is None else []
    task = TASKS[method.model.sample](make_quickstart(method), CLASSES, *plan)
    return jax.ShapeDtypeStruct((2, *task.input_shape(slices)), jnp.float32)


def test_logits_have_the_size_of_the_images(method, network):
    images = abstract_images(method)
    rows = images.shape[:2] if method.model.sample == "volumes" else images.shape[:1]
    present = jax.ShapeDtypeStruct(rows, jnp.bool)
    inference_logits = trace(network, images)
    network.train()
    training_logits = trace(network, images, present)  # training batches may contain padding
    network.eval()
    if isinstance(training_logits, list):  # at several resolutions, finest first
        assert all(
            coarse.shape[1] < fine.shape[1] or coarse.shape[2] < fine.shape[2]
            for fine, coarse in pairwise(training_logits)
        )
        training_logits = training_logits[0]
    for logits in (inference_logits, training_logits):
        assert (logits.shape, logits.dtype) == ((*images.shape[:-1], CLASSES), jnp.float32)


def test_some_parameters_are_trained_and_a_frozen_network_has_a_backbone(method, network):
    is_frozen = method.model.backbone == "frozen"
    assert not is_frozen or hasattr(network, "backbone")
    parts = split_network(network, train_backbone=not is_frozen)
    assert jax.tree.leaves(parts.trainable)
    assert bool(jax.tree.leaves(nnx.filter_state(parts.frozen.parameters, nnx.Param))) == is_frozen


def test_only_transformers_can_be_trained_on_features(method, network):
    assert hasattr(network, "on_features") == isinstance(method.model, TransformerOptions)


@pytest.mark.parametrize(
    "method",
    ["vit_mini8", "dinov2_vitb14", "fusion_vitb14", "fusion_vitb14_no_image", "fusion_dinov3_vitb16",
     "windows_dinov3_vits16", "windows_dinov2_vitb14"],
    indirect=True,
)  # fmt: skip
def test_network_on_features_completes_the_network(method, network):
    """Tested for one method of each kind of network and family of backbones."""
    assert network.feature_description
    images = abstract_images(method)
    graph, state = nnx.split(network)
    *rows, height, width, _ = images.shape
    slices = jax.ShapeDtypeStruct((math.prod(rows), height, width, 1), jnp.float32)
    features = jax.eval_shape(lambda state, images: nnx.merge(graph, state).features(images), state, slices)
    features = jax.ShapeDtypeStruct((*rows, *features.shape[1:]), features.dtype)
    rest = network.on_features((height, width))
    inputs = (features, images) if network.reads_images else features
    assert trace(rest, inputs).shape == (*images.shape[:-1], CLASSES)
    names = [{path for path, _ in nnx.to_flat_state(nnx.state(part, nnx.Param))} for part in (rest, network)]
    assert names[0] == {path for path in names[1] if path[0] != "backbone"}


@pytest.mark.quick
def test_options_are_accepted_and_resolved(method):
    assert check_experiment(make_quickstart(method)).method == method


@pytest.mark.quick
def test_options_survive_the_record_of_a_run(method):
    experiment = replace(make_quickstart(method), data=Data("scans", labels="LA:1", train_percent=12.5), fold="3")
    content = json.loads(json.dumps(experiment_to_json(experiment)))
    assert experiment_from_json(content, METHODS) == experiment


LOSS_WEIGHT = "training.false_negative_weight"  # cross-entropy does not use it


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("vit_mini8", {LOSS_WEIGHT, "training.backbone_learning_rate", "training.cache_features"}),
        ("dinov2_vitb14", {LOSS_WEIGHT, "training.backbone_learning_rate"}),
        ("dinov2_vitb14_linear", {LOSS_WEIGHT, "training.backbone_learning_rate", "model.decoder_widths"}),
        ("fusion_vitb14", {LOSS_WEIGHT, "training.backbone_learning_rate"}),
        ("windows_dinov3_vits16", {"training.backbone_learning_rate"}),
        ("resnet50_unet", {LOSS_WEIGHT, "training.cache_features"}),
        ("unet", {LOSS_WEIGHT}),
        ("nnunet_3d", set()),
    ],
)
def test_options_without_effect_are_found(name, unread):
    """These options have no effect because of the values of other options."""
    method = METHODS[name.removesuffix("_linear")]
    if name.endswith("_linear"):
        method = replace(method, model=replace(method.model, decoder="linear"))
    assert unread_options(make_quickstart(method)) == unread
    on_scans = Experiment("", "", Data("scans", split="split.json"), method)
    unread = unread | {"data.phantom_size", "data.phantom_cases", "data.validation"}
    assert unread_options(on_scans) == unread | {"data.split_seed"}
    assert unread_options(replace(on_scans, data=Data("scans", split="all"))) == unread


@pytest.mark.quick
def test_studies_and_published_rows_name_existing_methods_and_experiments():
    for study in STUDIES.values():
        assert set(study.methods) <= set(METHODS)
        assert set(study.experiments) <= set(EXPERIMENTS)
    assert {method for method, _ in PUBLISHED} <= set(METHODS)
    assert {experiment for _, experiment in PUBLISHED} <= set(EXPERIMENTS)
    assert all(METHODS[experiment.method.name] == experiment.method for experiment in EXPERIMENTS.values())
