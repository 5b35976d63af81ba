"""Random patches: reproducible, a third of them around structures, the others anywhere in a scan."""

import numpy as np
import pytest

from jaxla.data.batches import evaluation_batches, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.nnunet.patches import PatchSource
from jaxla.nnunet.preprocessing import preprocess_volumes
from tests.data.nifti import save
from tests.nnunet.test_preprocessing import make_tiny_plan

SHAPE = (12, 20, 16)  # shape of the preprocessed volumes


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two scans with two small structures, and one without any; each voxel has its own grey value."""
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
    return preprocess_volumes(prepared, *make_tiny_plan((2.0, 1.0, 1.0)), folder / "cache")


def make_source(volumes, size=(4, 8, 6), patch_size=None, batch_size=3, seed=(0, 0), length=6):
    return PatchSource(volumes, size, patch_size or size, batch_size, seed, length)


def test_patches_depend_only_on_seed_and_index(volumes):
    first, again, reseeded = (make_source(volumes, seed=(s, 0)) for s in (1, 1, 2))
    rows = [first[n] for n in range(6)]
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row["input"], again[n]["input"])
        np.testing.assert_array_equal(row["mask"], again[n]["mask"])
    assert not all(np.array_equal(row["input"], reseeded[n]["input"]) for n, row in enumerate(rows))
    batch = next(training_batches(first, 3, seed=5))
    np.testing.assert_array_equal(batch["input"], np.stack([row["input"] for row in rows[:3]]))
    batches = list(evaluation_batches(first, 3))
    np.testing.assert_array_equal(batches[1]["mask"], np.stack([row["mask"] for row in rows[3:]]))


def test_no_patch_repeats_and_a_saved_position_resumes(volumes):
    batches = training_batches(make_source(volumes), 3, seed=0)
    seen = [next(batches)["input"] for _ in range(4)]
    assert len({batch.tobytes() for batch in seen}) == 4
    resumed = training_batches(make_source(volumes), 3, seed=0)
    next(resumed)
    state = resumed.get_state()
    resumed = training_batches(make_source(volumes), 3, seed=0)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["input"], seen[1])


@pytest.mark.parametrize("size", [(4, 8, 6), (8, 6)])
def test_image_and_mask_show_the_same_voxels(volumes, size):
    patches = make_source(volumes[:1], size)
    image, mask = volumes[0].image, volumes[0].mask
    indices = {float(value): index for index, value in np.ndenumerate(image)}
    for n in range(12):
        row = patches[n]
        assert row["input"].shape == (*size, 1)
        for index, value in np.ndenumerate(row["input"][..., 0]):
            if value:
                assert row["mask"][index] == mask[indices[float(value)]]


@pytest.mark.parametrize("batch_size", [2, 3, 9])
def test_last_third_of_a_batch_contains_a_structure_of_either_class(volumes, batch_size):
    """This is the second of two rows, the third of three, or the last three of nine, rounded as in nnU-Net."""
    patches = make_source(volumes[:2], (2, 2, 2), batch_size=batch_size)
    foreground = [n for n in range(40 * batch_size) if n % batch_size >= round(batch_size * 0.67)]
    classes = [set(np.unique(patches[n]["mask"]).tolist()) for n in foreground]
    assert all(found & {1, 2} for found in classes)
    assert 0.3 < np.mean([1 in found for found in classes]) < 0.7  # classes are equally likely, whatever their size
    anywhere = [n for n in range(40 * batch_size) if n not in foreground]
    assert np.mean([bool(set(np.unique(patches[n]["mask"]).tolist()) & {1, 2}) for n in anywhere]) < 0.3


def test_patches_of_scans_without_structures_lie_anywhere(volumes):
    patches = make_source(volumes[2:], (2, 2, 2), batch_size=1)
    assert len({patches[n]["input"].tobytes() for n in range(20)}) > 10


def test_initial_patches_extend_beyond_the_scan_by_at_most_their_margin(volumes):
    """The centre of the patch, which the network sees, may touch the border of the scan, but not cross it."""
    image = volumes[0].image
    starts = set()
    patches = make_source(volumes[:1], (6, 12, 10), (4, 8, 6), batch_size=1000)
    for n in range(400):
        row = patches[n]
        centre = row["input"][1:-1, 2:-2, 2:-2, 0]
        assert (centre != 0).all()
        starts.add(tuple(np.argwhere(image == centre[0, 0, 0])[0].tolist()))
    lowest, highest = np.min(list(starts), 0), np.max(list(starts), 0)
    np.testing.assert_array_equal(lowest, 0)
    np.testing.assert_array_equal(highest, np.array(SHAPE) - (4, 8, 6))


def test_patches_larger_than_a_scan_contain_it(volumes):
    row = make_source(volumes[:1], (16, 24, 20))[0]
    inside = row["input"][..., 0] != 0
    assert inside.sum() == np.prod(SHAPE)
    assert (row["mask"][~inside] == -1).all()
    assert (row["mask"][inside] >= 0).all()


def test_2d_patches_show_a_single_slice(volumes):
    patches = make_source(volumes[:1], (20, 16), batch_size=1000)
    for n in range(12):
        plane = patches[n]["input"][..., 0]
        depths = {int(np.argwhere(volumes[0].image == value)[0][0]) for value in plane[plane != 0].ravel()[::17]}
        assert len(depths) == 1
