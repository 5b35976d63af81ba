"""Cached features of a frozen backbone equal the network's, are computed once, and are recomputed if damaged."""

import logging
import math
import shutil
import time
from functools import cache

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from jaxla.config import Training
from jaxla.data.batches import SliceSource
from jaxla.data.inputs import Canvas
from jaxla.training.features import BATCH, MAX_DISK_FRACTION, FeatureCache
from jaxla.training.loop import fit
from jaxla.training.trainer import Trainer
from tests.training.faults import (
    flip_a_bit,
    limit_file_size,
    package_messages,
    report_free_bytes,
    start_process,
    truncate,
)
from tests.training.feature_driver import compute_features, make_fusion, make_network
from tests.training.scans import disc_scans, prepare_scans

SIZE = 32


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with three scans of 5, 6 and 7 slices."""
    folder = tmp_path_factory.mktemp("data") / "scans"
    disc_scans(folder)
    return folder


@pytest.fixture(scope="module")
def volumes(scans):
    return prepare_scans(scans)


@pytest.fixture
def scans_copy(scans, tmp_path):
    """A copy of the scans that a test may change."""
    return shutil.copytree(scans, tmp_path / "scans", ignore=shutil.ignore_patterns("cache"))


@pytest.fixture(scope="module")
def feature_folder(volumes, tmp_path_factory):
    """A cache folder with the features of the scans."""
    folder = tmp_path_factory.mktemp("cached")
    make_cache(folder).features(volumes)
    return folder


def make_cache(folder, size=SIZE, seed=0, **options):
    return FeatureCache(folder, make_network(seed, **options), "tiny", Canvas(size))


def network_inputs(volume, size=SIZE):
    frame = Canvas(size).frame(volume.shape[1:], volume.spacing[1:])
    return np.stack([volume.input(index, frame) for index in range(volume.shape[0])])


def modification_times(folder, pattern="*.npy"):
    return {path: path.stat().st_mtime_ns for path in (folder / "features").rglob(pattern)}


def to_bits(array):
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


@cache
def jitted_features(**options):
    return jax.jit(make_network(**options).features)


def compute_without_cache(volume, size=SIZE, **options):
    """Compute the features of a volume's slices in one batch, as large as those of the cache, padded with zeros."""
    images = np.zeros((BATCH, size, size, 1), np.float32)
    images[: volume.shape[0]] = network_inputs(volume, size)
    return np.asarray(jitted_features(**options)(images))[: volume.shape[0]]


# --- values ---


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_cached_features_equal_the_backbones_bit_for_bit_and_have_the_counted_size(volumes, tmp_path, dtype, itemsize):
    cache = make_cache(tmp_path, dtype=dtype)
    size = cache.count_bytes(volumes)
    assert size == (5 + 6 + 7) * 4 * 4 * 32 * itemsize
    features = cache.features(volumes)
    files = list((tmp_path / "features").rglob("*.npy"))
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) == size + 3 * 128  # NumPy's headers
    for volume, volume_features in zip(volumes, features, strict=True):
        assert len(volume_features) == volume.shape[0]
        assert volume_features.shape == (volume.shape[0], 4, 4, 32)
        found = np.stack([volume_features[index] for index in range(len(volume_features))])
        assert found.dtype == dtype
        np.testing.assert_array_equal(to_bits(found), to_bits(compute_without_cache(volume, dtype=dtype)))


def test_features_depend_on_the_batch_only_by_rounding(volumes, feature_folder):
    for volume, volume_features in zip(volumes, make_cache(feature_folder).features(volumes), strict=True):
        for index, image in enumerate(network_inputs(volume)):
            expected = jitted_features()(image[None])[0]
            # measured: 1.3e-6, for values up to 3.7
            np.testing.assert_allclose(volume_features[index], expected, atol=3e-6)


def test_features_of_a_volume_with_more_slices_than_a_batch(scans_copy, tmp_path):
    image = np.random.default_rng(0).random((32, 32, BATCH + 3), np.float32)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(image, affine), scans_copy / "case0.nii.gz")
    nib.save(nib.Nifti1Image(np.uint8(image > 0.9), affine), scans_copy / "case0_mask.nii.gz")
    volume = prepare_scans(scans_copy)[0]
    assert volume.shape[0] == BATCH + 3
    (features,) = make_cache(tmp_path).features([volume])
    images = network_inputs(volume)
    padded = np.concatenate([images[BATCH:], np.zeros((BATCH - 3, SIZE, SIZE, 1), np.float32)])
    expected = np.concatenate([jitted_features()(images[:BATCH]), jitted_features()(padded)[:3]])
    np.testing.assert_array_equal(np.stack([features[i] for i in range(BATCH + 3)]), expected)


