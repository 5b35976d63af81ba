"""The loop on a few tiny scans: repeatable, stopped in time, and its best epoch the best."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxla.cli.terminal import format_duration
from jaxla.config import Training
from jaxla.data.batches import SliceSource
from jaxla.data.inputs import Canvas
from jaxla.models.networks.transformer_segmenter import LinearDecoder, TransformerSegmenter
from jaxla.training.checkpoints import Checkpoints, checkpoint_steps, checkpointed
from jaxla.training.loop import fit, validate
from jaxla.training.step import make_evaluation, split_network
from tests.tiny import randomise, tiny_backbone
from tests.training.scans import disc_scans

RECIPE = Training(epochs=3, batch_size=4, learning_rate=1e-2, backbone_learning_rate=1e-4, patience=3)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return disc_scans(tmp_path_factory.mktemp("scans"))


def tiny_parts(train_backbone=False, bias=0.0):
    decoder = randomise(nnx.eval_shape(lambda: LinearDecoder(32, 1, rngs=nnx.Rngs(0))), 1)
    decoder.classifier.bias.set_value(jnp.full(1, bias))
    decoder.classifier.kernel.set_value(0.1 * decoder.classifier.kernel[...])
    return split_network(TransformerSegmenter(tiny_backbone(), decoder), train_backbone)


def run(folder, train, val, recipe=RECIPE, seed=0, parts=None):
    """-> progress, and the lines of metrics."""
    folder.mkdir()
    parts = parts or tiny_parts()
    seen = []
    progress = fit(
        parts, SliceSource(train, Canvas(32)), SliceSource(val, Canvas(32)), recipe, seed=seed,
        pretrained_backbone=True, folder=folder, on_epoch=lambda history: seen.append(len(history)),
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert seen == list(range(1, len(lines) + 1))
    return progress, lines


def restore(folder, kind, like):
    """The parameters of the one checkpoint that is left of a kind, and its record."""
    (step,) = checkpoint_steps(folder / "checkpoints" / kind)
    checkpoints = Checkpoints(folder / "checkpoints" / kind, read_only=True)
    trees, record = checkpoints.restore(checkpointed(like.trainable, like.frozen.statistics), step)
    checkpoints.close()
    return trees, record


def leaves(trees):
    return [np.asarray(x) for x in jax.tree.leaves(trees)]


# --- a run ---


@pytest.fixture(scope="module")
def runs(volumes, tmp_path_factory):
    """Fine-tuning runs of one seed, the same again, and another: -> their folders and metrics."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: (folder / name, run(folder / name, volumes[:1], volumes[1:2], seed=seed, parts=tiny_parts(True))[1])
        for name, seed in (("a", 5), ("again", 5), ("b", 6))
    }


