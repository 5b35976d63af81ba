"""python -m benchmarks.training_run --exp=… [options of jaxla.train] [--output=FILE]: time a whole run.

Runs `python -m jaxla.train` with these options in a separate process with an empty cache. Prints JSON: the seconds of
the whole command, including startup, preparation, compilation and testing; the seconds of its epochs; the test scores
of the network and the atlas baseline; and the run's memory and inference time.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.timing import environment, print_result, require_folder
from jaxla.cli.process import run_command
from jaxla.config import InputError
from jaxla.runs.folder import COST, SUMMARY, read_metrics


def main(arguments):
    prefix = "--output="
    words = [word for word in arguments if not word.startswith(prefix)]
    output = next((word.removeprefix(prefix) for word in arguments if word.startswith(prefix)), None)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    require_folder(output)
    with TemporaryDirectory(prefix="jaxla-run-") as name:
        folder = Path(name)
        began = time.perf_counter()
        run_training([*words, f"--run-dir={folder / 'run'}", f"--cache-dir={folder / 'cache'}"])
        seconds = time.perf_counter() - began
        result = {**environment("jax", "flax"), "options": words, "seconds": seconds, **read_run(folder / "run")}
    print_result(result, output)


def run_training(words):
    """Run `jaxla.train` with these options; raise an InputError if it rejects them."""
    done = subprocess.run([sys.executable, "-m", "jaxla.train", *words])
    if done.returncode == 2:
        raise InputError(" ".join(words), "rejected by jaxla.train; see its error above", "Change the options.")
    if done.returncode:
        raise RuntimeError(f"jaxla.train exited with {done.returncode}")


def read_run(folder):
    """Return the scores, the time and the cost of a finished run."""
    summary, cost = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SUMMARY, COST))
    epochs = read_metrics(folder)
    scores = {name: summary[name]["mean"] for name in ("dice", "hd95_mm")}
    atlas = {name: summary["atlas"][name]["mean"] for name in scores}
    return {
        "unit": summary["dice"]["unit"],
        "n": summary["dice"]["n"],
        **scores,
        "atlas": atlas,
        "epochs": len(epochs),
        "epoch_seconds": [metrics["seconds"] for metrics in epochs],
        "cost": cost,
    }


if __name__ == "__main__":
    run_command(main)
