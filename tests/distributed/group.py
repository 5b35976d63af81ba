"""Run a command in several processes on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find_free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(commands, folder, **environ):
    """Start `python -m COMMAND` for each command; output goes to `<index>.out` and `<index>.err` in the folder."""
    processes = []
    for index, command in enumerate(commands):
        with (folder / f"{index}.out").open("w") as out, (folder / f"{index}.err").open("w") as err:
            started = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                cwd=ROOT,
                stdout=out,
                stderr=err,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
            )
        processes.append(started)
    return processes


def group_commands(command, port, count=2):
    """Return one command per process, with the options by which `count` processes join."""
    return [
        [*command, f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
        for index in range(count)
    ]


def finish(processes, folder, seconds):
    """Wait for all processes; return their exit codes, and the text of stdout and of stderr of each."""
    end = time.monotonic() + seconds
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    read = [[(folder / f"{i}.{stream}").read_text() for i in range(len(processes))] for stream in ("out", "err")]
    return codes, *read


def wait_for(condition, processes, seconds=300):
    """Wait until the condition holds; kill all processes and fail if one exits first, or after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError("a process exited too early, or the condition did not hold in time")
        time.sleep(0.05)
