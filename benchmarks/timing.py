"""Time several implementations in turn, and print the result with the device and the package versions."""

import datetime
import importlib.metadata
import json
import statistics
import time
from pathlib import Path

from jaxla.config import InputError
from jaxla.hardware import device_name, on_gpu
from jaxla.runs.machine import processor

PROCESS = Path("/proc/self")
PAUSE_SECONDS = 0.3  # before each call, because the threads of the previous implementation stay busy for a while


def timed(run):
    """Return the seconds that `run()` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def time_in_turn(runs, repeats):
    """Run the functions in turn, `repeats` times; return name -> list of seconds."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(PAUSE_SECONDS)
            seconds[name].append(timed(run))
    return seconds


def time_steps(steps, repeats):
    """Time training steps in turn, as `time_in_turn` does, each after an untimed step.

    Returns:
        Two dicts, name -> list: seconds, and the increase of the process's peak memory in bytes (0 unless on Linux).
    """
    seconds = {name: [] for name in steps}
    memory_growth = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            time.sleep(PAUSE_SECONDS)
            step()  # warms the caches and reclaims memory
            before = peak_memory(reset=True)
            seconds[name].append(timed(step))
            memory_growth[name].append(peak_memory() - before if before else 0)
    return seconds, memory_growth


def peak_memory(reset=False):
    """Return the process's peak memory in bytes since the last reset, as recorded by Linux; 0 on other systems."""
    try:
        if reset:
            (PROCESS / "clear_refs").write_text("5")
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def median_and_fastest(seconds):
    """Return the median and the lowest of each list of seconds."""
    return {
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "fastest_seconds": {name: min(times) for name, times in seconds.items()},
    }


def compare(seconds):
    """Return `median_and_fastest`, and PyTorch's medians divided by this package's (above 1: jaxla is faster)."""
    numbers = median_and_fastest(seconds)
    medians = numbers["median_seconds"]
    ratios = {name: median / medians["jaxla"] for name, median in medians.items() if name.startswith("torch")}
    return {**numbers, "torch_over_jaxla": ratios}


def environment(*packages):
    """Return the date, the device and the versions of these packages."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name() if on_gpu() else processor(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def print_result(result, output=None):
    """Print the result as JSON, and write it to the file `output` if that is set."""
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if output:
        write_result(result, output)


def write_result(result, output):
    Path(output).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def require_folder(output):
    """Raise an InputError if the folder of the file `output` does not exist."""
    if output and not Path(output).parent.is_dir():
        raise InputError(f"--output={output}", "the folder does not exist", "Create it, or choose another file.")