def test_features_of_a_fusion_equal_those_of_its_blocks_bit_for_bit(volumes, tmp_path):
    cache = FeatureCache(tmp_path, make_fusion(), "tiny", Canvas(SIZE))
    assert cache.count_bytes(volumes) == (5 + 6 + 7) * 2 * 4 * 4 * 32 * 4
    images = np.zeros((BATCH, SIZE, SIZE, 1), np.float32)
    images[: volumes[0].shape[0]] = network_inputs(volumes[0])
    expected = jax.jit(make_fusion().features)(images)
    (features,) = cache.features(volumes[:1])
    assert features.shape == (5, 2, 4, 4, 32)
    for index in range(5):
        np.testing.assert_array_equal(features[index], expected[index])


@pytest.mark.parametrize("make", [make_network, make_fusion])
def test_training_on_features_equals_training_on_images(volumes, tmp_path, make):
    """The metrics are equal up to rounding, with the frozen backbone in the network and without it."""
    recipe = Training(epochs=3, batch_size=4, learning_rate=1e-2, patience=3)
    features = FeatureCache(tmp_path / "cache", make(), "tiny", Canvas(SIZE)).features(volumes)
    histories = {}
    for name in ("images", "features"):
        trained = make() if name == "images" else make().on_features((SIZE, SIZE))
        train, val = (
            SliceSource(
                volumes[part],
                Canvas(SIZE),
                features[part] if name == "features" else None,
                with_images=make is make_fusion,
            )
            for part in (slice(1, None), slice(0, 1))
        )
        trainer = Trainer(trained, recipe, steps_per_epoch=4, train_backbone=False)
        histories[name] = fit(trainer, train, val, tmp_path / name).history
    for on_images, on_features in zip(histories["images"], histories["features"], strict=True):
        for key in ("train_loss", "val_loss", "val_dice", "val_iou"):
            assert on_features[key] == pytest.approx(on_images[key], rel=3e-7), key  # measured: 1.1e-7
    assert histories["features"][-1]["train_loss"] < 0.9 * histories["features"][0]["train_loss"]


# --- computed once ---


def test_features_are_computed_once_and_then_read(volumes, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxla")
    cache = make_cache(tmp_path)
    assert cache.find_missing(volumes) == volumes
    cache.features(volumes[:2])
    assert cache.find_missing(volumes) == volumes[2:]
    assert "computing the features of 2 volumes once, 22.5kB, cached in " in package_messages(caplog, logging.INFO)[0]
    first = modification_times(tmp_path)
    assert len(first) == 2
    make_cache(tmp_path).features(volumes)
    again = modification_times(tmp_path)
    assert len(again) == 3
    assert first.items() < again.items()
    caplog.clear()
    make_cache(tmp_path).features(volumes)
    assert modification_times(tmp_path) == again
    assert not [line for line in package_messages(caplog, logging.INFO) if "computed" in line]


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"size": 40}, {"dtype": jnp.bfloat16}], ids=["weights", "size", "precision"]
)
def test_another_backbone_size_or_precision_has_separate_features(volumes, feature_folder, tmp_path, changed):
    folder = shutil.copytree(feature_folder, tmp_path / "kept")
    cache = make_cache(folder, **changed)
    assert cache.find_missing(volumes) == volumes
    features = cache.features(volumes[:1])
    np.testing.assert_array_equal(to_bits(features[0][2]), to_bits(compute_without_cache(volumes[0], **changed)[2]))
    assert make_cache(folder).find_missing(volumes) == []
    assert len(modification_times(folder)) == 4


def change_a_voxel(scans):
    image = nib.load(scans / "case1.nii.gz")
    array = image.get_fdata(dtype=np.float32)
    array[3, 4, 5] = array[4, 4, 5]
    nib.save(nib.Nifti1Image(array, image.affine), scans / "case1.nii.gz")


