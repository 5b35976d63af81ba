"""The training loop on tiny scans: reproducibility, early stopping, the checkpoints that it keeps, and validation."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.config import BackboneTraining, Training
from jaxla.data.batches import SliceSource
from jaxla.data.inputs import Canvas
from jaxla.models.networks.transformer_segmenter import LinearDecoder, TransformerSegmenter
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps, network_state
from jaxla.training.loop import fit
from jaxla.training.trainer import Trainer
from tests.tiny import randomise, tiny_backbone
from tests.training.scans import disc_scans

RECIPE = BackboneTraining(epochs=3, batch_size=4, learning_rate=1e-2, backbone_learning_rate=1e-4, patience=3)
STEPS = 2  # per epoch on five or seven slices


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return disc_scans(tmp_path_factory.mktemp("scans"))


def make_source(volumes):
    return SliceSource(volumes, Canvas(32))


def make_trainer(recipe=RECIPE, seed=0, train_backbone=False, bias=0.0):
    decoder = randomise(nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0))), 1)
    decoder.classifier.bias.set_value(jnp.full(1, bias))
    decoder.classifier.kernel.set_value(0.1 * decoder.classifier.kernel[...])
    options = {"train_backbone": train_backbone, "has_pretrained_backbone": True, "seed": seed}
    return Trainer(TransformerSegmenter(tiny_backbone(), decoder), recipe, STEPS, **options)


def train_and_check_reports(trainer, folder, train, val):
    """Train, check that each epoch was reported, and return the progress."""
    reported = []
    progress = fit(
        trainer, make_source(train), make_source(val), folder, on_epoch=lambda history: reported.append(len(history))
    )
    assert reported == list(range(len(progress.history) + 1))
    return progress


def restore(folder, kind, like):
    """Return the parameters and the record of the only checkpoint of a kind."""
    (step,) = checkpoint_steps(folder / kind)
    checkpoints = Checkpoints(folder / kind, read_only=True)
    trees, record = checkpoints.restore(network_state(like.trainable, like.frozen.statistics), step)
    checkpoints.close()
    return trees, record


def validate_restored(trainer, trees, val):
    """Validate a trainer with the parameters of a checkpoint."""
    trainer.trainable = trees["trainable"]
    trainer.frozen = trainer.frozen._replace(statistics=trees["statistics"])
    return tuple(trainer.validate(make_source(val)))


def leaves(trees):
    return [np.asarray(x) for x in jax.tree.leaves(trees)]


def scores(metrics):
    return tuple(metrics[key] for key in ("val_loss", "val_dice", "val_iou"))


# --- a run ---


@pytest.fixture(scope="module")
def runs(volumes, tmp_path_factory):
    """Folders and progress of three fine-tuning runs: two with the same seed, and one with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: (
            folder / name,
            train_and_check_reports(
                make_trainer(seed=seed, train_backbone=True), folder / name, volumes[:1], volumes[1:2]
            ),
        )
        for name, seed in (("a", 5), ("repeated", 5), ("b", 6))
    }


