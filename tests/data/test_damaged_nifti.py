"""Random damage to NIfTI headers and gzip streams gives the correct scan, a warning, or one InputError."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.data.volumes import read_image, read_mask, write_volume
from tests.data.nifti import AFFINE, image_array, mask_array

HEADER_BYTES = 352
SCALING = range(112, 120)  # bytes of scl_slope and scl_inter, for which any value may be intended
SPECIAL_VALUES = [  # values that header fields may treat specially, in little and big endian
    np.array(value, order + code).tobytes()
    for order in "<>"
    for code, values in (
        ("f4", (0, -1, 1e-38, 1e-3, 1e3, 1e30, -1e38, np.nan, np.inf, -np.inf)),
        ("i2", (0, 1, 2, 3, 4, 7, 8, -1, 32767, -32768)),
        ("i1", (0, 1, 2, 3, 5, -1, 127)),
    )
    for value in values
]
MAX_BYTES = 25e6  # peak memory for reading a file of 2 kB; gzip streams are read in pieces of 4 MB


def intact_scan(path):
    """Return the bytes of a scan whose sform and qform agree."""
    image = nib.Nifti1Image(image_array(), AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(AFFINE, 1)
    nib.save(image, path)
    return path.read_bytes()


def damage_header(rng, content):
    """Overwrite one to four bytes in the header; return the content and the range of bytes."""
    new = rng.bytes(rng.integers(1, 3)) if rng.random() < 0.4 else SPECIAL_VALUES[rng.integers(len(SPECIAL_VALUES))]
    start = rng.integers(HEADER_BYTES // len(new)) * len(new)
    return content[:start] + new + content[start + len(new) :], range(start, start + len(new))


def damage_stream(rng, content):
    """Change, remove, repeat or append bytes anywhere in a gzip stream."""
    start, length = rng.integers(len(content)), rng.integers(1, 40)
    head, middle, tail = content[:start], content[start : start + length], content[start + length :]
    return [
        head + bytes([content[start] ^ (1 << rng.integers(8))]) + content[start + 1 :],
        head + bytes(len(middle)) + tail,
        head + rng.bytes(len(middle)) + tail,
        head,
        head + tail,
        head + middle + middle + tail,
        content + rng.bytes(length),
        content + content,
    ][rng.integers(8)]


def read_damaged(seed, folder):
    """Damage a scan and read it; return the volume or its error, and which bytes of the header changed."""
    rng = np.random.default_rng(seed)
    content = intact_scan(folder / "intact.nii")
    damaged = range(0)
    is_compressed, in_header = rng.random(2) < (0.6, 0.6)
    if in_header or not is_compressed:
        content, damaged = damage_header(rng, content)
    path = folder / "damaged.nii"
    if is_compressed:
        path, content = folder / "damaged.nii.gz", gzip.compress(content, mtime=0)
        if not in_header:
            content = damage_stream(rng, content)
    path.write_bytes(content)
    try:
        return read_image(path), damaged
    except InputError as error:
        return error, damaged


def assert_correct(volume, damaged):
    """Check that a scan has the voxels of the intact one and, if it has no warnings, its axes within tolerances."""
    if set(SCALING).isdisjoint(damaged):
        np.testing.assert_array_equal(volume.array, image_array())
    if volume.warnings:
        return
    np.testing.assert_allclose(volume.spacing, (0.75, 0.75, 2.5), rtol=0.0101)
    axes, expected = (affine[:3, :3] / nib.affines.voxel_sizes(affine) for affine in (volume.affine, AFFINE))
    assert (axes * expected).sum(axis=0).min() > np.cos(np.radians(1.01))


def check_seed(seed, folder):
    """Damage a scan, read it and check the outcome, which is returned: "refused", "warned" or "correct"."""
    volume, damaged = read_damaged(seed, folder)
    if isinstance(volume, InputError):
        assert volume.where.startswith(f"{folder}/damaged.nii")
        assert "\n" not in str(volume)
        return "refused"
    assert_correct(volume, damaged)
    write_volume(folder / "mask.nii", mask_array(), volume)
    np.testing.assert_array_equal(read_mask(folder / "mask.nii").affine, volume.affine)
    return "warned" if volume.warnings else "correct"


@pytest.mark.parametrize("first", range(0, 100, 20))
@pytest.mark.filterwarnings("error")
def test_damage_is_found_or_has_no_effect(tmp_path, first):
    tracemalloc.start()
    try:
        outcomes = [check_seed(seed, tmp_path) for seed in range(first, first + 20)]
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert "refused" in outcomes