def change_the_spacing(scans):
    for path in (scans / "case1.nii.gz", scans / "case1_mask.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1.0, 1.25, 3.0, 1.0])), path)


def change_the_mask(scans):
    mask = nib.load(scans / "case1_mask.nii.gz")
    array = np.asarray(mask.dataobj).copy()
    array[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(array, mask.affine), scans / "case1_mask.nii.gz")


def rename_files(scans):
    for path in scans.glob("case1*"):
        path.rename(path.with_name(path.name.replace("case1", "another")))


@pytest.mark.parametrize(
    ("change", "missing"),
    [(change_a_voxel, ["case1"]), (change_the_spacing, ["case1"]), (change_the_mask, []), (rename_files, [])],
)
def test_changed_slices_have_separate_features(scans_copy, feature_folder, change, missing):
    assert make_cache(feature_folder).find_missing(prepare_scans(scans_copy)) == []
    change(scans_copy)
    assert [volume.id for volume in make_cache(feature_folder).find_missing(prepare_scans(scans_copy))] == missing


# --- damaged ---


def replace_by_another_volume(path):
    """Replace the features of a volume and their hash by those of another volume."""
    source = next(p for p in sorted(path.parent.glob("*.npy")) if p != path)
    shutil.copy(source, path)
    shutil.copy(source.with_suffix(".json"), path.with_suffix(".json"))


DAMAGED = {
    "a bit flipped": flip_a_bit,
    "a bit of the last number flipped": lambda path: flip_a_bit(path, 0.9999),
    "truncated": truncate,
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "of another volume": replace_by_another_volume,
    "its hash truncated": lambda path: truncate(path.with_suffix(".json")),
    "its hash emptied": lambda path: path.with_suffix(".json").write_bytes(b""),
    "its hash in another format": lambda path: path.with_suffix(".json").write_text("{}"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_features_are_reported_and_computed_again(volumes, feature_folder, tmp_path, caplog, kind):
    folder = shutil.copytree(feature_folder, tmp_path / "kept")
    cache = make_cache(folder)
    path = cache.folder / f"{volumes[1].slices_sha256[:32]}.npy"
    before, content = modification_times(folder), path.read_bytes()
    DAMAGED[kind](path)
    caplog.set_level(logging.WARNING, "jaxla")
    features = cache.features(volumes)
    assert package_messages(caplog) == [
        f"features of case1 were damaged ({path.with_suffix('')}): computing them again"
    ]
    np.testing.assert_array_equal(features[1][5], compute_without_cache(volumes[1])[5])
    assert path.read_bytes() == content
    after = modification_times(folder)
    assert {name for name in after if after[name] != before[name]} == {path}
    caplog.clear()
    make_cache(folder).features(volumes)
    assert package_messages(caplog) == []


# --- several processes ---


def count_calls(folder):
    return len((folder / "calls").read_text().splitlines())


def assert_intact(folder, volumes, feature_folder):
    assert modification_times(folder, "*.part") == {}
    cache, expected = make_cache(folder), make_cache(feature_folder).folder
    for volume in volumes:
        name = f"{volume.slices_sha256[:32]}.npy"
        assert (cache.folder / name).read_bytes() == (expected / name).read_bytes()
        assert (cache.folder / name).with_suffix(".json").exists()


def test_two_processes_compute_each_volume_once(scans, volumes, feature_folder, tmp_path):
    processes = [start_process(tmp_path / f"{n}.log", compute_features, scans, tmp_path) for n in (1, 2)]
    for process in processes:
        process.join(100)
    output = "".join((tmp_path / f"{n}.log").read_text() for n in (1, 2))
    assert [process.exitcode for process in processes] == [0, 0], output
    assert "damaged" not in output
    assert count_calls(tmp_path) == 3
    assert_intact(tmp_path, volumes, feature_folder)


def wait_for(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_continues_the_work_of_a_killed_process(scans, volumes, feature_folder, tmp_path):
    """The first process is killed with the second volume's file half-written, while another process waits for it."""
    killed = start_process(tmp_path / "killed.log", compute_features, scans, tmp_path, 2)
    wait_for((tmp_path / "paused").exists)
    assert len(modification_times(tmp_path)) == 1
    assert len(modification_times(tmp_path, "*.part")) == 1
    before = modification_times(tmp_path)
    waiting = start_process(tmp_path / "waiting.log", compute_features, scans, tmp_path)
    log = tmp_path / "waiting.log"
    wait_for(lambda: log.exists() and "another process computes features; waiting for it" in log.read_text())
    assert count_calls(tmp_path) == 2
    killed.kill()
    waiting.join(100)
    output = log.read_text()
    assert waiting.exitcode == 0, output
    assert "computing the features of 2 volumes once" in output
    assert "damaged" not in output
    assert count_calls(tmp_path) == 2 + 2
    assert before.items() < modification_times(tmp_path).items()  # complete features are not computed again
    assert_intact(tmp_path, volumes, feature_folder)


# --- full disk ---


def test_features_that_do_not_fit_on_the_disk_are_not_computed(volumes, tmp_path, monkeypatch, caplog):
    cache = make_cache(tmp_path)
    needed = cache.count_bytes(volumes)
    sufficient = math.ceil(needed / MAX_DISK_FRACTION)
    report_free_bytes(monkeypatch, sufficient - 1)
    assert cache.features(volumes) is None
    assert list(tmp_path.iterdir()) == []
    (message,) = package_messages(caplog)
    assert message.startswith(f"features of 3 volumes would take 36.9kB in {cache.folder}, where ")
    assert "the backbone runs in every epoch" in message

    caplog.clear()
    report_free_bytes(monkeypatch, sufficient)
    assert len(cache.features(volumes)) == 3
    report_free_bytes(monkeypatch, 0)
    assert len(cache.features(volumes)) == 3  # cached features need no space
    assert package_messages(caplog) == []


def test_features_are_removed_if_the_disk_fills_up_while_they_are_written(volumes, feature_folder, tmp_path, caplog):
    """The features of the first volume take 10240 bytes, those of the second 12288."""
    cache = make_cache(tmp_path)
    with limit_file_size(12000):
        assert cache.features(volumes) is None
    (message,) = package_messages(caplog)
    assert message.startswith(f"features cannot be cached in {cache.folder} (File too large): ")
    assert "the backbone runs in every epoch" in message
    assert [path.name for path in cache.folder.iterdir() if "lock" not in path.name] == ["backbone.json"]

    caplog.clear()
    assert len(cache.features(volumes)) == 3
    assert package_messages(caplog) == []
    assert_intact(tmp_path, volumes, feature_folder)
