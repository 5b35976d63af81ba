"""python -m jaxla.train --exp=NAME: train a method under a protocol, test it, and write the run's folder.

This file is one run from top to bottom: `main` parses the command, `run` opens the run and prepares its data,
`train_and_test` builds, trains and tests the network, and `test_network` ends with `write_reports`. Every step is one
call, in the order in which it happens. With --fold=all, `train_folds` calls `train_and_test` once for each fold.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from flax import nnx

from jaxla.cli.command_line import (
    Options,
    config_values,
    parse_experiment,
    parse_names,
    require_writable,
    set_option,
)
from jaxla.cli.config_file import write_config
from jaxla.cli.files import write_atomically
from jaxla.cli.json_files import read_json
from jaxla.cli.process import Stopped, run_command
from jaxla.cli.terminal import plural, wrap
from jaxla.config import Experiment, InputError
from jaxla.data.cache import mark_cache_in_use
from jaxla.data.dataset import PreparedData, prepare_data
from jaxla.data.split import ALL_FOLDS, FOLDS
from jaxla.distributed import barrier, broadcast, is_first, join_processes, local_items, require_same
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.hardware import keep_compiled_programs
from jaxla.memory import catch_out_of_memory
from jaxla.mesh import on_host, use_devices, use_local_devices
from jaxla.models.weights import parameters_sha256, save_random
from jaxla.nnunet.postprocessing import read_trials, write_choice
from jaxla.reporting.charts import draw_curves
from jaxla.reporting.run_pages import write_reports
from jaxla.runs import folder as files
from jaxla.runs.checks import check_experiment, find_weights
from jaxla.runs.cost import Cost, measure_cost
from jaxla.runs.forecast import describe_forecast, forecast_run
from jaxla.runs.listing import list_experiments
from jaxla.runs.machine import environment
from jaxla.runs.network_input import log_network_input
from jaxla.runs.record import (
    RECORD,
    Record,
    comparable_options,
    describe_network,
    method_label,
    read_record,
    write_record,
)
from jaxla.runs.session import buffered_log, open_run
from jaxla.runs.speed import measure_and_fit
from jaxla.runs.testing import HOW_TO_TEST, choose_postprocessing, make_segment_case, score_test_cases
from jaxla.runs.trained import load_run
from jaxla.tasks import Features, Task, make_checked_task
from jaxla.training.checkpoints import require_usable_path
from jaxla.training.loop import fit
from jaxla.training.progress import Progress
from jaxla.training.step import count_parameters

log = logging.getLogger("jaxla.train")


def main(arguments: list[str]) -> None:
    """Train, test, report.

    Raises:
        InputError: bad options, data or weights; everything is checked before training starts.
        Stopped: the process was asked to stop; the message holds the command that resumes the run.
    """
    names = parse_names(arguments)
    if names.exp == "list" or (names.exp is names.config is None and {"-h", "--help"} & set(arguments)):
        print("usage: python -m jaxla.train --exp=NAME [--option=value ...]; --exp=NAME --help shows every option")
        print(list_experiments(with_details=names.exp == "list"))
        return
    options = parse_experiment(arguments, EXPERIMENTS, METHODS)
    if options.print_config:
        print(write_config(config_values(options.experiment)), end="")
        return
    with join_processes(options.coordinator, options.processes, options.process, options.wait):
        run(options, shlex.join(["python", "-m", "jaxla.train", *arguments]))


@dataclass(frozen=True)
class Run:
    """A run whose folder is open: the input of every step below."""

    experiment: Experiment
    data: PreparedData
    task: Task
    folder: Path
    cache_dir: Path


def run(options: Options, command: str) -> Path | None:
    """Run the experiment that the options describe, and return the run's folder; the record stores `command`.

    With --dry-run, print a forecast and return None.
    """
    began = time.perf_counter()
    with buffered_log() as early_log:
        for description in options.overridden:
            log.info(description)
        # Check first, because preparing the data is slow.
        experiment = check_experiment(options.experiment)
        folder = Path(broadcast(str(options.run_dir or f"runs/{experiment.name}_{time.strftime('%Y%m%d-%H%M%S')}")))
        check_session(options, experiment, folder)
        experiment, weights_sha256 = find_weights(experiment, options.cache_dir)
        network_text = describe_network(experiment, METHODS)
        if not weights_sha256:
            log.info("%s: no pretrained weights are used", network_text)

        with mark_cache_in_use(options.cache_dir), use_devices(options.devices, options.shard_params):
            keep_compiled_programs(options.cache_dir)
            local_environment = environment()
            installed = {**local_environment["versions"], "device": local_environment["device"]}
            require_same(installed, "Use hosts with the same packages and devices.")
            data = prepare_data(experiment, options.cache_dir, local_items)
            require_same_content(data, weights_sha256)
            task = make_checked_task(experiment, data)
            if options.dry_run:
                print_forecast(experiment, network_text, data, task, options.cache_dir)
                return None

            record = Record(
                experiment=experiment,
                label=method_label(experiment, METHODS),
                network=network_text,
                input=task.describe_input(),
                unit=task.unit,
                labels=data.dataset.labels,
                weights=experiment.method.model.weights,
                weights_sha256=weights_sha256,
                split_sha256=data.split.sha256,
                data_sha256=data.sha256,
                extent=task.extent,
                command=command,
                begun=datetime.now().astimezone().isoformat(timespec="seconds"),
                environment=local_environment,
            )
            opened = Run(experiment, data, task, folder, options.cache_dir)
            with open_run(folder, record, data, early_log.buffer, resume=options.resume):
                summary = train_folds(opened, record) if experiment.fold == ALL_FOLDS else train_and_test(opened)
    if summary:
        log.info("finished in %.0f s", time.perf_counter() - began)
        print_result(summary, folder, experiment.data.case_word)
    return folder


def check_session(options: Options, experiment: Experiment, folder: Path) -> None:
    """Raise an InputError unless all processes have the same options, and the run can be written or resumed."""
    require_usable_path(folder)
    given = {name: getattr(options, name) for name in ("run_dir", "resume", "dry_run", "devices", "shard_params")}
    given = {name.replace("_", "-"): "" if value is None else str(value) for name, value in given.items()}
    given |= comparable_options(experiment)
    require_same({f"--{name}": value for name, value in given.items()}, "Start all processes with the same options.")
    if options.resume and is_first():
        files.require_resumable(options.run_dir, experiment)
    elif not options.dry_run and is_first():
        files.require_free(folder)
    require_writable("--cache-dir", options.cache_dir)


def require_same_content(data: PreparedData, weights_sha256: str) -> None:
    """Raise an InputError unless all processes have the same scans, masks, split and weights."""
    contents = {f"case {name}": sha256 for name, sha256 in data.content_keys.items()}
    contents |= {"--data.split": data.split.sha256, "--model.weights": weights_sha256 or "random"}
    require_same(contents, "Use the same scans, masks, split and weights in all processes.")


def print_forecast(experiment: Experiment, network_text: str, data: PreparedData, task: Task, cache_dir: Path) -> None:
    """Print the forecast of the run, or with --fold=all that of its first fold."""
    if experiment.fold == ALL_FOLDS:
        log.info("forecast of the first of %d folds; each fold takes as long; all are tested together", FOLDS)
        data = data.for_fold("0", experiment)
    forecast = forecast_run(experiment, network_text, data, task, cache_dir)
    print(wrap(describe_forecast(forecast, experiment.name), indent=12 * " "))


def train_and_test(run: Run) -> dict[str, Any] | None:
    """Train one network, or resume its training, and test it; return the summary of the test in process 0."""
    run.task.save(run.folder)
    log_network_input(run.data, run.task)
    with on_host():
        network = build_network(run)
    features = compute_features(run, network)
    if run.experiment.method.training.minutes:
        run = fit_run_to_minutes(run, features)
    progress = train_network(run, network, features)
    del network  # the trained one is loaded with its own backbone
    with use_local_devices():
        return test_network(run, features, progress.step_bytes)


def train_folds(run: Run, record: Record) -> dict[str, Any] | None:
    """Train and test a network for each fold, each in its own folder, then test the mean of their logits.

    Return the summary of the last test in process 0.
    """
    run.task.save(run.folder)
    command = files.resume_command(record.command, run.folder)
    folders = files.fold_folders(run.folder)
    for fold, folder in enumerate(folders):
        if broadcast(files.is_finished(folder)):
            continue
        if is_first():
            log.info("fold %d of %d, in %s", fold + 1, FOLDS, folder)
        experiment = replace(run.experiment, fold=str(fold))
        data = run.data.for_fold(str(fold), experiment)
        fold_command = set_option(set_option(record.command, "--fold", fold), "--run-dir", folder)
        fold_record = replace(
            record, experiment=experiment, split_sha256=data.split.sha256, command=fold_command, resumed=()
        )
        resume = broadcast((folder / RECORD).exists())
        try:
            with open_run(folder, fold_record, data, (), resume=resume, outer_resume_command=command):
                train_and_test(replace(run, experiment=experiment, data=data, folder=folder))
        except Stopped as stop:
            raise Stopped(f"in fold {fold + 1} of {FOLDS}, {stop.reason}") from stop
        gc.collect()  # frees arrays in reference cycles, whose memory the next fold needs
    if run.experiment.method.postprocessing.largest == "if_better" and is_first():
        trials = {case: trial for f in folders for case, trial in read_trials(f / files.LARGEST).items()}
        write_choice(trials, run.data.dataset.labels.names, run.folder / files.LARGEST)
    barrier()
    with use_local_devices():
        step_bytes = max(read_json(folder / files.COST, Cost).step_bytes for folder in folders)
        return test_network(run, None, step_bytes)


def build_network(run: Run) -> nnx.Module:
    """Build the untrained network. Save a random backbone that stays frozen in the run's folder."""
    model = run.experiment.method.model
    saved = run.folder / files.BACKBONE
    seed = run.experiment.seed
    if model.backbone == "finetuned" or model.weights != "random":
        return run.task.build_network()
    record = read_record(run.folder)
    barrier()  # before the first process rewrites the record
    if record.backbone_sha256:  # a resumed run
        try:
            network = run.task.build_network(weights=str(saved))
            if parameters_sha256(network.backbone) == record.backbone_sha256:
                return network
        except InputError:  # missing or truncated
            pass
        if is_first():
            log.warning("%s: missing or damaged; initialised again from seed %d", saved, seed)
    network = run.task.build_network()
    sha256 = parameters_sha256(network.backbone)
    if record.backbone_sha256 not in ("", sha256):
        reason = f"with the installed package versions, seed {seed} gives a different backbone"
        problem = f"missing or damaged, and cannot be recreated: {reason}"
        raise InputError(saved, problem, "Restore the file from a backup, or start a new run.")
    if is_first():
        save_random(saved, network.backbone, model.arch, seed)
        write_record(run.folder, replace(record, backbone_sha256=sha256))
    return network


