"""Which process this is, by the options or by what srun and mpirun leave in the environment."""

import pytest

from jaxla.config import InputError
from jaxla.devices.launch import PORTS, Launch, find_launch, first_host, gpus_of

# As SLURM 22.05 sets them: for a task that `srun` started, in the batch script itself, and under `salloc`.
IN_JOB = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TASK = {**IN_JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_STEP_NUM_TASKS": "2"}
INTERACTIVE = {**TASK, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "node07", "SLURM_STEP_NUM_TASKS": "1"}

# As Open MPI 4.1 sets them, on one host and on two, and what Open MPI 5 leaves of it.
RANK = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1322844160.0;tcp://192.0.2.2,192.0.2.9:36079;tcp6://[fd00::2]:45787",
    "PMIX_NAMESPACE": "1322844161",
}
APART = {**RANK, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
APART_5 = {name: value for name, value in APART.items() if name != "OMPI_MCA_orte_hnp_uri"}


def split(launch):
    host, port = launch.coordinator.rsplit(":", 1)
    assert int(port) in PORTS
    return host, launch.count, launch.index, launch.own_devices


@pytest.mark.parametrize("environ", [{}, IN_JOB, INTERACTIVE, {**RANK, "OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_process_of_its_own_is_launched_with_no_other(environ):
    assert find_launch("", None, None, environ) is None
    assert find_launch("node1:7000", 1, 0, environ) is None


def test_tasks_that_should_not_join_say_so():
    assert find_launch("", 1, None, TASK) is None


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (TASK, ("node07", 2, 0, False)),
        ({**TASK, "SLURM_PROCID": "1", "SLURM_GPUS_PER_TASK": "1"}, ("node07", 2, 1, True)),
        (RANK, ("127.0.0.1", 2, 1, False)),
        (APART, ("192.0.2.2", 2, 1, False)),
    ],
)
def test_launchers_are_found_by_themselves(environ, found):
    assert split(find_launch("", None, None, environ)) == found


def test_steps_of_one_job_meet_at_different_ports():
    ports = {find_launch("", None, None, {**TASK, "SLURM_STEP_ID": str(step)}).coordinator for step in range(5)}
    assert len(ports) == 5


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[003,007-015]", "node003"),
        ("rack[2-4]-ib,rack9", "rack2-ib"),
        ("gpu-a[10]", "gpu-a10"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_options_go_before_the_launcher():
    assert find_launch("here:7000", 3, 2, TASK) == Launch("here:7000", 3, 2)
    assert find_launch("here:7000", None, None, APART_5) == Launch("here:7000", 2, 1)


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (("", 2, 0), {}, "option --coordinator is missing"),
        (("here:7000", None, 0), {}, "option --processes is missing"),
        (("here:7000", 2, None), {}, "option --process is missing"),
        (("", None, None), APART_5, "option --coordinator is missing"),
        (("", None, None), {"PMI_SIZE": "2", "PMI_RANK": "0"}, "started as one of 2 by a launcher that is not recogni"),
        (("here", 2, 0), {}, "option --coordinator=here: expected HOST:PORT, such as node1:62000"),
        (("here:70000", 2, 0), {}, "option --coordinator=here:70000: expected HOST:PORT"),
        (("here:7000", 2, 2), {}, "option --process=2: must be from 0 to 1, for --processes=2"),
        (("here:7000", 0, 0), {}, "option --processes=0: must be 1 or more"),
    ],
)
def test_what_does_not_fit_together_is_named(options, environ, message):
    with pytest.raises(InputError) as error:
        find_launch(*options, environ)
    assert str(error.value).startswith(message)


# --- which GPUs ---


def hosts(*members):
    return [{"host": host, "visible": visible} for host, visible in members]


@pytest.mark.parametrize(
    ("index", "members", "gpus", "taken"),
    [
        (1, hosts(("a", None), ("b", None)), 4, []),  # one process on a host: all of its GPUs
        (0, hosts(("a", None), ("a", None)), 4, [0, 1]),
        (1, hosts(("a", None), ("a", None)), 4, [2, 3]),
        (2, hosts(("a", None), ("b", "0,1"), ("b", "0,1")), 2, [1]),
        (1, hosts(("a", "0"), ("a", "1")), 1, []),  # each was given its own
        (1, hosts(("a", None), ("a", None)), 0, []),
    ],
)
def test_processes_of_one_host_share_its_gpus(index, members, gpus, taken):
    assert gpus_of(Launch("a:7000", len(members), index), members, gpus) == taken


def test_gpus_that_srun_has_given_to_each_task_are_its_own():
    members = hosts(("a", "0"), ("a", "0"))  # numbered anew for each
    assert gpus_of(Launch("a:7000", 2, 1, own_devices=True), members, 1) == []


def test_fewer_gpus_than_processes_are_refused():
    with pytest.raises(InputError, match=r"a: 2 processes run there, and share 1 GPUs; start one process a host"):
        gpus_of(Launch("a:7000", 2, 1), hosts(("a", None), ("a", None)), 1)
