"""The options of an experiment as dataclasses, and the error for bad input."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

T = TypeVar("T")

OTHERS_ARE_BACKGROUND = "background:rest"  # last entry of the option data.labels
ALL_CASES = "all"  # value of data.split: all patients are used for training


class InputError(ValueError):
    """Bad input or usage. Printed as one line: `{where}: {problem}. {fix}`.

    Attributes:
        where: the file or option at fault.
        problem: what is wrong with it, without a full stop.
        fix: what to do about it, as whole sentences; empty if there is nothing to advise.
    """

    def __init__(self, where: object, problem: str, fix: str = "") -> None:
        self.where, self.problem, self.fix = str(where), problem, fix
        super().__init__(" ".join(f"{where}: {problem}. {fix}".split()))


_uses_command_line_names = False


@contextmanager
def command_line_wording() -> Iterator[None]:
    """Within the context, write options in messages as on the command line (see `option`)."""
    global _uses_command_line_names
    before, _uses_command_line_names = _uses_command_line_names, True
    try:
        yield
    finally:
        _uses_command_line_names = before


def option(name: str, value: object = None) -> str:
    """Return an option as error messages show it: `--data.labels=LA:1` in a command, `data.labels=LA:1` elsewhere.

    Functions that raise these errors also run in notebooks, where options have no dashes.
    """
    dashes = "--" if _uses_command_line_names else ""
    return f"{dashes}{name}" if value is None else f"{dashes}{name}={value}"


@dataclass(frozen=True)
class Data:
    """Which scans to use, and how their patients are split.

    Args:
        root: Folder of scans, or `phantom` for synthetic ones.
        image: Pattern of the images in `root`, such as `*/lge.nrrd`; `*` is the case id. Default: a known layout.
        mask: Pattern of the masks, such as `*/la.nrrd`, with the same `*` as in `image`.
        patients: Which cases are of the same patient: a regular expression, a CSV file, or `auto`. See docs/data.md.
        labels: Mask values of each class, such as `LA:1` or `anterior:1;posterior:2`. Default: the data set's own.
        other_labels: Mask values that `labels` does not list are `refused` or count as `background`.
        split: A `split.json`, or nnU-Net's `splits_final.json` with a fold; or `all`: train on all patients.
        split_seed: Seed of the 70/10/20 split by patient.
        validation: Draw validation patients `always`, `never`, or `if_useful`: from 15 or more patients, or if the
            method needs them.
        train_patients: Number of training patients to use, 0 for all. Larger subsets contain smaller ones.
        train_percent: Percentage of the training patients to use, at least one. Larger subsets contain smaller ones.
        subset_seed: Seed of the training subset; 0 takes the first patients. Other parts of the split do not change.
        phantom_size: With root=phantom: `full` (whole chest), `small` (around the heart) or `crop` (around the atrium).
        phantom_cases: With root=phantom: number of synthetic patients.
    """

    root: str = ""
    image: str = ""
    mask: str = ""
    patients: str = ""
    labels: str = ""
    other_labels: Literal["refused", "background"] = "refused"
    split: str = ""
    split_seed: int = 0
    validation: Literal["if_useful", "always", "never"] = "if_useful"
    train_patients: int = 0
    train_percent: float = 100.0
    subset_seed: int = 0
    phantom_size: Literal["small", "full", "crop"] = "full"
    phantom_cases: int = 20

    @property
    def case_word(self) -> str:
        """The noun for cases: `patient`, or `case` if `patients` groups the cases."""
        return "case" if self.patients else "patient"

    @property
    def all_labels(self) -> str:
        """`labels`, with `background:rest` appended if `other_labels` is `background`."""
        return f"{self.labels};{OTHERS_ARE_BACKGROUND}" if self.other_labels == "background" else self.labels


@dataclass(frozen=True)
class Preprocessing:
    """How a slice becomes the network's input.

    Args:
        image_size: Side in pixels of the square that slices are resized to: the network's input without patches.
        pad_to: Square in mm to which slices are padded or cropped before resizing: the smallest `square` around each
            slice, around the `largest` training slice, or around the `foreground` of all training masks.
        patch_size: Side in pixels of the random patches to train on; 0 trains on whole slices. Validation and
            prediction average the logits of overlapping tiles of this size.
    """

    image_size: int = 448
    pad_to: Literal["square", "largest", "foreground"] = "square"
    patch_size: int = 0


@dataclass(frozen=True)
class Postprocessing:
    """How a network's probabilities become a mask.

    Args:
        opening: Side in pixels of the square for binary opening of each class; 0 for none.
        closing: Side in pixels of the square for binary closing, after opening; 0 for none.
        largest: Keep only the largest connected component: `never`, `always` (of all structures together), or, as in
            nnU-Net, `if_better` on the validation cases.
        flips: Average probabilities over each slice and its flips along rows, columns and both; takes 4 times as long.
    """

    opening: int = 0
    closing: int = 0
    largest: Literal["never", "always", "if_better"] = "never"
    flips: bool = False


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training slices, drawn anew in every step. 0 and false turn a change off.

    Args:
        rotation: Largest angle in degrees, in both directions.
        scale: Largest change of size: 0.2 scales by 1/1.2 to 1.2.
        flips: Flip rows and columns, each with probability 0.5.
        intensity: Largest change of brightness (fraction of the grey range), contrast and gamma (like `scale`).
        elastic: Standard deviation of smooth random displacements, in percent of the input's side.
    """

    rotation: float = 0.0
    scale: float = 0.0
    flips: bool = False
    intensity: float = 0.0
    elastic: float = 0.0