def compute_features(run: Run, network: nnx.Module) -> Features | None:
    """Compute the features of every slice that the run uses, once, if the backbone is frozen and the disk has room.

    Otherwise return None: the whole network runs in every epoch. The record says which applies, and why.
    """
    reason = run.task.explain_uncached(network)
    features = None
    if not reason:
        with use_local_devices():
            cache = run.task.make_feature_cache(network, run.cache_dir)
            arrays = cache.features(run.data.used_volumes)
        if arrays is None:
            reason = "The frozen backbone ran in every epoch: its features did not fit on the disk of the cache folder."
        else:
            by_case = {volume.id: array for volume, array in zip(run.data.used_volumes, arrays, strict=True)}
            features = Features(by_case, network.reads_images)
            reason = f"The frozen backbone's features were computed once per slice, in {cache.dtype.name}, and cached."
    if is_first():
        record = read_record(run.folder)
        write_record(run.folder, replace(record, features=reason, features_cached=features is not None))
    return features


def fit_run_to_minutes(run: Run, features: Features | None) -> Run:
    """Return the run with the epochs and steps that fit into its minutes: measured once, then read from its record."""
    record = read_record(run.folder)
    recipe = run.task.recipe
    if record.fitted_steps:
        recipe = replace(recipe, epochs=record.fitted_epochs, steps=record.fitted_steps)
    else:
        recipe = measure_and_fit(run.task, run.task.make_sources(run.data, run.cache_dir, features), features)
        if is_first():
            write_record(run.folder, replace(record, fitted_epochs=recipe.epochs, fitted_steps=recipe.steps))
    if is_first():
        log.info("%g minutes: %s of %s", recipe.minutes, plural(recipe.epochs, "epoch"), plural(recipe.steps, "step"))
    return replace(run, task=run.task.with_recipe(recipe))


