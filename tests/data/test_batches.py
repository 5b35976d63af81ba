"""Batches: each slice occurs once in a pass, the order depends on the seed only, and a stream can be resumed."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from jaxla.data.batches import SliceSource, VolumeSource, evaluation_batches, steps_per_epoch, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.inputs import Canvas
from jaxla.data.prepared import prepare_cases
from tests.data.nifti import AFFINE, save

SIZE = 16
SLICES = (4, 7, 5)  # slices of the three volumes, 16 in total


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three volumes with 16 × 12 pixels; every pixel of slice s has the grey value s."""
    root = tmp_path_factory.mktemp("data")
    for n, count in enumerate(SLICES):
        image = np.broadcast_to(np.arange(count)[::-1], (16, 12, count)).astype(np.float32) + 10 * n
        save(root / f"case_{n}.nii.gz", image)
        save(root / f"case_{n}_mask.nii.gz", (image % 10 >= 2).astype(np.uint8))
    return SliceSource(prepare_cases(find_cases(root), tmp_path_factory.mktemp("cache")), Canvas(SIZE))


def volume_and_slice(batch):
    """Return (volume, slice) of every slice of a batch, from its grey values."""
    grey = batch["input"].max((1, 2, 3))
    return [(int(v), round(float(g) * (SLICES[v] - 1))) for v, g in zip(batch["volume"], grey, strict=True)]


ALL_SLICES = [(volume, s) for volume, count in enumerate(SLICES) for s in range(count)]


def take(batches, count):
    """Return (volume, slice) of all slices of the next `count` batches, in order."""
    return [pair for batch in itertools.islice(batches, count) for pair in volume_and_slice(batch)]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_a_source_contains_every_slice_of_every_volume_in_order(source):
    assert AFFINE[2, 2] > 0  # slices run from head to foot, so the values descend in the file
    assert len(source) == 16
    for item, (volume, s) in enumerate(ALL_SLICES):
        row = source[item]
        assert (int(row["volume"]), float(row["weight"])) == (volume, 1)
        grey, count = row["input"][..., 0], SLICES[volume]
        expected = np.zeros((SIZE, SIZE), np.float32)
        expected[2:14] = s / (count - 1)  # 12 rows in 16: two empty rows above and below
        np.testing.assert_allclose(grey, expected, rtol=0, atol=1e-6)
        expected = np.zeros((SIZE, SIZE), np.uint8)
        expected[2:14] = s >= 2
        np.testing.assert_array_equal(row["mask"], expected)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 20])