def test_same_seed_trains_the_same_parameters_to_the_bit(runs):
    like = tiny_parts(True)
    (a, _), (again, _) = (restore(runs[name][0], "best", like) for name in ("a", "again"))
    for x, y in zip(leaves(a), leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(runs["a"][1], runs["again"][1], strict=True):
        assert {k: v for k, v in x.items() if "second" not in k} == {k: v for k, v in y.items() if "second" not in k}


def test_another_seed_trains_other_parameters(runs):
    like = tiny_parts(True)
    (a, _), (b, _) = (restore(runs[name][0], "latest", like) for name in ("a", "b"))
    assert all(not np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_every_epoch_leaves_one_line_of_metrics(runs):
    _, lines = runs["a"]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert list(line) == ["epoch", "train_loss", "val_loss", "val_dice", "val_iou", "seconds", "slices_per_second"]
        assert 0 <= line["val_iou"] <= line["val_dice"] <= 1
        assert line["seconds"] > 0
        # two steps of four slices, in no more than the epoch's time
        assert line["slices_per_second"] >= 8 / line["seconds"]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_latest_checkpoint_is_that_of_the_last_epoch(runs, volumes):
    folder, lines = runs["a"]
    like = tiny_parts(True)
    trees, record = restore(folder, "latest", like)
    assert (record["epoch"], record["losses"]) == (3, [])
    assert record["history"] == lines
    frozen = like.frozen._replace(statistics=trees["statistics"])
    found = validate(
        make_evaluation(like.evaluation), trees["trainable"], frozen, SliceSource(volumes[1:2], Canvas(32)), 4
    )
    assert found == tuple(lines[-1][key] for key in ("val_loss", "val_dice", "val_iou"))


def test_best_checkpoint_is_that_of_the_highest_validation_dice(volumes, tmp_path):
    """Trained on a scan with an empty mask, a network that starts by finding all of the image ends by finding none."""
    recipe = replace(RECIPE, epochs=6, learning_rate=4e-3)
    progress, lines = run(tmp_path / "run", volumes[2:], volumes[:1], recipe, parts=tiny_parts(bias=0.5))
    dice = [line["val_dice"] for line in lines]
    assert dice[0] > 0.1
    assert dice[-1] == 0
    best = int(np.argmax(dice))
    assert (progress.best_epoch, progress.best_dice) == (best + 1, dice[best])

    like = tiny_parts()
    trees, record = restore(tmp_path / "run", "best", like)
    assert record == {"epoch": best + 1, "dice": dice[best]}
    found = validate(
        make_evaluation(like.evaluation),
        trees["trainable"],
        like.frozen,
        SliceSource(volumes[:1], Canvas(32)),
        recipe.batch_size,
    )
    assert found == tuple(lines[best][key] for key in ("val_loss", "val_dice", "val_iou"))
    _, record = restore(tmp_path / "run", "latest", like)
    assert record["epoch"] == len(lines) != best + 1


def test_training_stops_after_patience_epochs_without_a_lower_loss(volumes, tmp_path):
    """With a learning rate of 0 no epoch is better than the first."""
    recipe = replace(RECIPE, epochs=20, learning_rate=0.0, patience=3)
    progress, lines = run(tmp_path / "run", volumes[:1], volumes[1:2], recipe)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert len({line["val_loss"] for line in lines}) == 1
    assert (progress.epoch, progress.best_epoch, progress.epochs_since_lowest) == (4, 1, 3)


# --- validation ---


class Brightness(nnx.Module):
    """A network that finds what is brighter than a half."""

    def __call__(self, images):
        return 8 * (images - 0.5)


def test_validation_is_the_mean_of_each_volumes_own_dice(volumes):
    source = SliceSource(volumes, Canvas(32))
    assert len(source) == 18  # batches of 4 straddle the volumes, and the last one is half empty
    parts = split_network(Brightness(), train_backbone=True)
    found = validate(make_evaluation(parts.evaluation), parts.trainable, parts.frozen, source, 4)

    losses, dice, iou = [], [], []
    for i in range(3):
        slices = [source[n] for n in range(18) if source[n]["volume"] == i]
        assert len(slices) == (5, 6, 7)[i]
        image = np.stack([s["input"][..., 0] for s in slices]).astype(np.float64)
        mask = np.stack([s["mask"] for s in slices]) > 0
        probability = 1 / (1 + np.exp(-8 * (image - 0.5)))
        losses += [-np.log(np.where(m, p, 1 - p)).mean() for m, p in zip(mask, probability, strict=True)]
        prediction = image > 0.5
        both = (prediction & mask).sum()
        dice.append(2 * both / (prediction.sum() + mask.sum()))
        iou.append(both / (prediction | mask).sum())
    assert dice[2] == 0 < dice[0] != dice[1]  # found pixels of an empty mask count as a miss
    np.testing.assert_allclose(found, [np.mean(losses), np.mean(dice), np.mean(iou)], rtol=1e-7)  # measured: 1.2e-8


def test_an_empty_mask_left_empty_counts_as_one(volumes):
    class Nothing(nnx.Module):
        def __call__(self, images):
            return jnp.full_like(images, -1)

    parts = split_network(Nothing(), train_backbone=True)
    evaluate = make_evaluation(parts.evaluation)
    _, dice, iou = validate(evaluate, parts.trainable, parts.frozen, SliceSource(volumes[1:], Canvas(32)), 4)
    assert (dice, iou) == (0.5, 0.5)  # the mean of 0 for the disc and 1 for the empty mask


@pytest.mark.parametrize(("seconds", "text"), [(20.4, "20 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_times_are_written_for_people(seconds, text):
    assert format_duration(seconds) == text