def test_the_same_seed_gives_identical_parameters_and_metrics(runs):
    like = make_trainer(train_backbone=True)
    (a, _), (repeated, _) = (restore(runs[name][0], "best", like) for name in ("a", "repeated"))
    for x, y in zip(leaves(a), leaves(repeated), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(runs["a"][1].history, runs["repeated"][1].history, strict=True):
        assert {k: v for k, v in x.items() if "second" not in k} == {k: v for k, v in y.items() if "second" not in k}


def test_another_seed_gives_different_parameters(runs):
    like = make_trainer(train_backbone=True)
    (a, _), (b, _) = (restore(runs[name][0], "latest", like) for name in ("a", "b"))
    assert all(not np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_every_epoch_has_metrics(runs):
    history = runs["a"][1].history
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    keys = ["epoch", "train_loss", "val_loss", "val_dice", "val_iou", "seconds", "slices_per_second"]
    for metrics in history:
        assert list(metrics) == keys
        assert 0 <= metrics["val_iou"] <= metrics["val_dice"] <= 1
        assert metrics["seconds"] > 0
        # two steps of four slices; `seconds` also includes validation
        assert metrics["slices_per_second"] >= 8 / metrics["seconds"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_latest_checkpoint_is_from_the_last_epoch(runs, volumes):
    folder, progress = runs["a"]
    trainer = make_trainer(train_backbone=True)
    trees, record = restore(folder, "latest", trainer)
    assert (record["epoch"], record["losses"]) == (3, [])
    assert record["history"] == progress.history
    assert validate_restored(trainer, trees, volumes[1:2]) == scores(progress.history[-1])


def test_the_best_checkpoint_is_from_the_epoch_with_the_highest_validation_dice(volumes, tmp_path):
    """Trained on a scan with an empty mask, a network that segments every pixel learns to segment none."""
    recipe = replace(RECIPE, epochs=6, learning_rate=4e-3)
    progress = train_and_check_reports(make_trainer(recipe, bias=0.5), tmp_path, volumes[2:], volumes[:1])
    dice = [metrics["val_dice"] for metrics in progress.history]
    assert dice[0] > 0.1
    assert dice[-1] == 0
    best = int(np.argmax(dice))
    assert (progress.best_epoch, progress.best_dice) == (best + 1, dice[best])

    trainer = make_trainer(recipe)
    trees, record = restore(tmp_path, "best", trainer)
    assert record == {"epoch": best + 1, "dice": dice[best]}
    assert validate_restored(trainer, trees, volumes[:1]) == scores(progress.history[best])
    _, record = restore(tmp_path, "latest", make_trainer(recipe))
    assert record["epoch"] == len(dice) != best + 1


def test_without_validation_the_last_epoch_is_kept_and_restored_if_it_is_lost(volumes, tmp_path):
    recipe = replace(RECIPE, checkpoint="last", patience=0)
    progress = fit(make_trainer(recipe), make_source(volumes[:1]), None, tmp_path)
    assert [list(line) for line in progress.history] == [["epoch", "train_loss", "seconds", "slices_per_second"]] * 3
    (kept, record), (latest, _) = (restore(tmp_path, kind, make_trainer(recipe)) for kind in ("best", "latest"))
    assert record["epoch"] == 3
    shutil.rmtree(tmp_path / "best")
    fit(make_trainer(recipe), make_source(volumes[:1]), None, tmp_path, epochs_done=3)
    restored, record = restore(tmp_path, "best", make_trainer(recipe))
    assert record["epoch"] == 3
    for a, b, c in zip(*map(leaves, (kept, latest, restored)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    with pytest.raises(ValueError, match="the recipe needs checkpoint='last' and patience=0"):
        fit(make_trainer(), make_source(volumes[:1]), None, tmp_path / "other")


def test_training_stops_after_patience_epochs_without_a_lower_loss(volumes, tmp_path):
    """With a learning rate of 0 no epoch is better than the first."""
    recipe = replace(RECIPE, epochs=20, learning_rate=0.0, patience=3)
    progress = train_and_check_reports(make_trainer(recipe), tmp_path, volumes[:1], volumes[1:2])
    assert [metrics["epoch"] for metrics in progress.history] == [1, 2, 3, 4]
    assert len({metrics["val_loss"] for metrics in progress.history}) == 1
    assert (progress.epoch, progress.best_epoch, progress.epochs_since_lowest) == (4, 1, 3)


# --- validation ---


class Brightness(nnx.Module):
    """A network that segments pixels brighter than 0.5."""

    def __call__(self, images):
        return 8 * (images - 0.5)


class Nothing(nnx.Module):
    """A network that segments nothing."""

    def __call__(self, images):
        return jnp.full_like(images, -1)


def test_validation_averages_the_dice_of_each_volume(volumes):
    slices = make_source(volumes)
    assert len(slices) == 18  # some batches of 4 contain slices of two volumes, and the last batch is half empty
    found = Trainer(Brightness(), Training(batch_size=4), STEPS).validate(slices)

    losses, dice, iou = [], [], []
    for i in range(3):
        rows = [slices[n] for n in range(18) if slices[n]["volume"] == i]
        assert len(rows) == (5, 6, 7)[i]
        image = np.stack([row["input"][..., 0] for row in rows]).astype(np.float64)
        mask = np.stack([row["mask"] for row in rows]) > 0
        probability = 1 / (1 + np.exp(-8 * (image - 0.5)))
        losses += [-np.log(np.where(m, p, 1 - p)).mean() for m, p in zip(mask, probability, strict=True)]
        prediction = image > 0.5
        both = (prediction & mask).sum()
        dice.append(2 * both / (prediction.sum() + mask.sum()))
        iou.append(both / (prediction | mask).sum())
    assert dice[2] == 0 < dice[0] != dice[1]  # if the mask is empty, any predicted pixel gives a Dice of 0
    np.testing.assert_allclose(found, [np.mean(losses), np.mean(dice), np.mean(iou)], rtol=1e-7)  # measured: 1.2e-8


def test_an_empty_prediction_of_an_empty_mask_has_a_dice_of_1(volumes):
    found = Trainer(Nothing(), Training(batch_size=4), STEPS).validate(make_source(volumes[1:]))
    assert (found.dice, found.iou) == (0.5, 0.5)  # the mean of 0 for the disc and 1 for the empty mask
