"""Five-fold cross-validation: a run for each fold, in a folder of its own, then all of them tested together."""

from __future__ import annotations

import gc
import json
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from jaxla.cli.command_line import Options, without_folder_and_process
from jaxla.cli.process import Stopped
from jaxla.config import Experiment
from jaxla.data.dataset import PreparedData
from jaxla.data.split import ALL_FOLDS, FOLDS
from jaxla.distributed import barrier, broadcast, is_first, use_local_devices
from jaxla.nnunet.postprocessing import read_trials, write_choice
from jaxla.pipeline.planning import keep_plan
from jaxla.pipeline.session import run_session
from jaxla.pipeline.testing import run_test
from jaxla.runs.folder import COST, LARGEST, fold_folders, is_finished, require_resumable, resume_command
from jaxla.runs.record import RECORD

log = logging.getLogger("jaxla.train")


def run_experiment(options: Options, command: str) -> None:
    """Train and test as the options say, which the line `command` gave: one run, or one for each of the folds.

    Raises:
        InputError, Stopped: as `run_session`.
    """
    if options.experiment.fold != ALL_FOLDS:
        run_session(options, command)
    elif options.dry_run:
        if options.resume and is_first():
            require_resumable(options.run_dir, options.experiment)
        log.info("the first of %d folds, each of which takes as much; then their test together", FOLDS)
        run_session(options._replace(experiment=replace(options.experiment, fold="0"), resume=False), command)
    else:
        run_session(options, command, partial(train_folds, options, command))


def train_folds(
    options: Options, command: str, experiment: Experiment, data: PreparedData, run_dir: Path, cache_dir: Path
) -> dict[str, Any]:
    """All of a run of five folds once its folder is there; begins where the folder says it ended.

    Returns:
        The summary of the test of all five together, whose logits are averaged.
    """
    if data.plan:
        keep_plan(run_dir, data.plan)
    for fold, folder in enumerate(fold_folders(run_dir)):
        if broadcast(is_finished(folder)):
            continue
        if is_first():
            log.info("fold %d of %d, in %s", fold + 1, FOLDS, folder)
        of_fold = options._replace(
            experiment=replace(options.experiment, fold=str(fold)),
            run_dir=folder,
            resume=broadcast((folder / RECORD).exists()),
        )
        of_all = shlex.split(without_folder_and_process(command))
        words = [*_without_fold(of_all), f"--fold={fold}", f"--run-dir={folder}"]
        _in_fold(fold, partial(run_session, of_fold, shlex.join(words), go_on=resume_command(command, run_dir)))
    if experiment.postprocessing.largest == "if_better" and is_first():
        trials = [read_trials(folder / LARGEST).items() for folder in fold_folders(run_dir)]
        write_choice(dict(chain.from_iterable(trials)), data.dataset.labels.names, run_dir / LARGEST)
    barrier()
    with use_local_devices():
        largest = max(json.loads((folder / COST).read_text())["step_bytes"] for folder in fold_folders(run_dir))
        return run_test(data, None, run_dir, step_bytes=largest)


def _without_fold(words: Sequence[str]) -> list[str]:
    """The words of a command without `--fold=all`, or `--fold` and `all`."""
    return [
        word
        for before, word in pairwise(("", *words))
        if not word.startswith("--fold=") and "--fold" not in (before, word)
    ]


def _in_fold(fold: int, run: Callable[[], None]) -> None:
    package = logging.getLogger("jaxla")
    handlers = list(package.handlers)
    try:
        run()
    except Stopped as stop:  # without the command to go on with, which the outer one says
        raise Stopped(f"in fold {fold + 1} of {FOLDS}, {str(stop.__cause__) or 'before its end'}") from stop
    finally:
        for handler in set(package.handlers) - set(handlers):  # what comes after is not of this fold's log
            package.removeHandler(handler)
        gc.collect()  # arrays that only cycles still hold would take the next fold's memory