def train_network(run: Run, network: nnx.Module, features: Features | None) -> Progress:
    """Train the network; write checkpoints, metrics.jsonl and progress.png into the run's folder."""
    sources = run.task.make_sources(run.data, run.cache_dir, features)
    if (batch_size := run.task.batch_size) > (count := len(sources.train)):
        log.warning(
            "--training.batch_size=%d: larger than the training set of %d %s, so each is repeated within a step",
            batch_size, count, run.task.sample[count > 1],
        )  # fmt: skip
    parameters = count_parameters(nnx.state(network, nnx.Param))
    trainer = run.task.make_trainer(network, sources.train, features)
    trained = count_parameters(trainer.trainable)
    label = method_label(run.experiment, METHODS)
    kept = run.experiment.method.training.checkpoint
    log.info("%s: %d parameters are trained, %d are frozen", label, trained, parameters - trained)

    def report_epoch(history: list[dict[str, Any]]) -> None:
        if is_first():
            files.write_metrics(run.folder, history)
            if history:
                title = f"{run.experiment.name}, {label}"
                draw_curves(history, title, run.folder / files.CURVES, run.task.unit, kept)

    with catch_out_of_memory(batch_size, run.task.memory_advice):
        progress = fit(
            trainer,
            sources.train,
            sources.val,
            run.folder / files.CHECKPOINTS,
            epochs_done=broadcast(files.count_epochs(run.folder)),
            on_epoch=report_epoch,
        )
    if sources.val is not None:
        log.info("%s epoch %d: validation Dice %.3f %s", kept, progress.best_epoch, progress.best_dice, run.task.unit)
    return progress


