"""The number of processes and the index of this one, from options or from the environment of srun and mpirun."""

import os

import pytest

from jaxla.config import InputError
from jaxla.distributed import find_launch

# Variables of SLURM 22.05 in the batch script, in a task that `srun` started, and in the shell of `salloc`.
BATCH_SCRIPT = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TASK = {**BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_STEP_NUM_TASKS": "2"}
SHELL = {**TASK, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "node07", "SLURM_STEP_NUM_TASKS": "1"}

# Variables of Open MPI 4.1 and 5.
RANK = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1322844160.0;tcp://192.0.2.2,192.0.2.9:36079;tcp6://[fd00::2]:45787",
}
RANK_5 = {name: value for name, value in RANK.items() if name != "OMPI_MCA_orte_hnp_uri"}


@pytest.fixture
def detect_launch(monkeypatch):
    """A function that finds the launch in an environment with these variables, and none of another launcher."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "WORLD_SIZE", "RANK"))]:
        monkeypatch.delenv(name)

    def find(environ, *options):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return find_launch(*options)

    return find


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT, SHELL, {**RANK, "OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_single_process_joins_nothing(detect_launch, environ):
    assert detect_launch(environ, "", None, None) is None
    assert detect_launch(environ, "node1:7000", 1, 0) is None


@pytest.mark.parametrize("environ", [TASK, RANK])
def test_processes_1_does_not_join_other_tasks(detect_launch, environ):
    assert detect_launch(environ, "", 1, None) is None


@pytest.mark.parametrize(
    ("environ", "host", "index"),
    [(TASK, "node07", 0), ({**TASK, "SLURM_PROCID": "1"}, "node07", 1), (RANK, "192.0.2.2", 1)],
)
def test_srun_and_mpirun_need_no_options(detect_launch, environ, host, index):
    coordinator, count, found_index = detect_launch(environ, "", None, None)
    assert (coordinator.rsplit(":", 1)[0], count, found_index) == (host, 2, index)
    assert 61440 <= int(coordinator.rsplit(":", 1)[1]) < 65536  # JAX derives the port from the id of the job


def test_options_override_the_launcher(detect_launch):
    assert detect_launch(TASK, "here:7000", 3, 2) == ("here:7000", 3, 2)


@pytest.mark.parametrize("environ", [RANK_5, {"PMI_SIZE": "2", "PMI_RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}])
def test_other_launchers_need_only_the_coordinator(detect_launch, environ):
    assert detect_launch(environ, "here:7000", None, None) == ("here:7000", 2, 1)
    with pytest.raises(InputError, match="--coordinator: missing, but several processes need it"):
        detect_launch(environ, "", None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("", 2, 0), "--coordinator: missing, but several processes need it"),
        (("here:7000", None, 0), "--processes: missing"),
        (("here:7000", 2, None), "--process: missing"),
        (("here", 2, 0), "--coordinator=here: not HOST:PORT. Use a value such as node1:62000."),
        (("here:70000", 2, 0), "--coordinator=here:70000: not HOST:PORT"),
        (("here:7000", 2, 2), "--process=2: must be from 0 to N-1, where N is --processes=2"),
        (("here:7000", 2, -1), "--process=-1: must be from 0 to N-1"),
        (("here:7000", 0, 0), "--process=0: must be from 0 to N-1, where N is --processes=0"),
    ],
)
def test_missing_and_wrong_options_are_named(detect_launch, options, message):
    with pytest.raises(InputError) as error:
        detect_launch({}, *options)
    assert str(error.value).startswith(message)
