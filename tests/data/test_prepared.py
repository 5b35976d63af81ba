"""Prepared volumes: their content, when they are prepared again, and concurrent preparation."""

import gzip
import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.inputs import Canvas
from jaxla.data.labels import Labels
from jaxla.data.prepared import prepare_cases
from tests.data.nifti import AFFINE, SHAPE, image_array, mask_array, save, write_flat_pairs, write_lascarqs


def modification_times(cache):
    """Return file -> modification time."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def assert_slices(volume, image, mask):
    """Check the slices of a volume on the grid of AFFINE: x runs left (columns), y posterior (rows), z superior."""
    np.testing.assert_array_equal(volume.image, image.transpose(2, 1, 0)[::-1])
    np.testing.assert_array_equal(volume.mask, mask.transpose(2, 1, 0)[::-1])


def test_an_input_with_neighbours_contains_them_in_order(tmp_path):
    volume, *_ = prepare_cases(find_cases(write_lascarqs(tmp_path / "data", 2)), tmp_path / "cache")
    frame = Canvas(32).frame(volume.shape[1:], volume.spacing[1:])
    single = [volume.input(index, frame) for index in range(4)]
    assert len({image.tobytes() for image in single}) == 4
    for index, near in enumerate(([0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3])):
        expected = np.concatenate([single[i] for i in near], axis=-1)
        np.testing.assert_array_equal(volume.input(index, frame, neighbours=1), expected)


def test_a_prepared_volume_contains_its_scan_slice_by_slice(tmp_path):
    folder = write_lascarqs(tmp_path / "data", 2, value=420)
    first, second = prepare_cases(find_cases(folder), tmp_path / "cache")
    assert_slices(first, image_array(1), mask_array())
    assert_slices(second, image_array(2), mask_array())
    assert first.id == "train_1"
    assert first.case.image == folder / "train_1" / "enhanced.nii.gz"
    assert first.shape == (4, 14, 16)
    assert first.spacing == (2.5, 0.75, 0.75)
    assert first.slice_axis == "head-foot"
    assert first.image.dtype == np.int16
    assert first.mask.dtype == np.uint8
    assert first.intensity_range == tuple(np.percentile(image_array(1), (0.5, 99.5)))
    foreground = np.count_nonzero(mask_array())
    assert first.class_voxels == (mask_array().size - foreground, foreground)


def test_classes_that_a_mask_lacks_are_counted_as_0(tmp_path):
    dataset = replace(
        find_cases(write_flat_pairs(tmp_path / "data", 1, value=7)), labels=Labels(("a", "b", "c"), ((1,), (7,), (9,)))
    )
    (volume,) = prepare_cases(dataset, tmp_path / "cache")
    foreground = np.count_nonzero(mask_array())
    assert volume.class_voxels == (mask_array().size - foreground, 0, foreground, 0)
    assert_slices(volume, image_array(0), 2 * mask_array())


def test_any_orientation_in_the_file_gives_the_same_slices(tmp_path):
    image, mask = nib.Nifti1Image(image_array(), AFFINE), nib.Nifti1Image(mask_array(), AFFINE)
    orientation = np.array([[2, 1], [0, -1], [1, -1]])
    for name, orient in (("a", lambda x: x), ("b", lambda x: x.as_reoriented(orientation))):
        nib.save(orient(image), save(tmp_path / "data" / f"{name}.nii.gz", image_array()))
        nib.save(orient(mask), save(tmp_path / "data" / f"{name}_mask.nii.gz", mask_array()))
    volumes = prepare_cases(find_cases(tmp_path / "data"), tmp_path / "cache")
    for volume in volumes:
        assert_slices(volume, image_array(), mask_array())
    assert nib.load(tmp_path / "data" / "b.nii.gz").shape == (14, 4, 16)


def test_arrays_are_memory_mapped_and_read_only(tmp_path):
    (volume,) = prepare_cases(find_cases(write_flat_pairs(tmp_path / "data", 1)), tmp_path / "cache")
    for array in (volume.image, volume.mask):
        assert isinstance(array, np.memmap)
        assert array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_second_run_uses_the_volumes_of_the_first(tmp_path):
    dataset = find_cases(write_flat_pairs(tmp_path / "data", 3))
    first = prepare_cases(dataset, tmp_path / "cache")
    written = modification_times(tmp_path / "cache")
    assert len(written) == 9  # three files for each volume
    assert prepare_cases(dataset, tmp_path / "cache") == first
    assert modification_times(tmp_path / "cache") == written


def test_prepared_folders_depend_on_content_and_not_on_names(tmp_path):
    shutil.move(write_flat_pairs(tmp_path / "data", 2), tmp_path / "moved")
    first = prepare_cases(find_cases(tmp_path / "moved"), tmp_path / "cache")
    written = modification_times(tmp_path / "cache")
    (tmp_path / "renamed").mkdir()
    for path in (tmp_path / "moved").iterdir():
        shutil.copy(path, tmp_path / "renamed" / path.name.replace("case", "patient"))
    again = prepare_cases(find_cases(tmp_path / "renamed"), tmp_path / "cache")
    assert [volume.id for volume in again] == ["patient_0", "patient_1"]
    assert [volume.folder for volume in again] == [volume.folder for volume in first]
    assert modification_times(tmp_path / "cache") == written


def test_a_changed_image_or_mask_is_prepared_again(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 1)
    (first,) = prepare_cases(find_cases(root), tmp_path / "cache")
    save(root / "case_0.nii.gz", image_array(50))
    (second,) = prepare_cases(find_cases(root), tmp_path / "cache")
    assert_slices(second, image_array(50), mask_array())
    save(root / "case_0_mask.nii.gz", np.flip(mask_array(), 0))
    (third,) = prepare_cases(find_cases(root), tmp_path / "cache")
    assert_slices(third, image_array(50), np.flip(mask_array(), 0))
    assert len({first.folder, second.folder, third.folder}) == 3
    assert_slices(first, image_array(0), mask_array())  # kept for a run that reads it


def test_different_labels_are_prepared_separately(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 1, value=2)
    (any_value,) = prepare_cases(find_cases(root), tmp_path / "cache")
    (background,) = prepare_cases(find_cases(root, "LA:1;background:2"), tmp_path / "cache")
    (second_class,) = prepare_cases(find_cases(root, "LA:1;wall:2"), tmp_path / "cache")
    assert_slices(any_value, image_array(0), mask_array())
    assert_slices(background, image_array(0), 0 * mask_array())
    assert_slices(second_class, image_array(0), 2 * mask_array())


def test_incomplete_folders_of_an_interrupted_run_are_ignored(tmp_path):
    leftover = tmp_path / "cache" / "volumes" / f".{32 * 'a'}.volume"
    leftover.mkdir(parents=True)
    (leftover / "image.npy").write_bytes(b"incomplete")
    (volume,) = prepare_cases(find_cases(write_flat_pairs(tmp_path / "data", 1)), tmp_path / "cache")
    assert_slices(volume, image_array(0), mask_array())
    assert sorted(path.name for path in volume.folder.parent.iterdir()) == [f".{32 * 'a'}.volume", volume.folder.name]


@pytest.mark.parametrize("lost", ["volume.json", "image.npy", "mask.npy"])
def test_a_prepared_folder_that_lacks_a_file_is_prepared_again(tmp_path, lost):
    dataset = find_cases(write_flat_pairs(tmp_path / "data", 1))
    (volume,) = prepare_cases(dataset, tmp_path / "cache")
    (volume.folder / lost).unlink()
    (again,) = prepare_cases(dataset, tmp_path / "cache")
    assert_slices(again, image_array(0), mask_array())


# --- concurrent preparation ------------------------------------------------------------------------------------------


def wait_and_prepare(barrier, root, cache):
    barrier.wait(timeout=30)
    prepare_cases(find_cases(root), cache)


def test_two_processes_can_prepare_the_same_volumes(tmp_path):
    root, cache = write_flat_pairs(tmp_path / "data", 6), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=wait_and_prepare, args=(barrier, root, cache)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list((cache / "volumes").iterdir())) == 6  # no incomplete folders are left
    written = modification_times(cache)
    for n, volume in enumerate(prepare_cases(find_cases(root), cache)):
        assert_slices(volume, image_array(n), mask_array())
    assert modification_times(cache) == written


def test_eight_threads_can_prepare_the_same_volumes(tmp_path):
    dataset, cache = find_cases(write_flat_pairs(tmp_path / "data", 4)), tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        prepared = list(pool.map(lambda _: prepare_cases(dataset, cache), range(8)))
    for volumes in prepared:
        for n, volume in enumerate(volumes):
            assert_slices(volume, image_array(n), mask_array())
    assert len(list((cache / "volumes").iterdir())) == 4


# --- errors ----------------------------------------------------------------------------------------------------------


def test_the_same_image_in_two_cases_is_refused(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 3)
    shutil.copy(root / "case_0.nii.gz", root / "case_2.nii.gz")
    with pytest.raises(InputError, match=f"^{root / 'case_2.nii.gz'}: the same image as case case_0\\. "):
        prepare_cases(find_cases(root), tmp_path / "cache")


def test_a_mask_on_another_grid_is_refused_and_nothing_is_written(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 1)
    save(root / "case_0_mask.nii.gz", mask_array(shape=(16, 14, 5)))
    with pytest.raises(InputError, match=f"^{root / 'case_0_mask.nii.gz'}: not on the grid of .*case_0.nii.gz"):
        prepare_cases(find_cases(root), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_value_without_a_class_is_refused_and_nothing_is_written(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 1, value=3)
    with pytest.raises(InputError, match=f"^{root / 'case_0_mask.nii.gz'}: label values 3 are not"):
        prepare_cases(find_cases(root, "LA:1"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("a file")
    cache = tmp_path / "file" / "cache"
    with pytest.raises(InputError, match=f"^cache-dir={cache}: cannot be written"):
        prepare_cases(find_cases(write_flat_pairs(tmp_path / "data", 1)), cache)


def test_volume_json_describes_the_slices(tmp_path):
    (volume,) = prepare_cases(find_cases(write_flat_pairs(tmp_path / "data", 1)), tmp_path / "cache")
    described = json.loads((volume.folder / "volume.json").read_text())
    assert described["shape"] == [SHAPE[2], SHAPE[1], SHAPE[0]]
    assert described["spacing"] == [2.5, 0.75, 0.75]
    assert described["slice_axis"] == "head-foot"


def test_a_recompressed_scan_is_recognised_as_the_same_image(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 2)
    scan = nib.load(root / "case_0.nii.gz")
    (root / "case_1.nii.gz").write_bytes(gzip.compress(scan.to_bytes(), compresslevel=9))
    assert (root / "case_0.nii.gz").read_bytes() != (root / "case_1.nii.gz").read_bytes()
    with pytest.raises(InputError, match="the same image as case case_0"):
        prepare_cases(find_cases(root), tmp_path / "cache")


def test_masks_with_different_values_need_labels(tmp_path):
    root = write_flat_pairs(tmp_path / "data", 2)
    path = root / "case_1_mask.nii.gz"
    mask = nib.load(path)
    nib.save(nib.Nifti1Image(np.uint8(mask.get_fdata() > 0) * 2, mask.affine), path)
    with pytest.raises(InputError, match=r"Set data\.labels='a:1,2' if both are the same class, or"):
        prepare_cases(find_cases(root), tmp_path / "cache")
    volumes = prepare_cases(find_cases(root, "a:1,2"), tmp_path / "cache")
    assert set(np.unique(volumes[1].mask)) == {0, 1}
