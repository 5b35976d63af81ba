"""The sides of a comparison timed in turn, and on what they ran."""

import datetime
import importlib.metadata
import time

import jax

from jaxla.runs.machine import processor

PAUSE = 0.3  # seconds before each call: the threads of the other side fall asleep, else they would take its cores


def timed(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(sides, repeats):
    """Each side's run in turn, `repeats` times; -> name -> its seconds, in order."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            time.sleep(PAUSE)
            seconds[name].append(timed(run))
    return seconds


def about(*packages):
    """What belongs to every result: date, device and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind if jax.default_backend() == "gpu" else processor(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
