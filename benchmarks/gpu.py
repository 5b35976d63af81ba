"""python -m benchmarks.gpu --output=DIR [--minutes=…] [--only=STAGE] [--tiny]: run all GPU benchmarks.

Runs the STAGES, the most valuable first, each in a separate process with its own time limit, until the minutes are used
up. A stage that fails or hangs does not stop the next one. Each stage writes `DIR/<stage>.json` as soon as it finishes;
its output goes to `DIR/<stage>.log`, and `DIR/stages.json` records how each stage ended. `--tiny` runs all stages with
small networks, to test them on any machine. Exits with 1 if a stage failed or was stopped; with `--tiny`, also if a
stage was not started.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing import write_result
from jaxla.cli.command_line import command_parser, parse_arguments, require_writable
from jaxla.cli.process import run_command
from jaxla.config import InputError, lookup

ROOT = Path(__file__).parents[1]
PLAN = "tests/golden/nnunet_plans/LAlike.json"
TINY_PLAN = "tests/golden/nnunet_plans/Hippocampus.json"
MIN_SECONDS = 10  # a stage is not started with less time left
TINY_SECONDS = 1200  # time limit of each stage with --tiny; a busy CPU may need it


class Stage(NamedTuple):
    """A benchmark with its options and its time limit."""

    name: str
    seconds: float
    module: str
    options: str = ""
    tiny: str = ""  # used instead of `options` if --tiny is given


STAGES = (
    Stage("device", 45, "device", "", "--size=64 --megabytes=1 --repeats=1"),
    Stage("correctness", 150, "correctness", "", "--methods=[vit_mini8] --size=48"),
    Stage("parity_dinov2", 75, "parity", "--arch=dinov2_vitb14 --sizes=golden", "--arch=dinov2_vits14 --sizes=golden"),
    Stage("parity_dinov3", 75, "parity", "--arch=dinov3_vitb16 --sizes=golden", "--arch=dinov3_vits16 --sizes=golden"),
    Stage("quickstart", 90, "training_run", "--exp=quickstart", "--exp=quickstart --training.epochs=1"),
    Stage(
        "backbone_vitb", 60, "backbone", "--arch=dinov2_vitb14 --batch=32",
        "--arch=vit_mini8 --size=32 --repeats=1",
    ),
    Stage(
        "frozen_vitb", 90, "frozen_training", "--arch=dinov2_vitb14 --size=448 --batch=32 --slices=256 --data={data}",
        "--arch=vit_mini8 --size=32 --batch=2 --slices=4 --epochs=1",
    ),
    Stage(
        "backbone_vitg", 150, "backbone", "--arch=dinov2_vitg14 --batch=32 --repeats=5",
        "--arch=vit_mini8 --size=32 --repeats=1",
    ),
    Stage("step_unet", 75, "train_step", "--method=unet --batch=24", "--method=unet --size=48 --batch=1 --repeats=1"),
    Stage(
        "step_vitl", 120, "train_step", "--method=dinov2_vitl14 --size=448 --batch=32",
        "--method=vit_mini8 --size=32 --batch=1 --repeats=1",
    ),
    Stage(
        "step_nnunet_3d", 90, "train_step", f"--method=nnunet_3d --plan={PLAN}",
        f"--method=nnunet_2d --plan={TINY_PLAN} --batch=1 --repeats=1",
    ),
    Stage("resume", 60, "resume"),
    Stage(
        "frozen_fusion", 90, "frozen_training",
        "--network=fusion --arch=dinov2_vitb14 --size=448 --batch=32 --slices=128 --data={data}",
        "--network=fusion --arch=vit_mini8 --size=32 --batch=2 --slices=4 --epochs=1",
    ),
    Stage(
        "windows", 90, "windows", "--batch=4",
        "--method=windows_vit_mini8 --size=32 --slices=2 --windows=[1,2] --repeats=1",
    ),
    Stage(
        "accuracy_laptop", 240, "training_run", "--exp=laptop --training.minutes=2 --data.root={data}",
        "--exp=laptop --training.minutes=0.05 --data.root=phantom --data.phantom_size=small --data.phantom_cases=6",
    ),
    Stage(
        "accuracy_nnunet_3d_short", 240, "training_run",
        "--exp=paper1 --method=nnunet_3d_short --data.root={data}",
        "--exp=paper1 --method=nnunet_3d_short --data.root=phantom --data.phantom_size=small --data.phantom_cases=6 "
        "--training.epochs=1 --training.steps=1",
    ),
)  # fmt: skip


def main(arguments):
    parser = command_parser("benchmarks.gpu", "Run all GPU benchmarks.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8, help="time limit of all stages together")
    parser.add_argument("--data", type=str, default="phantom", help="folder of scans (default: synthetic ones)")
    parser.add_argument("--only", type=str, default="", help=f"one stage: {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--tiny", action="store_true", help="test all stages with small networks, on any machine")
    options = parse_arguments(parser, arguments)
    if options.minutes <= 0:
        raise InputError(f"--minutes={options.minutes:g}", "must be greater than 0", "Choose a larger number.")
    stages = STAGES
    if options.only:
        stages = (lookup("--only", options.only, {stage.name: stage for stage in STAGES}),)
    require_writable("--output", options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.data
    if data != "phantom":
        if not Path(data).is_dir():
            raise InputError(f"--data={data}", "no such folder", "Pass a folder of scans, or remove the option.")
        data = shlex.quote(str(Path(data).absolute()))
    if options.tiny:
        stages = [stage._replace(options=stage.tiny, seconds=TINY_SECONDS) for stage in stages]
    stages = [stage._replace(options=stage.options.format(data=data)) for stage in stages]
    outcomes = run_stages(stages, options.output.absolute(), 60 * options.minutes, options.tiny)
    failures = ("failed", "stopped", "not started") if options.tiny else ("failed", "stopped")
    if any(outcome["status"] in failures for outcome in outcomes):
        sys.exit(1)


def run_stages(stages, folder, seconds, is_tiny):
    """Run stages one after another; return the name, status and seconds of each.

    A stage is `finished`, `failed`, `stopped` at its time limit, or `not started` because `seconds` were used up.
    """
    deadline = time.monotonic() + seconds
    outcomes = []
    for stage in stages:
        began = time.monotonic()
        limit = min(stage.seconds, deadline - began)
        has_time = limit == stage.seconds or limit >= MIN_SECONDS
        status = run_stage(stage, folder, limit) if has_time else "not started"
        outcomes.append({"stage": stage.name, "status": status, "seconds": round(time.monotonic() - began, 1)})
        write_result({"tiny": is_tiny, "stages": outcomes}, folder / "stages.json")
        duration = f" after {outcomes[-1]['seconds']:.0f} s" if has_time else ""
        print(f"{stage.name}: {status}{duration}", flush=True)
    return outcomes


def run_stage(stage, folder, limit):
    """Run a stage for at most `limit` seconds and return its status; print its JSON and, on failure, the log's end."""
    result, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    result.unlink(missing_ok=True)  # the result of an earlier call
    command = [sys.executable, "-m", f"benchmarks.{stage.module}", *shlex.split(stage.options), f"--output={result}"]
    # Several processes and PyTorch share the GPU memory, most of which JAX would otherwise preallocate.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "failed" if code else "finished"
        except subprocess.TimeoutExpired:
            status = "stopped"
        finally:  # also kills subprocesses, which a killed stage leaves behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if result.exists():
        print(result.read_text(encoding="utf-8"), flush=True)
    if status != "finished":
        print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:], sep="\n", flush=True)
    return status


if __name__ == "__main__":
    run_command(main)
