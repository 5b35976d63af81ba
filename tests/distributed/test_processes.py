"""Several processes that run one command: they exchange values, fail, are killed, or never start."""

import json
import socket
import time
from signal import SIGKILL, SIGTERM

import pytest

from tests.distributed.group import find_free_port, finish, group_commands, start, wait_for

TIMEOUT_SECONDS = 60


def start_driver(folder, kind, *, port=None, count=2, indices=(0, 1), wait=60, **environ):
    """Start those of `count` processes whose `indices` are listed; each runs the driver's function `kind`."""
    commands = group_commands(
        ["tests.distributed.processes_driver", kind, folder, f"--wait={wait}"], port or find_free_port(), count
    )
    return start([commands[index] for index in indices], folder, **environ)


def last_lines(err):
    """Return the lines that state why the command ended, from all processes."""
    return [
        line for text in err for line in text.splitlines() if line.startswith(("error: ", "stopped", "interrupted"))
    ]


def kill_all(groups):
    for _, processes in groups.values():
        for process in processes:
            process.kill()


def finish_together(groups, seconds=TIMEOUT_SECONDS):
    """Finish groups of processes that run at the same time, because they spend most of it waiting."""
    end = time.monotonic() + seconds
    try:
        return {key: finish(processes, folder, end - time.monotonic()) for key, (folder, processes) in groups.items()}
    finally:
        kill_all(groups)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Send a signal to one process of each of four pairs; yield each pair's folder and processes, and the time.

    A survivor may need 30 s to notice, so other tests run meanwhile.
    """
    keys = (("wait", 0, SIGKILL), ("wait", 1, SIGKILL), ("compute", 1, SIGKILL), ("wait", 1, SIGTERM))
    folders = {key: tmp_path_factory.mktemp("pair") for key in keys}
    pairs = {key: (folder, start_driver(folder, key[0])) for key, folder in folders.items()}
    for (_, victim, signal_number), (folder, processes) in pairs.items():
        wait_for(lambda folder=folder: all((folder / f"{k}.ready").exists() for k in (0, 1)), processes)
        processes[victim].send_signal(signal_number)
    yield pairs, time.monotonic()
    kill_all(pairs)


@pytest.mark.usefixtures("pairs")
def test_processes_exchange_values_and_the_first_prints(tmp_path):
    """Clusters set variables for a web proxy, which gRPC would use; here, nothing listens at the proxy's address."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    processes = start_driver(tmp_path, "exchange", count=3, indices=(0, 1, 2), **proxy)
    codes, out, err = finish(processes, tmp_path, TIMEOUT_SECONDS)
    assert codes == [0, 0, 0], err
    values = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(3)]
    for k in range(3):
        assert values[k]["gathered"] == [{"index": i, "list": [1.5, None, "é"]} for i in range(3)]
        assert values[k]["broadcast"] == "from 0"
        assert values[k]["first"] == (k == 0)
    assert [each["items"] for each in values] == [["a", "d"], ["b", "e"], ["c"]]

    assert {"printed by 0", "info of 0", "warning of 0", "progress of 0"} <= set(out[0].splitlines())
    for k in (1, 2):
        assert out[k].splitlines() == [f"process {k}: warning of {k}", f"process {k}: progress of {k}"]
    assert "proxy" not in "".join(out + err)


@pytest.fixture(scope="module")
def failed_groups(tmp_path_factory):
    """The outcomes of several groups of processes that run at the same time, and the port of each group."""
    kinds = ("wrong_input_in_one", "wrong_input_in_all", "bug_in_one", "different numbers", "only 0", "only 1")
    folders, ports = (
        {kind: tmp_path_factory.mktemp("group") for kind in kinds},
        {kind: find_free_port() for kind in kinds},
    )
    groups = {}
    for kind, folder in folders.items():
        if kind == "different numbers":
            command = ["tests.distributed.processes_driver", "exchange", folder]
            commands = [group_commands(command, ports[kind], count)[k] for k, count in enumerate((2, 3))]
            processes = start(commands, folder)
        elif kind.startswith("only"):
            processes = start_driver(folder, "exchange", indices=[int(kind[-1])], wait=1, port=ports[kind])
        else:
            processes = start_driver(folder, kind, port=ports[kind])
        groups[kind] = folder, processes
    return finish_together(groups), ports


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("wrong_input_in_one", 2, "error: process 1: --x: wrong. Remove the option."),
        ("wrong_input_in_all", 2, "error: --x: wrong. Remove the option."),
        ("bug_in_one", 1, "stopped: process 1 failed or lost another process, see its traceback."),
        (
            "different numbers",
            2,
            "error: process 1: --processes=3: differs from --processes=2 of process 0. "
            "Start all processes with the same number.",
        ),
    ],
)
def test_an_error_ends_all_processes_and_is_printed_once(failed_groups, kind, code, line):
    codes, _, err = failed_groups[0][kind]
    assert codes == [code, code]
    assert [last_lines([text]) for text in err] == [[line], []]
    assert ("RuntimeError: a bug" in err[1]) == (kind == "bug_in_one")


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_process_is_reported_after_the_wait(failed_groups, index):
    outcomes, ports = failed_groups
    codes, _, err = outcomes[f"only {index}"]
    assert codes == [2]
    assert last_lines(err) == [
        f"error: --coordinator=127.0.0.1:{ports[f'only {index}']}: the 2 processes could not connect. Start every "
        "process with its own --process and the same --processes. Raise --wait if they start late."
    ]


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        codes, _, err = finish(start_driver(tmp_path, "exchange", indices=[0], port=port), tmp_path, TIMEOUT_SECONDS)
    assert codes == [2]
    assert err[0] == (
        f"error: --coordinator=127.0.0.1:{port}: process 0 cannot use port {port} (Address already in use). Use "
        "another port, and only one --process=0.\n"
    )


@pytest.fixture(scope="module")
def pair_outcomes(pairs):
    """The folder and the outcome of each pair; its survivor has TIMEOUT_SECONDS from the last signal to stop."""
    groups, signal_time = pairs
    outcomes = finish_together(groups, signal_time + TIMEOUT_SECONDS - time.monotonic())
    return {key: (folder, outcomes[key]) for key, (folder, _) in groups.items()}


@pytest.mark.parametrize(("kind", "victim"), [("wait", 0), ("wait", 1), ("compute", 1)])
def test_killing_one_process_stops_the_other_and_prints_the_resume_command(pair_outcomes, kind, victim):
    """The survivor waits in `gather`, in Python code, or in a collective of XLA."""
    folder, (codes, _, err) = pair_outcomes[kind, victim, SIGKILL]
    assert codes[victim] == -SIGKILL
    assert codes[1 - victim] == 1
    (line,) = last_lines([err[1 - victim]])
    assert line.startswith("stopped: ")
    assert line.endswith(" Resume with: that command")
    assert (folder / f"{1 - victim}.note").read_text() == line


def test_sigterm_to_one_process_ends_both(pair_outcomes):
    """The signal also interrupts `gather`, in which process 1 waits."""
    _, (codes, _, err) = pair_outcomes["wait", 1, SIGTERM]
    assert codes == [1, 1]
    assert [last_lines([text]) for text in err] == [["interrupted"], []]
