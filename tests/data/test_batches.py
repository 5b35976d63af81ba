"""Batches: no slice is dropped or shown twice in a pass, orders repeat from their seed, and a stream can be resumed."""

import itertools
import json

import numpy as np
import pytest

from jaxla.data.batches import SliceSource, VolumeSource, evaluation_batches, steps_per_epoch, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.inputs import Canvas
from jaxla.data.prepared import prepare_cases
from tests.data.nifti import AFFINE, save

SIZE = 16
SLICES = (4, 7, 5)  # of the three volumes: 16 in all


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three volumes of 16 × 12 pixels in which every pixel of slice s has the grey value s."""
    root = tmp_path_factory.mktemp("data")
    for n, count in enumerate(SLICES):
        image = np.broadcast_to(np.arange(count)[::-1], (16, 12, count)).astype(np.float32) + 10 * n
        save(root / f"case_{n}.nii.gz", image)
        save(root / f"case_{n}_mask.nii.gz", (image % 10 >= 2).astype(np.uint8))
    return SliceSource(prepare_cases(find_cases(root), tmp_path_factory.mktemp("cache")), Canvas(SIZE))


def slices_of(batch):
    """(volume, slice) of every slice of a batch, read off its grey values."""
    grey = batch["input"].max((1, 2, 3))
    return [(int(v), round(float(g) * (SLICES[v] - 1))) for v, g in zip(batch["volume"], grey, strict=True)]


ALL = [(volume, s) for volume, count in enumerate(SLICES) for s in range(count)]


def take(batches, count):
    """(volume, slice) of all slices of the next `count` batches, in their order."""
    return [one for batch in itertools.islice(batches, count) for one in slices_of(batch)]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_a_source_is_every_slice_of_every_volume_in_order(source):
    assert AFFINE[2, 2] > 0  # slices run from head to foot, hence the descending values on file
    assert len(source) == 16
    for item, (volume, s) in enumerate(ALL):
        one = source[item]
        assert (int(one["volume"]), float(one["weight"])) == (volume, 1)
        grey, count = one["input"][..., 0], SLICES[volume]
        expected = np.zeros((SIZE, SIZE), np.float32)
        expected[2:14] = s / (count - 1)  # 12 rows of 16 pixels: two rows of nothing above and below
        np.testing.assert_allclose(grey, expected, rtol=0, atol=1e-6)
        expected = np.zeros((SIZE, SIZE), np.uint8)
        expected[2:14] = s >= 2
        np.testing.assert_array_equal(one["mask"], expected)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 20])
def test_batches_have_the_promised_shapes_and_types(source, batch_size):
    for batch in (next(training_batches(source, batch_size, 0)), next(evaluation_batches(source, batch_size))):
        described = {key: (array.shape, array.dtype) for key, array in batch.items()}
        assert described == {
            "input": ((batch_size, SIZE, SIZE, 1), np.float32),
            "mask": ((batch_size, SIZE, SIZE), np.uint8),
            "volume": ((batch_size,), np.int32),
            "weight": ((batch_size,), np.float32),
        }


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 16, 20])
def test_every_slice_comes_exactly_once_in_each_pass(source, batch_size):
    passes = 5
    stream = take(training_batches(source, batch_size, 0), -(-16 * passes // batch_size))
    orders = [stream[16 * n : 16 * (n + 1)] for n in range(passes)]
    for order in orders:
        assert sorted(order) == ALL
        assert order != ALL
    assert len({tuple(order) for order in orders}) == passes  # drawn anew for each pass


def test_the_order_follows_from_the_seed(source):
    first, again, other = (take(training_batches(source, 5, seed), 10) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_order_does_not_depend_on_the_batch_size(source):
    by_3, by_8 = (take(training_batches(source, size, 0), 48 // size) for size in (3, 8))
    assert by_3 == by_8


def test_training_slices_all_weigh_1(source):
    for batch in itertools.islice(training_batches(source, 5, 0), 10):
        assert batch["weight"].tolist() == [1] * 5


@pytest.mark.parametrize("done", [0, 1, 3, 4, 11])
def test_a_stream_that_is_resumed_goes_on_as_if_it_had_not_stopped(source, done):
    whole = training_batches(source, 5, 0)
    for _ in range(done):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))  # as a checkpoint keeps it
    following = list(itertools.islice(whole, 8))
    resumed = training_batches(source, 5, 0)
    next(resumed)
    resumed.set_state(state)
    for batch in following:
        assert_equal(next(resumed), batch)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 16), (3, 6), (5, 4), (8, 2), (16, 1), (20, 1)])
def test_an_epoch_has_enough_steps_for_every_slice(source, batch_size, steps):
    assert steps_per_epoch(source, batch_size) == steps


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 16, 20])
def test_evaluation_covers_every_slice_once_in_order_and_fills_up_with_nothing(source, batch_size):
    batches = list(evaluation_batches(source, batch_size))
    assert len(batches) == -(-16 // batch_size)
    weight = np.concatenate([batch["weight"] for batch in batches])
    filled = len(weight) - 16
    assert weight.tolist() == [1] * 16 + [0] * filled
    assert take(batches, len(batches))[:16] == ALL
    if filled:
        for key in ("input", "mask"):
            assert not batches[-1][key][-filled:].any()


def test_evaluation_is_the_same_every_time(source):
    for first, second in zip(evaluation_batches(source, 5), evaluation_batches(source, 5), strict=True):
        assert_equal(first, second)


# --- whole volumes ---


def test_a_volume_is_its_slices_in_order_filled_up_behind(source):
    volumes = VolumeSource(source.volumes, Canvas(SIZE), depth=9)
    assert (len(volumes), volumes.units, volumes.slices) == (3, 3, 16 / 3)
    for i, count in enumerate(SLICES):
        row = volumes[i]
        of_slices = [source[item] for item, (volume, _) in enumerate(ALL) if volume == i]
        for name in ("input", "mask"):
            assert row[name].shape[0] == 9
            np.testing.assert_array_equal(row[name][:count], [one[name] for one in of_slices])
            assert not row[name][count:].any()
        assert row["weight"].tolist() == [1] * count + [0] * (9 - count)
        assert (row["volume"].shape, int(row["volume"])) == ((), i)


def test_volumes_come_once_a_pass_in_another_order_each_time(source):
    volumes = VolumeSource(source.volumes, Canvas(SIZE), depth=7)
    batches = training_batches(volumes, 1, seed=3)
    order = [int(next(batches)["volume"][0]) for _ in range(30)]
    passes = [tuple(order[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in passes)
    assert len(set(passes)) > 1


def test_a_last_short_batch_of_volumes_is_filled_up_with_rows_that_weigh_nothing(source):
    *_, last = evaluation_batches(VolumeSource(source.volumes, Canvas(SIZE), depth=7), 2)
    assert last["input"].shape == (2, 7, SIZE, SIZE, 1)
    assert last["weight"].sum(1).tolist() == [SLICES[2], 0]
