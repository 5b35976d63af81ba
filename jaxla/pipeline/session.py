"""One session of a run: checked before it takes long, its folder held, its log kept, a clean end for any fault."""

from __future__ import annotations

import errno
import logging
import logging.handlers
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jaxla.cli.command_line import Options, require_writable
from jaxla.cli.process import Stopped
from jaxla.cli.terminal import plural
from jaxla.config import Experiment, InputError
from jaxla.data.cache import in_use
from jaxla.data.dataset import PreparedData, prepare_data
from jaxla.distributed import broadcast, is_first, name_resume_command, require_same, use_devices
from jaxla.memory import StepTooLarge
from jaxla.pipeline.checks import require_batch, require_fitting_scans, require_share, with_weights
from jaxla.pipeline.forecast import describe, forecast
from jaxla.pipeline.planning import plan_run
from jaxla.pipeline.run import train_and_test
from jaxla.runs.folder import LATEST, LOG, fold_folders, require_free, require_resumable, resume_command, run_folder
from jaxla.runs.machine import environment
from jaxla.runs.record import RECORD, Record, describe_backbone, options_of
from jaxla.training.checkpoints import checkpoint_steps

DISK_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT,
)  # fmt: skip

Run = Callable[[Experiment, PreparedData, Path, Path], dict[str, Any]]

log = logging.getLogger("jaxla.train")


def run_session(options: Options, command: str, run: Run = train_and_test, go_on: str = "") -> None:
    """Train and test as the options say, which the line `command` gave; or only say what that will take.

    Args:
        run: `(experiment, data, run folder, cache folder) -> summary of the test`, once all is there.
        go_on: the command that goes on with it, should it end early; by default the same with --resume.

    Raises:
        InputError: anything wrong with the options, the data or the weights; all of it before training starts.
        Stopped: the process was asked to end; the message has the command to go on with.
    """
    experiment, cache_dir = options.experiment, options.cache_dir
    run_dir = options.run_dir or Path(f"runs/{experiment.name}_{time.strftime('%Y%m%d-%H%M%S')}")
    run_dir = Path(broadcast(str(run_dir)))
    began = time.perf_counter()
    early_lines = logging.handlers.MemoryHandler(capacity=1)  # holds the log until there is a folder for it
    logging.getLogger("jaxla").addHandler(early_lines)

    # What can fail is checked before what takes long.
    given = {name: getattr(options, name) for name in ("run_dir", "resume", "dry_run", "devices", "shard_params")}
    given = {name.replace("_", "-"): "" if value is None else str(value) for name, value in given.items()}
    given |= options_of(experiment)
    require_same({f"--{name}": value for name, value in given.items()}, "Give all processes the same options.")
    if options.resume and is_first():
        require_resumable(options.run_dir, experiment)
    elif not options.dry_run and is_first():
        require_free(run_dir)
    require_writable("--cache-dir", cache_dir)

    experiment, weights_sha256 = with_weights(experiment, cache_dir)
    if not weights_sha256:
        log.info("%s: no pretrained weights are used", describe_backbone(experiment))

    with in_use(cache_dir), use_devices(options.devices, options.shard_params), ExitStack() as held:
        require_share(experiment)
        require_batch(experiment)
        environment_here = environment()
        installed = {**environment_here["versions"], "device": environment_here["device"]}
        require_same(installed, "Install the same packages on all hosts, which need the same devices.")
        data = prepare_data(experiment, cache_dir)
        require_fitting_scans(experiment, data.used)
        contents = {f"case {name}": sha256 for name, sha256 in data.cases.items()}
        contents |= {"--data.split": data.split.sha256, "--model.weights": weights_sha256 or "random"}
        require_same(contents, "Give all processes the same scans, masks, split and weights.")
        if options.dry_run:
            print(describe(forecast(experiment, data, cache_dir)))
            return
        data = replace(data, plan=plan_run(experiment, data))
        record = Record(
            experiment=experiment,
            labels=data.dataset.labels,
            weights=experiment.model.weights,
            weights_sha256=weights_sha256,
            split_sha256=data.split.sha256,
            data_sha256=data.sha256,
            extent=data.canvas(experiment.preprocessing).extent,
            command=command,
            begun=datetime.now().astimezone().isoformat(timespec="seconds"),
            environment=environment_here,
        )
        log_file: logging.Handler = logging.NullHandler()
        go_on = go_on or resume_command(record.command, run_dir)
        if is_first():
            held.push(partial(remove_unbegun, run_dir))
            held.enter_context(run_folder(run_dir, record, data.split, data.cases, options.resume))
            log_file = logging.FileHandler(run_dir / LOG)
            held.callback(log_file.close)
            early_lines.setTarget(log_file)
        begun = broadcast((run_dir / RECORD).read_text() if is_first() else None)
        if not (run_dir / RECORD).exists() or (run_dir / RECORD).read_text() != begun:
            raise InputError(f"--run-dir={run_dir}: is not seen here; it must lie on a disk that all processes share")
        try:
            with name_resume_command(go_on, partial(note, log_file)):
                summary = run(experiment, data, run_dir, cache_dir)
        except (Stopped, KeyboardInterrupt) as stop:
            where = str(stop) or "before the end"
            note(log_file, f"stopped {where}")
            raise Stopped(f"{where}; go on with: {go_on}") from stop
        except InputError as error:
            note(log_file, f"error: {error}")
            raise
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            message = f"{error.filename or run_dir}: cannot be read or written ({error.strerror})"
            note(log_file, f"error: {message}")
            raise InputError(f"{message}; mend that and go on with: {go_on}") from error
    if not is_first():
        return
    dice, iou, atlas = summary["dice"], summary["iou"], summary["atlas"]["dice"]
    log.info("finished in %.0f s", time.perf_counter() - began)
    print(
        f"{summary['backbone']}: test Dice {dice['mean']:.3f}, IoU {iou['mean']:.3f} "
        f"(mean per volume over {plural(dice['n'], 'patient')}; the atlas, which never looks at the image: "
        f"Dice {atlas['mean']:.3f}). Run folder: {run_dir}"
    )


def remove_unbegun(run_dir: Path, kind: type | None, error: BaseException | None, trace: object) -> None:
    """Remove the folder of a run that ended for want of memory before anything was saved: the next try may have it."""

    begun = (checkpoint_steps(place / LATEST) for place in (run_dir, *fold_folders(run_dir)))
    if isinstance(error, StepTooLarge) and not any(begun):
        shutil.rmtree(run_dir, ignore_errors=True)


def note(log_file: logging.Handler, message: str) -> None:
    """Leave in the log what the terminal shows by other ways."""
    log_file.handle(logging.LogRecord("jaxla.train", logging.ERROR, "", 0, message, None, None))
