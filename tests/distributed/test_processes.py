"""Processes that run one command together: real ones, which are killed, make mistakes, or never come."""

import json
import os
import signal

import pytest

from tests.distributed.group import finish, free_port, start, wait_for

A_MINUTE = 60


def drive(folder, kind, *, count=2, indices=None, wait=60, port=None, **environ):
    """Start the processes of `indices` (all of them), of `count`."""
    port = port or free_port()
    command = ["tests.distributed.processes_driver", kind, folder, f"127.0.0.1:{port}", count]
    numbers = range(count) if indices is None else indices
    return start([[*command, index, wait] for index in numbers], folder, **environ)


def test_each_hears_what_all_say_and_the_first_prints(tmp_path):
    codes, out, err = finish(drive(tmp_path, "talk", count=3), tmp_path, A_MINUTE)
    assert codes == [0, 0, 0], err
    heard = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(3)]
    assert heard[0]["gathered"] == [{"of": k, "list": [1.5, None, "é"]} for k in range(3)]
    for k in range(3):
        assert heard[k]["gathered"] == heard[0]["gathered"]
        assert heard[k]["agreed"] == "said by 0"
        assert heard[k]["first"] == (k == 0)
    assert [one["share"] for one in heard] == [["a", "d"], ["b", "e"], ["c"]]

    lines = out[0].splitlines()
    assert {"printed by 0", "info of 0", "warning of 0", "told by 0", "told by 1", "told by 2"} <= set(lines)
    assert sum("warning of" in line for line in lines) == 3
    assert any(line.startswith("process 2 of 3 (") and line.endswith("): warning of 2") for line in lines)
    assert "printed by 1" not in out[0]
    assert "info of 1" not in out[0]


def test_a_proxy_of_the_web_is_not_asked_for_the_way(tmp_path):
    """Clusters set such variables, and gRPC heeds them; nothing listens at this one."""
    processes = drive(tmp_path, "talk", wait=10, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    codes, out, err = finish(processes, tmp_path, A_MINUTE)
    assert codes == [0, 0], err
    assert "proxy" not in out[0] + err[0]


@pytest.mark.parametrize("kind", ["sleep", "busy"])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_ends(tmp_path, kind, victim):
    processes = drive(tmp_path, kind)
    wait_for(lambda: all((tmp_path / f"{k}.ready").exists() for k in (0, 1)))
    os.kill(processes[victim].pid, signal.SIGKILL)
    codes, _, err = finish(processes, tmp_path, A_MINUTE)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    line = next(line for line in err[1 - victim].splitlines() if line.startswith("stopped: "))
    assert line.startswith(f"stopped: process {victim} of 2 (")
    if kind == "sleep":
        assert line.endswith(") has ended without a word; go on with: that command")
        assert (tmp_path / f"{1 - victim}.note").read_text() == line


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("mistake", 2, "error: process 1 of 2 ({host}): option --x is wrong"),
        ("alike", 2, "error: option --x is wrong"),
        ("stopped", 1, "stopped in epoch 3"),
    ],
)
def test_what_ends_one_ends_all_and_is_said_once(tmp_path, kind, code, says):
    codes, _, err = finish(drive(tmp_path, kind), tmp_path, A_MINUTE)
    assert codes == [code, code]
    lines = [line for line in err[0].splitlines() if line.startswith(("error", "stopped"))]
    assert lines == [says.format(host=os.uname().nodename)]
    assert "option --x" not in err[1]
    assert "stopped" not in err[1]


def test_a_bug_in_one_shows_its_traceback_and_ends_all(tmp_path):
    codes, _, err = finish(drive(tmp_path, "crash"), tmp_path, A_MINUTE)
    assert codes == [1, 1]
    assert "RuntimeError: a bug" in err[1]
    assert "stopped: failed, for the reason that it printed (process 1 of 2" in err[0]


# --- those that do not come together ---


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0], "waited 1 s at 127.0.0.1:{port}, and process 1, 2 of 3 did not come; start all of them, or raise --wait"),
        (
            [1],
            "option --coordinator=127.0.0.1:{port}: waited 1 s for process 0, which could not be reached (Connection "
            "refused); start it, open that port to this host, or name another",
        ),
    ],
)
def test_a_process_whose_others_do_not_come_ends(tmp_path, indices, message):
    port = free_port()
    codes, _, err = finish(drive(tmp_path, "talk", count=3, indices=indices, wait=1, port=port), tmp_path, A_MINUTE)
    assert codes == [2]
    assert err[0] == f"error: {message.format(port=port)}\n"


def test_two_of_one_number_are_refused(tmp_path):
    codes, _, err = finish(drive(tmp_path, "talk", count=3, indices=[0, 1, 1]), tmp_path, A_MINUTE)
    assert codes == [2, 2, 2]
    host = os.uname().nodename
    for said in err:
        assert said == f"error: two are process 1 ({host}, {host}); give each its own --process\n"


def test_different_counts_are_refused(tmp_path):
    port = free_port()
    first = drive(tmp_path, "talk", count=2, indices=[0], port=port)
    (tmp_path / "other").mkdir()
    other = drive(tmp_path / "other", "talk", count=3, indices=[1], port=port)
    for processes, folder in ((first, tmp_path), (other, tmp_path / "other")):
        codes, _, err = finish(processes, folder, A_MINUTE)
        assert codes == [2]
        assert "is one of 3, process 0" in err[0]


def test_some_other_program_at_the_port_is_left_aside(tmp_path):
    """What calls there without being one of the processes, such as a scanner of ports, is not taken for one."""
    import socket

    port = free_port()
    first = drive(tmp_path, "talk", indices=[0], port=port)

    def called():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as caller:
                caller.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return True
        except ConnectionRefusedError:
            return False

    wait_for(called)
    (tmp_path / "other").mkdir()
    other = drive(tmp_path / "other", "talk", indices=[1], port=port)
    for processes, folder in ((first, tmp_path), (other, tmp_path / "other")):
        codes, _, err = finish(processes, folder, A_MINUTE)
        assert codes == [0], err


def test_a_port_in_use_is_named(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        codes, _, err = finish(drive(tmp_path, "talk", indices=[0], port=port), tmp_path, A_MINUTE)
    assert codes == [2]
    assert err[0] == (
        f"error: option --coordinator=127.0.0.1:{port}: port {port} of this host cannot be used (Address already in "
        "use); is another process 0 there? Each needs a --process of its own; else name another port\n"
    )
