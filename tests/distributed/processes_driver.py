"""One of several processes: python -m tests.distributed.processes_driver KIND FOLDER COORDINATOR COUNT INDEX WAIT."""

import json
import logging
import time
from pathlib import Path

from jaxla.cli.process import Stopped, run_command
from jaxla.config import InputError
from jaxla.devices.launch import Launch
from jaxla.distributed import broadcast, gather, if_others_end, is_first, join_processes, local_items, log_progress

log = logging.getLogger("jaxla.tests")


def talk(folder, index):
    heard = {
        "gathered": gather({"of": index, "list": [1.5, None, "é"]}),
        "agreed": broadcast(f"said by {index}"),
        "share": local_items(["a", "b", "c", "d", "e"]),
        "first": is_first(),
    }
    gather("x" * 5_000_000)  # more than a socket's buffer
    (folder / f"{index}.json").write_text(json.dumps(heard))
    print(f"printed by {index}")
    log.info("info of %d", index)
    log.warning("warning of %d", index)
    log_progress(f"told by {index}")


def sleep(folder, index):
    with if_others_end("that command", (folder / f"{index}.note").write_text):
        (folder / f"{index}.ready").touch()
        time.sleep(100)


def busy(folder, index):
    (folder / f"{index}.ready").touch()
    while True:
        sum(range(1000))


def mistake(folder, index):
    if index == 1:
        raise InputError("option --x is wrong")
    gather("never comes")


def alike(folder, index):
    raise InputError("option --x is wrong")


def stopped(folder, index):
    raise Stopped("in epoch 3")


def crash(folder, index):
    if index == 1:
        raise RuntimeError("a bug")
    gather("never comes")


def main(arguments):
    kind, folder, coordinator, count, index, wait = arguments
    with join_processes(Launch(coordinator, int(count), int(index)), float(wait)):
        globals()[kind](Path(folder), int(index))


if __name__ == "__main__":
    run_command(main)