def test_network(run: Run, features: Features | None, step_bytes: int) -> dict[str, Any] | None:
    """Test the trained network on the test cases; write `test/`, cost.json and report.html.

    Return the summary of the test in process 0; without test cases it has no scores.

    Args:
        step_bytes: device memory of a training step.
    """
    trained = load_run(run.folder)
    is_single = run.experiment.fold != ALL_FOLDS
    if run.experiment.method.postprocessing.largest == "if_better" and is_single:
        trained = choose_postprocessing(trained, run.data, run.folder)
    segment = trained.segment
    about = {"best_epoch": trained.epoch} if is_single else {}
    about["backbone"] = trained.record.network
    if is_single and hasattr(trained.network, "block_weights"):
        about["block_weights"] = trained.network.block_weights()
    segment_case = make_segment_case(trained, segment, features)
    rows, summary = score_test_cases(trained, run.data, segment_case, run.folder, about)
    if not is_first():
        return None
    split = run.data.split
    max_slices = max(volume.shape[0] for volume in run.data.select_volumes(split.train + split.val))
    timed = run.data.select_volumes(split.test or split.train)
    cost = asdict(measure_cost(trained, segment, timed, step_bytes, max_slices))
    write_atomically(run.folder / files.COST, json.dumps(cost, indent=1) + "\n")
    write_reports(run.folder, run.data.volumes, rows, summary, cost)
    return summary


def print_result(summary: Mapping[str, Any], folder: Path, case_word: str) -> None:
    """Print the last line of a run."""
    result = f"trained; no test cases. {HOW_TO_TEST}"
    if "dice" in summary:
        dice, iou, atlas = summary["dice"], summary["iou"], summary["atlas"]["dice"]
        result = (
            f"test Dice {dice['mean']:.3f}, IoU {iou['mean']:.3f} "
            f"(mean per volume over {plural(dice['n'], case_word)}; the atlas baseline, which does not use the image: "
            f"Dice {atlas['mean']:.3f})."
        )
    print(wrap(f"{summary['backbone']}: {result} Run folder: {shlex.quote(str(folder))}"))


if __name__ == "__main__":
    run_command(main)
