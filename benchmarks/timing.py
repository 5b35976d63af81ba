"""The sides of a comparison timed in turn, on what they ran, and how that is printed."""

import datetime
import importlib.metadata
import json
import statistics
import time
from pathlib import Path

import jax

from jaxla.config import InputError
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


def in_numbers(seconds):
    """Median and fastest of each side's seconds."""
    return {
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "fastest_seconds": {name: min(times) for name, times in seconds.items()},
    }


def compared(seconds):
    """The same, and the median of each form of PyTorch over this package's: above 1 this package is the faster one."""
    found = in_numbers(seconds)
    ours, theirs = found["median_seconds"]["jaxla"], found["median_seconds"].items()
    return {**found, "torch_over_jaxla": {name: median / ours for name, median in theirs if name.startswith("torch")}}


def about(*packages):
    """What belongs to every result: date, device and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind if jax.default_backend() == "gpu" else processor(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def print_result(result, output=None):
    """As JSON; into the file `output` too."""
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if output:
        write_result(result, output)


def write_result(result, output):
    Path(output).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def require_folder(output):
    """Before minutes of work: the file of --output can be written."""
    if output and not Path(output).parent.is_dir():
        raise InputError(f"--output={output}: no such folder")
