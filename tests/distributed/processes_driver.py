"""Run one of several processes: python -m tests.distributed.processes_driver KIND FOLDER --coordinator=HOST:PORT …

KIND is the name of a function below that takes a folder and the index of the process.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from jaxla.cli.process import run_command
from jaxla.config import InputError
from jaxla.distributed import (
    broadcast,
    gather,
    is_first,
    join_processes,
    local_items,
    log_progress,
    name_resume_command,
)

log = logging.getLogger("jaxla.tests")


def exchange(folder, index):
    """Exchange values, and print and log lines."""
    values = {
        "gathered": gather({"index": index, "list": [1.5, None, "é"]}),
        "broadcast": broadcast(f"from {index}"),
        "items": local_items(["a", "b", "c", "d", "e"]),
        "first": is_first(),
    }
    gather("x" * 5_000_000)  # larger than the default limit of a gRPC message, 4 MiB
    (folder / f"{index}.json").write_text(json.dumps(values))
    print(f"printed by {index}")
    log.info("info of %d", index)
    log.warning("warning of %d", index)
    log_progress(f"progress of {index}")


def wait(folder, index):
    """Process 0 sleeps; process 1 waits for a value that process 0 has not sent."""
    with name_resume_command("that command", (folder / f"{index}.note").write_text):
        (folder / f"{index}.ready").touch()
        if index == 0:
            time.sleep(100)
        gather(None)


def compute(folder, index):
    """Run collectives forever."""
    with name_resume_command("that command", (folder / f"{index}.note").write_text):
        (folder / f"{index}.ready").touch()
        while True:
            multihost_utils.process_allgather(np.ones(3))


def wrong_input_in_one(folder, index):
    if index == 1:
        raise InputError("--x", "wrong", "Remove the option.")
    gather("never answered")


def wrong_input_in_all(folder, index):
    raise InputError("--x", "wrong", "Remove the option.")


def bug_in_one(folder, index):
    if index == 1:
        raise RuntimeError("a bug")
    with name_resume_command("that command", (folder / f"{index}.note").write_text):
        gather("never answered")


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--wait", type=float, default=60)
    options = parser.parse_args(arguments)
    with join_processes(options.coordinator, options.processes, options.process, options.wait):
        globals()[options.kind](options.folder, options.process)


if __name__ == "__main__":
    run_command(main)
