"""Arrays of the cache are opened with the same result as with NumPy, also by many threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxla.data.arrays import open_array


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<f4", "<f8", "<u2", "<i8"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4, 5)])
def test_an_opened_array_equals_the_saved_array(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    opened = open_array(tmp_path / "a.npy")
    assert (opened.dtype, opened.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(opened, array)
    with pytest.raises(ValueError, match="read-only"):
        opened[0] = 1


def test_a_file_that_is_not_a_c_ordered_array_is_refused(tmp_path):
    np.save(tmp_path / "columns.npy", np.asfortranarray(np.ones((2, 3))))
    (tmp_path / "text.npy").write_text("not an array")
    for name in ("columns.npy", "text.npy"):
        with pytest.raises(ValueError, match="not a C-ordered array"):
            open_array(tmp_path / name)


def test_many_threads_open_arrays_at_once(tmp_path):
    for n in range(4):
        np.save(tmp_path / f"{n}.npy", np.full((3, 4), n, np.int16))
    with ThreadPoolExecutor(16) as pool:
        values = pool.map(lambda n: int(open_array(tmp_path / f"{n % 4}.npy")[2, 3]), range(20_000))
    assert list(values) == [n % 4 for n in range(20_000)]
