"""Several simulated devices, in one process and in two, give the results of one device."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.mesh import device_count, use_devices
from tests.distributed.group import find_free_port, finish, start
from tests.distributed.mesh_cases import CASES, TWO_PROCESS_CASES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """The results of all cases of `mesh_driver`: name -> array."""
    folder = tmp_path_factory.mktemp("mesh")
    command = [sys.executable, "-m", "tests.distributed.mesh_driver", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    coordinator = f"127.0.0.1:{find_free_port()}"
    commands = [["tests.distributed.mesh_driver", folder, coordinator, index] for index in (0, 1)]
    codes, _, err = finish(start(commands, folder), folder, seconds=900)
    assert codes == [0, 0], err
    return {**np.load(folder / "one_process.npz"), **np.load(folder / "two_processes.npz")}


def concatenate(arrays, case, network, kind):
    chosen = [name for name in sorted(arrays) if name.startswith(f"{case}/{network}/{kind}")]
    assert chosen
    return np.concatenate([np.ravel(arrays[name]).astype(np.float64) for name in chosen])


def relative_l2(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("case", "network"),
    [(case, name) for case, (*_, names) in (CASES | TWO_PROCESS_CASES).items() for name in names if case != "one"],
)
def test_ten_steps_give_the_results_of_one_device(arrays, case, network):
    """The batch cannot be divided equally among the devices."""
    statistics = ["statistics"] if network != "windows" else []  # the windows network has none
    for kind in ("losses", "gradients", "parameters", *statistics):
        actual, expected = (concatenate(arrays, c, network, kind) for c in (case, "one"))
        assert relative_l2(actual, expected) <= 1e-5, kind  # measured: at most 9.3e-7, for gradients


def test_sharded_parameters_take_less_memory(arrays):
    """Each of eight devices stores 1/8 of each sharded kernel and of its two moments in Adam."""
    device_bytes = {
        case: int(arrays[f"{case}/finetuned/bytes on a device"]) for case in ("one", "four", "eight, sharded")
    }
    assert device_bytes["one"] == device_bytes["four"]
    prefix = "one/finetuned/parameters/"
    kernel_size = sum(a.size for name, a in arrays.items() if re.match(rf"{prefix}.*blocks\..*\.kernel", name))
    saved_bytes = device_bytes["one"] - device_bytes["eight, sharded"]
    assert saved_bytes == 4 * 3 * kernel_size * 7 / 8  # float32; the parameter and two moments


def test_block_weights_of_a_network_on_one_device_can_be_read_within_a_mesh(arrays):
    assert arrays["block weights"].shape == (2, 3)
    np.testing.assert_allclose(arrays["block weights"].sum(1), 1, rtol=1e-6)
    assert np.ptp(arrays["block weights"]) > 0.01


def test_training_resumes_on_another_number_of_devices(arrays):
    # measured: 1.9e-7
    np.testing.assert_allclose(arrays["resumed"], arrays["uninterrupted"], rtol=1e-5)


@pytest.mark.parametrize("count", [1000, -1])
def test_more_devices_than_visible_are_refused(count):
    line = rf"^devices={count}: out of range, because JAX detects \d+ devices? \(.*\)\. Use a number from 0 .* to \d+\."
    with pytest.raises(InputError, match=line), use_devices(count):
        pass
    assert device_count() == 1
