"""Check an experiment's options and find its weights, before the data are read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from jaxla.config import Data, Experiment, InputError, Method, NetworkOptions, Preprocessing, unread_options
from jaxla.data.cases import RECOGNISED_LAYOUTS, how_to_get_data
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.models.weights import weights_file
from jaxla.models.weights_format import require_undamaged
from jaxla.tasks import TASKS


def check_experiment(experiment: Experiment) -> Experiment:
    """Return the experiment with every name in this package's spelling; raise an InputError if no run can use it."""
    data, method = experiment.data, experiment.method
    if not data.root:
        fix = f"Pass a folder in one of these layouts: {RECOGNISED_LAYOUTS}. {how_to_get_data()}"
        raise InputError("--data.root", "missing", fix)
    if data.other_labels == "background" and not data.labels:
        problem = "--data.labels is missing"
        raise InputError("--data.other_labels=background", problem, "List the values of each class, such as LA:1.")
    _check_unread_data_options(experiment)
    model = method.model.resolve()
    experiment = replace(experiment, method=replace(method, model=model))
    _check_numbers(experiment)
    _check_contradictions(experiment.method)
    training = method.training
    own = METHODS[method.name].training
    is_rate_unused = "training.backbone_learning_rate" in unread_options(experiment)
    if is_rate_unused and training.backbone_learning_rate != own.backbone_learning_rate:
        state = "frozen" if model.backbone == "frozen" else "trained from random weights"
        problem = f"has no effect, because {model.arch} is {state}"
        raise InputError("--training.backbone_learning_rate", problem, "Remove the option.")
    if method.preprocessing is not None:
        _check_input_size(model, method.preprocessing)
    return experiment


def _check_input_size(model: NetworkOptions, preprocessing: Preprocessing) -> None:
    """Raise an InputError if patches do not fit into slices, or if the network cannot read images of their size."""
    image, patch = preprocessing.image_size, preprocessing.patch_size
    if patch > image:
        problem = f"larger than --preprocessing.image_size={image}"
        raise InputError(f"--preprocessing.patch_size={patch}", problem, "Use smaller patches, or 0 for whole slices.")
    model.check_size(f"--preprocessing.{'patch_size' if patch else 'image_size'}", patch or image)


def _check_unread_data_options(experiment: Experiment) -> None:
    """Raise an InputError if an option of the data differs from the experiment's own, but has no effect."""
    data, own = experiment.data, EXPERIMENTS[experiment.name].data if experiment.name in EXPERIMENTS else Data()
    reasons = {
        "validation": f"{'--data.split' if data.split else f'--fold={experiment.fold}'} sets the validation patients",
        "split_seed": "--data.split sets the patients of each part",
        "phantom_size": "--data.root is a folder of scans",
        "phantom_cases": "--data.root is a folder of scans",
    }
    unread = unread_options(experiment)
    for name, reason in reasons.items():
        if f"data.{name}" in unread and (value := getattr(data, name)) != getattr(own, name):
            raise InputError(f"--data.{name}={value}", f"has no effect, because {reason}", "Remove one of the two.")


