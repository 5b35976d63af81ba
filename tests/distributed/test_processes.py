"""Several processes that run one command: they exchange values, fail, are killed, or never start."""

import json
import os
import signal
import socket

import pytest

from tests.distributed.group import finish, free_port, start, together, wait_for

A_MINUTE = 60


def drive(folder, kind, *, port=None, count=2, indices=(0, 1), wait=60, **environ):
    """Start the processes `indices` of `count`."""
    commands = together(
        ["tests.distributed.processes_driver", kind, folder, f"--wait={wait}"], port or free_port(), count
    )
    return start([commands[index] for index in indices], folder, **environ)


def last_lines(err):
    """Return the lines of all processes that say why the command ended."""
    return [
        line for text in err for line in text.splitlines() if line.startswith(("error: ", "stopped", "interrupted"))
    ]


def test_processes_exchange_values_and_the_first_prints(tmp_path):
    """Clusters set variables for a web proxy, which gRPC respects: nothing listens at this one."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    processes = drive(tmp_path, "exchange", count=3, indices=(0, 1, 2), **proxy)
    codes, out, err = finish(processes, tmp_path, A_MINUTE)
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


@pytest.mark.parametrize(("kind", "victim"), [("wait", 0), ("wait", 1), ("compute", 1)])
def test_a_killed_process_ends_the_other_which_names_the_resume_command(tmp_path, kind, victim):
    """The survivor waits in `gather`, in Python code, or in a collective of XLA."""
    processes = drive(tmp_path, kind)
    wait_for(lambda: all((tmp_path / f"{k}.ready").exists() for k in (0, 1)), processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    codes, _, err = finish(processes, tmp_path, A_MINUTE)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    (line,) = last_lines([err[1 - victim]])
    assert line.startswith("stopped: ")
    assert line.endswith(" Resume with: that command")
    assert (tmp_path / f"{1 - victim}.note").read_text() == line


def test_sigterm_to_one_ends_both(tmp_path):
    """It also interrupts `gather`, in which process 1 waits."""
    processes = drive(tmp_path, "wait")
    wait_for(lambda: all((tmp_path / f"{k}.ready").exists() for k in (0, 1)), processes)
    processes[1].terminate()
    codes, _, err = finish(processes, tmp_path, A_MINUTE)
    assert codes == [1, 1]
    assert [last_lines([text]) for text in err] == [["interrupted"], []]


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("wrong_input_in_one", 2, "error: process 1: --x: wrong. Remove the option."),
        ("wrong_input_in_all", 2, "error: --x: wrong. Remove the option."),
        ("bug", 1, "stopped: process 1 failed or lost another process, see its traceback."),
    ],
)
def test_an_error_ends_all_and_is_printed_once(tmp_path, kind, code, line):
    codes, _, err = finish(drive(tmp_path, kind), tmp_path, A_MINUTE)
    assert codes == [code, code]
    assert [last_lines([text]) for text in err] == [[line], []]
    assert ("RuntimeError: a bug" in err[1]) == (kind == "bug")


# --- processes that do not connect ---


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_process_is_reported_after_the_wait(tmp_path, index):
    port = free_port()
    codes, _, err = finish(drive(tmp_path, "exchange", indices=[index], wait=1, port=port), tmp_path, A_MINUTE)
    assert codes == [2]
    assert last_lines(err) == [
        f"error: --coordinator=127.0.0.1:{port}: the 2 processes could not connect. Start each one, with its own "
        "--process and the same --processes. Raise --wait if they start late."
    ]


def test_different_numbers_of_processes_are_refused(tmp_path):
    command, port = ["tests.distributed.processes_driver", "exchange", tmp_path], free_port()
    commands = [together(command, port, 2)[0], together(command, port, 3)[1]]
    codes, _, err = finish(start(commands, tmp_path), tmp_path, A_MINUTE)
    assert codes == [2, 2]
    assert last_lines(err) == [
        "error: process 1: --processes=3: process 0 has --processes=2. Give all processes the same number."
    ]


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        codes, _, err = finish(drive(tmp_path, "exchange", indices=[0], port=port), tmp_path, A_MINUTE)
    assert codes == [2]
    assert err[0] == (
        f"error: --coordinator=127.0.0.1:{port}: process 0 cannot use port {port} (Address already in use). Use "
        "another port, and --process=0 once.\n"
    )
