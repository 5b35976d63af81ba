"""Whether an experiment can be run at all, before anything is begun."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from jaxla.config import PARTS, Augmentation, Experiment, InputError, Model, Preprocessing
from jaxla.data.cases import HOW_TO_GET_DATA, RECOGNISED
from jaxla.data.prepared import PreparedVolume
from jaxla.distributed import device_count, process_count
from jaxla.experiments import METHODS
from jaxla.memory import require_memory
from jaxla.models.build import (
    checked_model,
    configuration_of,
    family_of,
    is_planned,
    reads_volumes,
    require_size,
    require_slices,
)
from jaxla.models.weights import weights_file
from jaxla.models.weights_format import require_undamaged


def checked(experiment: Experiment) -> Experiment:
    """The experiment, its architecture in this package's spelling, and named beside the method if it is not its own.

    Raises:
        InputError: values that no run can work with.
    """
    if not experiment.data.root:
        raise InputError(
            f"option --data.root is required: a folder in one of these layouts: {RECOGNISED}. {HOW_TO_GET_DATA}"
        )
    if experiment.data.other_labels == "background" and not experiment.data.labels:
        raise InputError(
            "option --data.other_labels=background: say by --data.labels which values are a class, such as LA:1"
        )
    training = experiment.training
    own = METHODS[experiment.method].model
    model = checked_model(experiment.model, own, experiment.method)
    planned = is_planned(model)
    least = {
        "training.epochs": (1, training.epochs),
        "training.steps": (1 if planned else 0, training.steps),
        "training.batch_size": (0 if planned else 1, training.batch_size),
        "training.patience": (0, training.patience),
        "preprocessing.image_size": (1, experiment.preprocessing.image_size),
        "data.phantom_cases": (1, experiment.data.phantom_cases),
        "seed": (0, experiment.seed),
    }
    for name, widths in vars(experiment.model).items():
        if name.endswith("widths"):
            if not widths:
                raise InputError(f"option --model.{name} is empty; give at least one width, such as [64,32]")
            least[f"model.{name}"] = (1, min(widths))
    for name in ("opening", "closing"):
        if (side := getattr(experiment.postprocessing, name)) and side % 2 == 0:
            raise InputError(f"option --postprocessing.{name} must be odd, or 0 to leave it out, got {side}")
        least[f"postprocessing.{name}"] = (0, side)
    for name in ("rotation", "scale", "intensity", "elastic"):
        least[f"augmentation.{name}"] = (0, getattr(experiment.augmentation, name))
    for option, (bound, value) in least.items():
        if not bound <= value < float("inf"):
            raise InputError(f"option --{option} must be at least {bound}, got {value}")
    for option in ("learning_rate", "backbone_learning_rate"):
        if not 0 < getattr(training, option) < float("inf"):
            raise InputError(f"option --training.{option} must be a positive number, got {getattr(training, option)}")
    if not 0 < model.memory_gb < float("inf"):
        raise InputError(f"option --model.memory_gb must be a positive number, got {model.memory_gb}")
    if model.plan:
        configuration_of(model)
        if model.memory_gb != own.memory_gb:
            raise InputError(
                f"options --model.plan and --model.memory_gb: {model.plan} says how large patches are; leave one out"
            )
    if training.gradient == "two_pass" and not reads_volumes(model):
        raise InputError(
            f"option --training.gradient=two_pass is of networks in windows, which method {experiment.method} is not; "
            "leave it out"
        )
    _require_read(experiment, planned)
    recipe = METHODS[experiment.method].training
    if not _has_backbone_rate(model) and training.backbone_learning_rate != recipe.backbone_learning_rate:
        raise InputError(
            "option --training.backbone_learning_rate is that of a pretrained backbone that is trained, and "
            f"{model.arch} is {'frozen' if model.backbone == 'frozen' else 'trained from random weights'}; leave it out"
        )
    if not planned:
        require_size(model, "option --preprocessing.image_size", experiment.preprocessing.image_size)
    return replace(experiment, model=model)


def _require_read(experiment: Experiment, planned: bool) -> None:
    """Raise an InputError if an option of images and their changes is set that this method does not read."""
    own = METHODS[experiment.method]
    for part in ("preprocessing", "augmentation"):
        for field in fields(PARTS[part]):
            value, default = (getattr(getattr(of, part), field.name) for of in (experiment, own))
            if f"{part}.{field.name}" in _of_images(planned) and value != default:
                instead = (
                    "its plan says it" if part == "preprocessing" else "--augmentation.nnunet is all that it reads"
                )
                why = instead if planned else "it is of nnU-Net's methods alone"
                raise InputError(f"option --{part}.{field.name} is not one of method {experiment.method}: {why}")


def _of_images(planned: bool) -> set[str]:
    """The options of preprocessing and augmentation that a method does not read."""
    if not planned:
        return {"augmentation.nnunet"}
    of_slices = {f"preprocessing.{field.name}" for field in fields(Preprocessing)}
    return of_slices | {f"augmentation.{field.name}" for field in fields(Augmentation)} - {"augmentation.nnunet"}


def unread_options(experiment: Experiment) -> set[str]:
    """The options, by dotted name, that a run of this experiment does not read, whatever their values are."""
    model = experiment.model
    read = ("arch", "network", *family_of(model).options)
    unread = {f"model.{field.name}" for field in fields(Model) if field.name not in read}
    unread |= _of_images(is_planned(model))
    if model.plan:
        unread.add("model.memory_gb")
    if not reads_volumes(model):
        unread.add("training.gradient")
    if model.decoder == "linear":
        unread.add("model.decoder_widths")
    if model.backbone == "finetuned":
        unread.add("training.cache_features")
    if not _has_backbone_rate(model):
        unread.add("training.backbone_learning_rate")
    if experiment.data.root != "phantom":
        unread |= {"data.phantom_size", "data.phantom_cases"}
    if experiment.data.split:
        unread.add("data.split_seed")
    return unread


def _has_backbone_rate(model: Model) -> bool:
    return model.backbone == "finetuned" and model.weights != "random"


def with_weights(experiment: Experiment, cache_dir: Path) -> tuple[Experiment, str]:
    """The experiment with the path of its backbone's weights, and the sha256 of their data; empty for random ones.

    Raises:
        InputError: the weights are missing or damaged.
    """
    model = experiment.model
    if model.weights == "random":
        return experiment, ""
    path = weights_file(model.arch, model.weights, cache_dir).absolute()
    sha256 = require_undamaged(path)
    return replace(experiment, model=replace(model, weights=str(path))), sha256


def require_fitting_scans(experiment: Experiment, volumes: Iterable[PreparedVolume]) -> None:
    """Raise an InputError if a scan has too few slices for the network."""
    for volume in volumes:
        require_slices(experiment.model, volume.case.image, volume.shape[0])


def require_batch(experiment: Experiment) -> None:
    """Raise `TooLarge` where a device could not even hold its images of a batch; before any is made."""
    if is_planned(experiment.model):  # the plan, which is not made yet, says how large its patches are
        return
    size, images = experiment.preprocessing.image_size, -(-experiment.training.batch_size // device_count())
    require_memory(4 * size * size * images, experiment.training.batch_size)


def require_share(experiment: Experiment) -> None:
    """Raise an InputError unless each device in use has a slice of a batch; of size 0 a plan says later how large."""
    if 0 < (size := experiment.training.batch_size) < (devices := device_count()):
        processes = process_count()
        fewer = f"give --devices={size // processes * processes}" if size >= processes else "start fewer processes"
        raise InputError(
            f"option --training.batch_size={size}: smaller than the number of devices, {devices}, that share a batch; "
            f"raise it, or {fewer}"
        )
