"""What the package asks of every method, its row and its network alike; nothing is computed."""

import math
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxla.experiments import EXPERIMENTS, METHODS, PUBLISHED, STUDIES
from jaxla.models.build import NETWORKS, build_network, configuration_of, is_planned, reads_volumes
from jaxla.pipeline.checks import checked, unread_options

from jaxla.config import with_method
from jaxla.training.step import split_network
from tests.tiny import TINY_PLAN

CLASSES = 3


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def network(method):
    return nnx.eval_shape(lambda: build_network(replace(method.model, weights="random"), CLASSES, 0, plan=TINY_PLAN))


def run(network, *arguments):
    graph, state = nnx.split(network)
    return jax.eval_shape(lambda state, *arguments: nnx.merge(graph, state)(*arguments), state, *arguments)


def images_of(method):
    size = (method.preprocessing.image_size,) * 2
    if is_planned(method.model):
        size = configuration_of(method.model, TINY_PLAN).patch_size
    if reads_volumes(method.model):
        size = (3, *size)
    return jax.ShapeDtypeStruct((2, *size, 1), jnp.float32)


def test_its_network_gives_logits_of_the_images_size(method, network):
    images = images_of(method)
    rows = images.shape[:2] if reads_volumes(method.model) else images.shape[:1]
    present = jax.ShapeDtypeStruct(rows, jnp.bool)
    network.train()  # with batches that are filled up
    for logits in (run(network, images), run(network, images, present)):
        if isinstance(logits, list):  # of several resolutions, the finest first
            assert all(
                coarse.shape[1] < fine.shape[1] or coarse.shape[2] < fine.shape[2] for fine, coarse in pairwise(logits)
            )
            logits = logits[0]
        assert (logits.shape, logits.dtype) == ((*images.shape[:-1], CLASSES), jnp.float32)


def test_its_network_has_something_to_train_and_a_backbone_where_one_is_frozen(method, network):
    frozen = method.model.backbone == "frozen"
    assert not frozen or hasattr(network, "backbone")
    parts = split_network(network, train_backbone=not frozen)
    assert jax.tree.leaves(parts.trainable)
    assert bool(jax.tree.leaves(nnx.filter_state(parts.frozen.parameters, nnx.Param))) == frozen


def test_features_and_the_rest_make_the_network(method, network):
    if not hasattr(network, "on_features"):
        pytest.skip("runs as a whole")
    assert network.FEATURES
    images = images_of(method)
    graph, state = nnx.split(network)
    *rows, height, width, _ = images.shape
    slices = jax.ShapeDtypeStruct((math.prod(rows), height, width, 1), jnp.float32)
    features = jax.eval_shape(lambda state, images: nnx.merge(graph, state).features(images), state, slices)
    features = jax.ShapeDtypeStruct((*rows, *features.shape[1:]), features.dtype)
    rest = network.on_features((height, width))
    inputs = (features, images) if network.READS_IMAGES else features
    assert run(rest, inputs).shape == run(network, images).shape
    names = [{path for path, _ in nnx.to_flat_state(nnx.state(part, nnx.Param))} for part in (rest, network)]
    assert names[0] == {path for path in names[1] if path[0] != "backbone"}


def test_its_row_holds_what_a_run_accepts(method):
    """What a network does not read of a row has the value that a run takes it for."""
    assert checked(with_method(EXPERIMENTS["quickstart"], method)).model == method.model
    unread = unread_options(with_method(EXPERIMENTS["paper1"], method))
    if "model.weights" in unread:
        assert method.model.weights == "random"
    if "model.backbone" in unread:
        assert method.model.backbone == "finetuned"


def test_every_network_is_a_methods_and_every_study_names_what_there_is():
    assert {method.model.network for method in METHODS.values()} == set(NETWORKS)
    for study in STUDIES.values():
        assert set(study.methods) <= set(METHODS)
        assert set(study.experiments) <= set(EXPERIMENTS)
    assert {method for method, _ in PUBLISHED} <= set(METHODS)
    assert {experiment for _, experiment in PUBLISHED} <= set(EXPERIMENTS)
    assert {experiment.method for experiment in EXPERIMENTS.values()} <= set(METHODS)