@dataclass(frozen=True)
class Training:
    """The training recipe.

    Args:
        epochs: Maximum number of epochs.
        steps: Steps per epoch; 0 for one pass over the training data.
        minutes: Time limit for training and validation, from which a few timed steps determine the number of steps; 0
            for no limit.
        batch_size: Samples per step; 0, for nnU-Net only, takes the plan's batch size.
        accumulated_steps: Steps over which gradients are averaged before an update: large batches in little memory.
        foreground_fraction: Fraction of slices, below 1, that are drawn only from slices with a structure; also, of
            the patches of such slices, the fraction that are drawn to contain part of the structure.
        optimiser: `adam`, or `sgd` as in nnU-Net (Nesterov 0.99, weight decay 3e-5, gradients clipped to norm 12).
        weight_decay: Weight decay for Adam, decoupled as in AdamW; 0 for none.
        max_gradient_norm: Norm to which gradients are clipped, for Adam; 0 for no limit.
        learning_rate: Learning rate of randomly initialised parameters.
        schedule: `constant`, `cosine` (2 % warm-up, then down to zero) or nnU-Net's `poly` (power 0.9).
        loss: `cross_entropy`, or nnU-Net's `dice_cross_entropy`.
        false_negative_weight: Weight of missed pixels in the Dice of `dice_cross_entropy`, above 0 and below 1; surplus
            pixels have the rest. More than 0.5 (Dice) makes masks larger (Tversky index).
        patience: Stop after this many epochs without a lower validation loss; 0 never stops early.
        checkpoint: Epoch to keep: the one with the `best` validation Dice, or the `last`.
        average_decay: Evaluate an exponential moving average of the parameters, with this decay per step; 0 for none.
    """

    epochs: int = 35
    steps: int = 0
    minutes: float = 0.0
    batch_size: int = 32
    accumulated_steps: int = 1
    foreground_fraction: float = 0.0
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    max_gradient_norm: float = 0.0
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "poly"] = "constant"
    loss: Literal["cross_entropy", "dice_cross_entropy"] = "cross_entropy"
    false_negative_weight: float = 0.5
    patience: int = 10
    checkpoint: Literal["best", "last"] = "best"
    average_decay: float = 0.0


@dataclass(frozen=True)
class BackboneTraining(Training):
    """The training recipe of a network on a backbone.

    Args:
        backbone_learning_rate: Learning rate of a pretrained backbone that is fine-tuned.
        cache_features: Compute a frozen backbone's features once and keep them in the cache folder.
    """

    backbone_learning_rate: float = 1e-5
    cache_features: bool = True


@dataclass(frozen=True)
class VolumeTraining(BackboneTraining):
    """The training recipe of a network that reads whole volumes.

    Args:
        gradient: Differentiate the `whole` network at once, or use `two_pass`: same result, memory of a single window.
    """

    gradient: Literal["whole", "two_pass"] = "whole"


@dataclass(frozen=True)
class NetworkOptions:
    """Base class for the options of a network. Each file in `jaxla/models/networks` derives its own.

    A derived class adds a method `build`, and the fields that a user may set (see `jaxla.models.networks`). The class
    variables below have the values for a network without a pretrained part; `BackboneOptions` turns them into options.
    """

    sample: ClassVar[str] = "slices"  # kind of training sample, a key of `jaxla.tasks.TASKS`
    needs_plan: ClassVar[bool] = False  # whether nnU-Net's plan determines the preprocessing
    arch: ClassVar[str] = ""
    neighbours: ClassVar[int] = 0  # slices on each side that are added to a slice as channels
    weights: ClassVar[str] = "random"  # origin of the backbone's parameters
    backbone: ClassVar[str] = "finetuned"  # whether it stays `frozen` or is `finetuned`

    def resolve(self) -> Self:
        """Return these options with names in this package's spelling; raise an InputError for invalid values."""
        return self

    def check_size(self, option_name: str, size: int) -> None:
        """Raise an InputError unless the network takes square images with sides of `size` pixels."""

    def unread(self) -> set[str]:
        """Return the names of options that have no effect, given the values of the others."""
        return set()

    def with_weights(self, weights: str) -> Self:
        """Return these options with other weights; unchanged for a network without a backbone."""
        return self

    def prerequisites(self, key: Any, dtype: Any, cache_dir: Path | None, plan: Any) -> dict[str, Any]:
        """Return the additional arguments of `build`: a backbone, or a plan's configuration."""
        return {}

    def build(self, outputs: int, dtype: Any, rngs: Any, **prerequisites: Any) -> Any:
        """Return the network with K = `outputs` logits; it computes in `dtype`, parameters and logits are float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A network with its preprocessing, training recipe and postprocessing: one row of a results table.

    Preprocessing is None for nnU-Net, whose plan determines it.
    """

    name: str
    summary: str
    model: NetworkOptions
    preprocessing: Preprocessing | None
    training: Training
    postprocessing: Postprocessing = Postprocessing()
    augmentation: Any = Augmentation()


