"""Random patches: the same for the same seed, a third around structures, and everywhere in a scan."""

import numpy as np
import pytest
from tests.data.test_planned import plan_for

from jaxla.data.batches import evaluation_batches, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.nnunet.patches import PatchSource
from jaxla.nnunet.preprocessing import prepare_planned
from tests.data.nifti import save

SHAPE = (12, 20, 16)  # of what is prepared: depth, height, width


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two scans whose every voxel tells where it is, with two small structures; one without any."""
    folder = tmp_path_factory.mktemp("patches")
    for n in range(3):
        image = np.arange(np.prod(SHAPE)).reshape(SHAPE) + 1000 * n + 1
        mask = np.zeros(SHAPE, np.uint8)
        if n < 2:
            mask[2, 3, 4], mask[9:11, 15:18, 12:14] = 1, 2
        affine = np.diag([-1.0, -1.0, -2.0, 1.0])
        save(folder / f"{n}.nii.gz", image.transpose(2, 1, 0).astype(np.int32), affine)
        save(folder / f"{n}_mask.nii.gz", mask.transpose(2, 1, 0), affine)
    prepared = prepare_cases(find_cases(folder, "a:1;b:2"), folder / "cache")
    return prepare_planned(prepared, *plan_for((2.0, 1.0, 1.0)), folder / "cache")


def source(volumes, size=(4, 8, 6), inner=None, batch_size=3, seed=(0, 0), length=6):
    return PatchSource(volumes, size, inner or size, batch_size, seed, length)


def test_patches_follow_from_their_number_and_the_seed(volumes):
    first, again, other = (source(volumes, seed=(s, 0)) for s in (1, 1, 2))
    of_first = [first[n] for n in range(6)]
    for n, row in enumerate(of_first):
        np.testing.assert_array_equal(row["input"], again[n]["input"])
        np.testing.assert_array_equal(row["mask"], again[n]["mask"])
    assert not all(np.array_equal(row["input"], other[n]["input"]) for n, row in enumerate(of_first))
    batch = next(training_batches(first, 3, seed=5))
    np.testing.assert_array_equal(batch["input"], np.stack([row["input"] for row in of_first[:3]]))
    batches = list(evaluation_batches(first, 3))
    np.testing.assert_array_equal(batches[1]["mask"], np.stack([row["mask"] for row in of_first[3:]]))


def test_no_patch_comes_twice_and_the_order_can_be_gone_on_with(volumes):
    whole = training_batches(source(volumes), 3, seed=0)
    seen = [next(whole)["input"] for _ in range(4)]
    assert len({batch.tobytes() for batch in seen}) == 4
    resumed = training_batches(source(volumes), 3, seed=0)
    next(resumed)
    state = resumed.get_state()
    resumed = training_batches(source(volumes), 3, seed=0)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["input"], seen[1])


@pytest.mark.parametrize("size", [(4, 8, 6), (8, 6)])
def test_image_and_mask_are_cut_from_the_same_place(volumes, size):
    patches = source(volumes[:1], size)
    image, mask = volumes[0].image, volumes[0].mask
    flat = {float(value): place for place, value in np.ndenumerate(image)}
    for n in range(12):
        row = patches[n]
        assert row["input"].shape == (*size, 1)
        for place, value in np.ndenumerate(row["input"][..., 0]):
            if value:
                assert row["mask"][place] == mask[flat[float(value)]]


@pytest.mark.parametrize("batch_size", [2, 3, 9])
def test_the_last_third_of_a_batch_is_around_structures_of_either_class(volumes, batch_size):
    """Of a batch of two the second, of three the third, of nine the last three: as nnU-Net rounds."""
    patches = source(volumes[:2], (2, 2, 2), batch_size=batch_size)
    sure = [n for n in range(40 * batch_size) if n % batch_size >= round(batch_size * 0.67)]
    classes = [set(np.unique(patches[n]["mask"]).tolist()) for n in sure]
    assert all(found & {1, 2} for found in classes)
    share = np.mean([1 in found for found in classes])
    assert 0.3 < share < 0.7  # each class as likely, though one has a single voxel
    others = [n for n in range(40 * batch_size) if n not in sure]
    assert np.mean([bool(set(np.unique(patches[n]["mask"]).tolist()) & {1, 2}) for n in others]) < 0.3


def test_a_scan_without_structures_gives_patches_anywhere(volumes):
    patches = source(volumes[2:], (2, 2, 2), batch_size=1)
    assert len({patches[n]["input"].tobytes() for n in range(20)}) > 10


def test_patches_that_are_read_larger_reach_beyond_the_scan_and_no_further(volumes):
    """So that what is seen in the end, their middle, lies at the border as often as elsewhere."""
    image = volumes[0].image
    starts = set()
    patches = source(volumes[:1], (6, 12, 10), (4, 8, 6), batch_size=1000)
    for n in range(400):
        row = patches[n]
        middle = row["input"][1:-1, 2:-2, 2:-2, 0]
        assert (middle != 0).all()
        place = np.argwhere(image == middle[0, 0, 0])[0]
        starts.add(tuple(place.tolist()))
    lowest, highest = np.min(list(starts), 0), np.max(list(starts), 0)
    np.testing.assert_array_equal(lowest, 0)
    np.testing.assert_array_equal(highest, np.array(SHAPE) - (4, 8, 6))


def test_patches_larger_than_a_scan_hold_all_of_it(volumes):
    row = source(volumes[:1], (16, 24, 20))[0]
    inside = row["input"][..., 0] != 0
    assert inside.sum() == np.prod(SHAPE)
    assert (row["mask"][~inside] == -1).all()
    assert (row["mask"][inside] >= 0).all()


def test_slices_are_taken_one_at_a_time(volumes):
    patches = source(volumes[:1], (20, 16), batch_size=1000)
    for n in range(12):
        plane = patches[n]["input"][..., 0]
        depths = {int(np.argwhere(volumes[0].image == value)[0][0]) for value in plane[plane != 0].ravel()[::17]}
        assert len(depths) == 1