def _check_numbers(experiment: Experiment) -> None:
    """Raise an InputError if a number is out of range or not finite."""
    method, training = experiment.method, experiment.method.training
    task = TASKS[method.model.sample]
    minimum = {
        "training.epochs": (1, training.epochs),
        "training.steps": (task.MIN_STEPS, training.steps),
        "training.minutes": (0, training.minutes),
        "training.weight_decay": (0, training.weight_decay),
        "training.max_gradient_norm": (0, training.max_gradient_norm),
        "training.batch_size": (task.MIN_BATCH_SIZE, training.batch_size),
        "training.accumulated_steps": (1, training.accumulated_steps),
        "training.patience": (0, training.patience),
        "data.phantom_cases": (1, experiment.data.phantom_cases),
        "seed": (0, experiment.seed),
    }
    if method.preprocessing is not None:
        minimum["preprocessing.image_size"] = (1, method.preprocessing.image_size)
        minimum["preprocessing.patch_size"] = (0, method.preprocessing.patch_size)
    for name in ("opening", "closing"):
        side = getattr(method.postprocessing, name)
        if side and side % 2 == 0:
            fix = "Use an odd number, or 0 to turn it off."
            raise InputError(f"--postprocessing.{name}={side}", "must be odd", fix)
        minimum[f"postprocessing.{name}"] = (0, side)
    for name, value in vars(method.augmentation).items():
        minimum[f"augmentation.{name}"] = (0, value)
    for name, (bound, value) in minimum.items():
        if not bound <= value < math.inf:
            raise InputError(f"--{name}={value}", f"less than {bound}, or not finite", f"Use {bound} or more.")
    for name, example in (("average_decay", "0.99"), ("foreground_fraction", "0.5, for example")):
        if not 0 <= (value := getattr(training, name)) < 1:
            fix = f"Use {example}, or 0 to turn it off."
            raise InputError(f"--training.{name}={value}", "must be at least 0 and less than 1", fix)
    if not 0 < (weight := training.false_negative_weight) < 1:
        fix = "Use 0.7, for example, or 0.5 for Dice."
        raise InputError(f"--training.false_negative_weight={weight}", "must be above 0 and below 1", fix)
    for name in ("learning_rate", "backbone_learning_rate"):
        rate = getattr(training, name, 1.0)
        if not 0 < rate < math.inf:
            raise InputError(f"--training.{name}={rate}", "must be a positive number", "Use 1e-3, for example.")


def _check_contradictions(method: Method) -> None:
    """Raise an InputError if an option of the method has no effect because of another option or of its network."""
    training, task = method.training, TASKS[method.model.sample]
    if method.postprocessing.flips and method.model.needs_plan:
        problem = f"has no effect, because the plan of {method.name} sets the mirroring"
        raise InputError("--postprocessing.flips=true", problem, "Remove the option.")
    if training.minutes and not task.HAS_TIME_BUDGET:
        problem = f"cannot be used with {method.name}, whose number of validation batches follows from --training.steps"
        fix = "Use --training.epochs and --training.steps."
        raise InputError(f"--training.minutes={training.minutes:g}", problem, fix)
    if training.minutes and training.steps != METHODS[method.name].training.steps:
        problem = f"has no effect, because --training.minutes={training.minutes:g} sets the number of steps"
        raise InputError(f"--training.steps={training.steps}", problem, "Remove one of the two.")
    for group, name in ((training, "training.foreground_fraction"), (method.preprocessing, "preprocessing.patch_size")):
        value = getattr(group, name.partition(".")[2], 0)
        if value and not task.TRAINS_ON_SLICES:
            problem = f"has no effect, because {method.name} does not train on single slices"
            raise InputError(f"--{name}={value}", problem, "Remove the option.")
    weight = training.false_negative_weight
    if training.loss == "cross_entropy" and weight != METHODS[method.name].training.false_negative_weight:
        problem = "has no effect, because --training.loss=cross_entropy does not use it"
        fix = "Use --training.loss=dice_cross_entropy, or remove the option."
        raise InputError(f"--training.false_negative_weight={weight}", problem, fix)
    for name in ("weight_decay", "max_gradient_norm"):
        if getattr(training, name) and training.optimiser == "sgd":
            problem = "has no effect, because --training.optimiser=sgd uses a fixed value"
            raise InputError(f"--training.{name}={getattr(training, name)}", problem, "Remove one of the two.")


def find_weights(experiment: Experiment, cache_dir: Path) -> tuple[Experiment, str]:
    """Return the experiment with the path of its backbone's weights, and the hash of their data; "" for random weights.

    Raises:
        InputError: the weights are missing or damaged.
    """
    model = experiment.method.model
    if model.weights == "random":
        return experiment, ""
    path = weights_file(model.arch, model.weights, cache_dir).absolute()
    sha256 = require_undamaged(path)
    return replace(experiment, method=replace(experiment.method, model=model.with_weights(str(path)))), sha256