@dataclass(frozen=True)
class Experiment:
    """A protocol (`data`, `fold`) and a method, under one name.

    Args:
        seed: Seed of initial parameters and of the order of samples.
        fold: Validation fold of five-fold cross-validation, `0` to `4`; `all` trains all five; empty for none.
        own_scans_method: Method for data other than phantoms; None if it is the same.
    """

    name: str
    summary: str
    data: Data
    method: Method
    seed: int = 0
    fold: Literal["", "0", "1", "2", "3", "4", "all"] = ""
    own_scans_method: Method | None = field(default=None, compare=False)  # not stored in the record of a run


@dataclass(frozen=True)
class Study:
    """Methods to compare under protocols, given by their experiments: a run for each method, protocol and seed."""

    name: str
    summary: str
    experiments: tuple[str, ...]
    methods: tuple[str, ...]


class Published(NamedTuple):
    """A row of a published table, in percent; `iou` and the deviations are None if none was printed.

    `source` says where it was published, `caveat` what to keep in mind; both become part of a sentence.
    """

    source: str
    caveat: str
    dice: float
    dice_sd: float | None = None
    iou: float | None = None
    iou_sd: float | None = None


def choices_by_validation(method: Method) -> dict[str, object]:
    """Return the options that make a method depend on validation cases: dotted name -> a value without this effect."""
    training = method.training
    choices = {}
    if training.checkpoint == "best":
        choices["training.checkpoint"] = "last"
    if training.patience:
        choices["training.patience"] = 0
    if method.postprocessing.largest == "if_better":
        choices["postprocessing.largest"] = "always"
    return choices


METHOD_GROUPS = ("model", "preprocessing", "augmentation", "training", "postprocessing")


def option_groups(experiment: Experiment) -> dict[str, Any]:
    """Return the dataclasses that hold an experiment's options, by the group's name on the command line."""
    groups = {"data": experiment.data} | {name: getattr(experiment.method, name) for name in METHOD_GROUPS}
    return {name: group for name, group in groups.items() if group is not None}


def option_values(experiment: Experiment) -> dict[str, Any]:
    """Return every option's value by its dotted name, as the command line takes it."""
    groups = option_groups(experiment).items()
    values = {f"{name}.{field}": value for name, group in groups for field, value in asdict(group).items()}
    return {"seed": experiment.seed, "fold": experiment.fold} | values


def unread_options(experiment: Experiment) -> set[str]:
    """Return the options, by dotted name, that have no effect in this experiment, given the values of the others."""
    model, training = experiment.method.model, experiment.method.training
    unread = {f"model.{name}" for name in model.unread()}
    if isinstance(training, BackboneTraining):
        if model.backbone == "finetuned":
            unread.add("training.cache_features")
        if model.backbone == "frozen" or model.weights == "random":
            unread.add("training.backbone_learning_rate")
    if experiment.data.root != "phantom":
        unread |= {"data.phantom_size", "data.phantom_cases"}
    if experiment.data.split or experiment.fold:
        unread.add("data.validation")
    if experiment.data.split not in ("", ALL_CASES):
        unread.add("data.split_seed")
    if training.minutes:
        unread.add("training.steps")
    if training.loss == "cross_entropy":
        unread.add("training.false_negative_weight")
    return unread


def lookup(where: str, name: str, table: Mapping[str, T]) -> T:
    """Return `table[name]`, or raise an InputError that suggests the nearest name."""
    if name in table:
        return table[name]
    raise InputError(f"{where}={name}", f"unknown name{suggestion(name, table)}", f"Known: {', '.join(table)}.")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` if a known name is similar, otherwise an empty string.

    `--training.lr` and `--epochs` count as short forms of `--training.learning_rate` and `--training.epochs`.
    """
    group, _, last = name.lstrip("-").rpartition(".")
    groups = {each: each.lstrip("-").rpartition(".")[::2] for each in known}
    short_forms = [
        each
        for each, (known_group, known_last) in groups.items()
        if group in ("", known_group) and last in (known_last, "".join(w[0] for w in known_last.split("_") if w))
    ]
    close = short_forms[:1] or difflib.get_close_matches(name, groups, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
