"""Several devices give what one gives: simulated ones, in a process of its own and in two."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.distributed import device_count, use_devices
from tests.distributed.group import finish, free_port, start
from tests.distributed.mesh_cases import CASES, OF_TWO_PROCESSES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    command = [sys.executable, "-m", "tests.distributed.mesh_driver", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    coordinator = f"127.0.0.1:{free_port()}"
    commands = [["tests.distributed.mesh_driver", folder, coordinator, index] for index in (0, 1)]
    codes, _, err = finish(start(commands, folder), folder, seconds=300)
    assert codes == [0, 0], err
    return {**np.load(folder / "arrays.npz"), **np.load(folder / "of two.npz")}


def of_kind(arrays, case, network, kind):
    chosen = [name for name in sorted(arrays) if name.startswith(f"{case}/{network}/{kind}")]
    assert chosen
    return np.concatenate([np.ravel(arrays[name]).astype(np.float64) for name in chosen])


def relative_l2(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("case", "network"),
    [(case, name) for case, (*_, networks) in (CASES | OF_TWO_PROCESSES).items() for name in networks if case != "one"],
)
def test_ten_steps_give_what_one_device_gives(arrays, case, network):
    """The batch is one that the devices do not divide."""
    for kind in ("losses", "gradients", "parameters", *(["statistics"] if network != "windows" else [])):  # it has none
        # measured: at most 9.3e-7, of gradients
        assert relative_l2(of_kind(arrays, case, network, kind), of_kind(arrays, "one", network, kind)) <= 1e-5, kind


def test_divided_parameters_take_less_memory(arrays):
    """By just what the table of parameters says: seven eighths of these kernels, and of Adam's two for each."""
    held = {case: int(arrays[f"{case}/finetuned/bytes on a device"]) for case in CASES}
    assert held["one"] == held["four"] == held["eight"]
    prefix = "one/finetuned/parameters/"
    of_kernels = sum(a.size for name, a in arrays.items() if re.match(rf"{prefix}.*blocks\..*\.kernel", name))
    saved = 4 * 3 * of_kernels * 7 / 8  # float32; the parameter and two of Adam's; an eighth of each stays
    assert held["one"] - held["eight, divided"] == saved


def test_what_blocks_weigh_can_be_asked_of_a_network_on_one_device(arrays):
    assert arrays["block weights"].shape == (3, 3)
    np.testing.assert_allclose(arrays["block weights"].sum(1), 1, rtol=1e-6)
    assert np.ptp(arrays["block weights"]) > 0.01


def test_training_goes_on_with_another_number_of_devices(arrays):
    # measured: 1.9e-7
    np.testing.assert_allclose(arrays["resumed"], arrays["on one"], rtol=1e-5)


def test_more_devices_than_there_are_are_refused():
    for count in (1000, -1):
        line = rf"option --devices={count}: JAX sees \d+ \(.*\); give a number from 0 \(all\) to \d+"
        with pytest.raises(InputError, match=line), use_devices(count):
            pass
    assert device_count() == 1