def test_batches_have_the_documented_shapes_and_types(source, batch_size):
    for batch in (next(training_batches(source, batch_size, 0)), next(evaluation_batches(source, batch_size))):
        assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
            "input": ((batch_size, SIZE, SIZE, 1), np.float32),
            "mask": ((batch_size, SIZE, SIZE), np.uint8),
            "volume": ((batch_size,), np.int32),
            "weight": ((batch_size,), np.float32),
        }


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 16, 20])
def test_every_slice_occurs_exactly_once_in_each_pass(source, batch_size):
    passes = 5
    stream = take(training_batches(source, batch_size, 0), -(-16 * passes // batch_size))
    orders = [stream[16 * n : 16 * (n + 1)] for n in range(passes)]
    for order in orders:
        assert sorted(order) == ALL_SLICES
        assert order != ALL_SLICES
    assert len({tuple(order) for order in orders}) == passes  # each pass has a new order


def test_the_order_depends_on_the_seed(source):
    first, same_seed, other_seed = (take(training_batches(source, 5, seed), 10) for seed in (7, 7, 8))
    assert first == same_seed
    assert first != other_seed


def test_the_order_does_not_depend_on_the_batch_size(source):
    by_3, by_8 = (take(training_batches(source, size, 0), 48 // size) for size in (3, 8))
    assert by_3 == by_8


def test_all_training_slices_have_weight_1(source):
    for batch in itertools.islice(training_batches(source, 5, 0), 10):
        assert batch["weight"].tolist() == [1] * 5


@pytest.mark.parametrize("done", [0, 1, 3, 4, 11])
def test_a_resumed_stream_continues_with_the_same_batches(source, done):
    uninterrupted = training_batches(source, 5, 0)
    for _ in range(done):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.get_state()))  # as in a checkpoint
    following = list(itertools.islice(uninterrupted, 8))
    resumed = training_batches(source, 5, 0)
    next(resumed)
    resumed.set_state(state)
    for batch in following:
        assert_equal(next(resumed), batch)


def test_some_slices_are_drawn_from_those_with_a_structure(source):
    """Of 800 slices, 480 come from 30 passes over all 16, and 320 from 32 passes over the 10 with a structure."""
    batches = training_batches(SliceSource(source.volumes, Canvas(SIZE), foreground=0.4), 20, 0)
    state = json.loads(json.dumps(batches.get_state()))
    chosen = take(batches, 40)
    assert Counter(chosen) == {pair: 62 if pair[1] >= 2 else 30 for pair in ALL_SLICES}
    assert len({tuple(chosen[n : n + 100]) for n in range(0, 800, 100)}) == 8
    batches.set_state(state)
    assert take(batches, 40) == chosen


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 16), (3, 6), (5, 4), (8, 2), (16, 1), (20, 1)])
def test_an_epoch_has_enough_steps_for_every_slice(source, batch_size, steps):
    assert steps_per_epoch(source, batch_size) == steps


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 16, 20])
def test_evaluation_reads_every_slice_once_in_order_and_pads_the_last_batch(source, batch_size):
    batches = list(evaluation_batches(source, batch_size))
    assert len(batches) == -(-16 // batch_size)
    weight = np.concatenate([batch["weight"] for batch in batches])
    padding = len(weight) - 16
    assert weight.tolist() == [1] * 16 + [0] * padding
    assert take(batches, len(batches))[:16] == ALL_SLICES
    if padding:
        for key in ("input", "mask"):
            assert not batches[-1][key][-padding:].any()


def test_evaluation_is_the_same_every_time(source):
    for first, second in zip(evaluation_batches(source, 5), evaluation_batches(source, 5), strict=True):
        assert_equal(first, second)


# --- volumes ---------------------------------------------------------------------------------------------------------


def test_a_volume_contains_its_slices_in_order_padded_at_the_end(source):
    volumes = VolumeSource(source.volumes, Canvas(SIZE), depth=9)
    assert (len(volumes), volumes.units, volumes.slices) == (3, 3, 16 / 3)
    for i, count in enumerate(SLICES):
        row = volumes[i]
        slices = [source[item] for item, (volume, _) in enumerate(ALL_SLICES) if volume == i]
        for name in ("input", "mask"):
            assert row[name].shape[0] == 9
            np.testing.assert_array_equal(row[name][:count], [single[name] for single in slices])
            assert not row[name][count:].any()
        assert row["weight"].tolist() == [1] * count + [0] * (9 - count)
        assert (row["volume"].shape, int(row["volume"])) == ((), i)


def test_every_volume_occurs_once_in_each_pass_in_a_new_order(source):
    volumes = VolumeSource(source.volumes, Canvas(SIZE), depth=7)
    batches = training_batches(volumes, 1, seed=3)
    indices = [int(next(batches)["volume"][0]) for _ in range(30)]
    passes = [tuple(indices[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in passes)
    assert len(set(passes)) > 1


def test_the_last_batch_of_volumes_is_padded_with_rows_of_weight_0(source):
    *_, last = evaluation_batches(VolumeSource(source.volumes, Canvas(SIZE), depth=7), 2)
    assert last["input"].shape == (2, 7, SIZE, SIZE, 1)
    assert last["weight"].sum(1).tolist() == [SLICES[2], 0]
