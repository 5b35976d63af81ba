"""Tasks: sources, shapes and gradients for each kind of training sample."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest
from jaxla.experiments import EXPERIMENTS, METHODS

from jaxla.config import InputError, Preprocessing
from jaxla.data.batches import sample_batch
from jaxla.data.cases import find_cases
from jaxla.data.dataset import PreparedData
from jaxla.data.slices import slice_geometry
from jaxla.data.split import Split
from jaxla.models.networks.unet import UNetOptions
from jaxla.runs.network_input import log_network_input
from jaxla.tasks import make_task, restore_task
from jaxla.tasks.patches import PatchTask
from jaxla.tasks.slices import SliceTask
from jaxla.tasks.volumes import VolumeTask
from jaxla.training.step import make_gradient
from jaxla.training.two_pass import make_two_pass_gradient
from tests.tiny import TINY_PLAN
from tests.training.scans import disc_scans

pytestmark = pytest.mark.quick


def make_experiment(name, **training):
    method = METHODS[name]
    method = replace(method, training=replace(method.training, **training))
    return replace(EXPERIMENTS["quickstart"], method=method)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scans of 5, 6 and 7 slices; the first two for training, the last for validation."""
    folder = tmp_path_factory.mktemp("scans")
    volumes = {volume.id: volume for volume in disc_scans(folder)}
    first, second, third = volumes
    return PreparedData(find_cases(folder), volumes, Split(train=(first, second), val=(third,), test=(), unused=()))


def train_volumes(data):
    return [data.volumes[name] for name in data.split.train]


def test_slices_are_samples_of_most_methods(data, tmp_path):
    task = make_task(make_experiment("unet", batch_size=4), data)
    assert type(task) is SliceTask
    assert (task.sample, task.unit) == (("slice", "slices"), "per volume")
    sources = task.make_sources(data, tmp_path)
    assert [len(source) for source in sources] == [11, 7]
    assert sources.train[0]["input"].shape == task.input_shape(7) == (320, 320, 1)
    assert (task.samples_per_pass(train_volumes(data)), task.steps_per_epoch(train_volumes(data))) == (11, 3)
    restored = restore_task(task.experiment, 1, task.extent, tmp_path)
    assert (type(restored), restored.canvas) == (SliceTask, task.canvas)


@pytest.mark.parametrize(("minutes", "steps", "is_refused"), [(0, 0, True), (1, 0, False), (1, 5, True)])
def test_fewer_steps_than_are_accumulated_are_refused_once_a_time_budget_has_fixed_them(
    data, tmp_path, minutes, steps, is_refused
):
    """One pass over the training data has 3 steps."""
    recipe = {"epochs": 1, "batch_size": 4, "accumulated_steps": 6, "schedule": "cosine"}
    limited = make_experiment("unet", **recipe, minutes=minutes, steps=steps)
    limited = replace(limited, method=replace(limited.method, model=UNetOptions(widths=(4,))))
    task = make_task(limited, data)
    line = rf"^training.accumulated_steps=6: more than the {steps or 3} steps of this run\. Use fewer, or train longer"
    with pytest.raises(InputError, match=line) if is_refused else nullcontext():
        task.make_trainer(task.build_network(), task.make_sources(data, tmp_path).train)


def test_the_input_can_be_limited_to_the_centre_that_contains_the_training_structures(data, caplog):
    """The discs cover rows 5 to 19 and 8 to 22, and columns 11 to 25, of 32: up to 11 mm from the centre."""
    first, second, _ = data.volumes
    foreground = make_experiment("unet")
    foreground = replace(foreground, method=replace(foreground.method, preprocessing=Preprocessing(48, "foreground")))
    task = make_task(foreground, data)
    assert task.extent == pytest.approx(1.2 * 22)
    assert task.describe_input() == "48 × 48 pixels, 26 × 26 mm"
    with caplog.at_level("INFO", "jaxla"):
        log_network_input(data, task)
        assert caplog.messages == ["the network sees the central 26 mm of slices; the rest becomes background"]
        small = SliceTask(foreground, 1, extent=21.0)
        log_network_input(replace(data, split=Split(train=(second,), val=(first,), test=())), small)
    assert caplog.messages[2].startswith("1 validation or test case with structures outside that centre (")
    assert caplog.messages[2].endswith(f": {first}")


def with_patches(name, side, **model):
    method = METHODS[name]
    preprocessing = replace(method.preprocessing, image_size=32, patch_size=side)
    changed = replace(method, model=replace(method.model, **model), preprocessing=preprocessing)
    return replace(EXPERIMENTS["quickstart"], method=changed)


def test_a_slice_is_read_in_patches(data, tmp_path):
    """Tiles of 16 pixels start at 0, 8 and 16 of 32; slices have 32 pixels, as the network's input has."""
    task = make_task(with_patches("unet_small", 16, widths=(4, 4)), data)
    assert (
        task.describe_input() == "patches of 16 × 16 pixels from slices of 32 × 32 pixels, with 2 neighbouring slices"
    )
    assert (task.input_shape(7), task.tile_size, task.tile_count) == ((16, 16, 3), 16, 9)
    assert task.memory_advice == "Lower preprocessing.patch_size or preprocessing.image_size."
    source = task.make_sources(data, tmp_path).train
    batch = sample_batch(source, range(4))
    images, masks = jax.eval_shape(task.augment, jax.random.key(0), batch["input"], batch["mask"])
    assert (images.shape, masks.shape) == ((4, 16, 16, 3), (4, 16, 16))
    network = task.build_network()
    segment, trainer = task.make_segment([network]), task.make_trainer(network, source)

    overlaps = []  # validation reads slices in tiles, as prediction does, so both give the same Dice
    for name in data.split.train:
        volume = data.volumes[name]
        predicted = segment(volume.image, slice_geometry(np.diag([1.0, 1.0, 3.0, 1.0])))[0]
        both, total = np.sum(predicted & volume.mask), np.sum(predicted) + np.sum(volume.mask)
        overlaps.append(2 * both / total)
    assert trainer.validate(source).dice == pytest.approx(np.mean(overlaps), abs=1e-9)
    assert 0 < np.mean(overlaps) < 1


@pytest.mark.parametrize(("gradient", "make"), [("two_pass", make_two_pass_gradient), ("whole", make_gradient)])
def test_volumes_are_samples_of_windows_and_the_recipe_chooses_the_gradient(data, tmp_path, gradient, make):
    task = make_task(make_experiment("windows_vit_mini8", gradient=gradient), data)
    assert type(task) is VolumeTask
    assert task.make_gradient is make
    sources = task.make_sources(data, tmp_path)
    assert [len(source) for source in sources] == [2, 1]
    assert {source[0]["mask"].shape for source in sources} == {(7, 64, 64)}  # padded to the deepest volume
    assert task.samples_per_pass(train_volumes(data)) == 2


def test_patches_are_samples_of_nnunet():
    task = PatchTask(make_experiment("nnunet_3d"), 1, TINY_PLAN)
    depth = task.configuration.patch_size[0]
    assert task.sample == (f"patch of {depth} slices", f"patches of {depth} slices")
    assert task.input_shape(99) == (*task.configuration.patch_size, 1)
    assert task.batch_size == task.configuration.batch_size
    assert PatchTask(make_experiment("nnunet_3d", batch_size=7), 1, TINY_PLAN).resolved_recipe.batch_size == 7
    assert task.steps_per_epoch([]) == task.recipe.steps
